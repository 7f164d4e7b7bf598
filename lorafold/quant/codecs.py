"""Every packed format by its name."""

from lorafold.quant.ggml import GGML_CODECS, Codec
from lorafold.quant.kquants import K_CODECS

CODECS: dict[str, Codec] = {codec.name: codec for codec in (*GGML_CODECS, *K_CODECS)}
