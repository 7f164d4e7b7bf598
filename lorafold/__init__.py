"""LoraFold: fine-tune the quantized model that you deploy."""

__version__ = "0.1.0"
