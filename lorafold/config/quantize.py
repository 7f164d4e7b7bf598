"""How a model is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafold.config.checks import not_positive, refuse


@dataclass(frozen=True)
class QuantizeConfig:
    """How a model is quantized.

    Attributes:
        format: `affine` (scale and offset for each group: what QA-LoRA trains), or what bitsandbytes makes, for QLoRA:
            `nf4` (4 bits in blocks of 64) or `int8` (a scale for each row), in a folder that transformers reads; these
            two quantize nothing but the blocks, and know of the options below only use_double_quant and stored.
        use_double_quant: nf4: quantize the scales as well (4.13 bits a weight for 4.5).
        bits: of a code; 2, 3, 4, 5, 6 or 8 in an MLX folder, 4 or 5 in a GGUF file (Q4_1, Q5_1).
        group_size: weights that share a scale and an offset; 32, 64 or 128 in an MLX folder, 32 in a GGUF file.
        method: `rtn` (round to nearest), `search` (the scale and offset of least squared error), or `gptq`
            (least error of each layer's output on the rows of --data). Default: gptq with --data, otherwise search.
        propagate: gptq: share of what the layers before have lost that each layer makes up for (QEP, arXiv 2504.09629),
            0 to 1; 0 fits each layer to its own weights alone. Default: 0.5.
        embedding_bits: of the embedding and the head; 16 leaves them as they are.
        stored: type of what is not quantized, and in an MLX folder of scales and offsets. Default: float16 in an MLX
            folder (bfloat16 offsets are coarse), for nf4 and int8 that of the model.
        loftq_r: rank of a LoRA that begins with the largest part of what quantization loses (LoftQ, arXiv 2310.08659);
            it is written beside the output, to OUTPUT-loftq, for `train --from-adapter`.
        loftq_steps: how often weights and LoRA are found in turns; the step with the least error is kept.
    """

    format: Literal["affine", "nf4", "int8"] = "affine"
    use_double_quant: bool = True
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Literal[32, 64, 128] = 32
    method: Literal["rtn", "search", "gptq"] | None = None
    propagate: float | None = None
    embedding_bits: Literal[2, 3, 4, 5, 6, 8, 16] = 8
    stored: Literal["float16", "bfloat16"] | None = None
    loftq_r: int | None = None
    loftq_steps: int = 5

    def __post_init__(self) -> None:
        faults = []
        if self.format != "affine":
            plain = {"bits": 4, "group_size": 32, "method": None, "propagate": None, "embedding_bits": 8}
            given = [name for name, default in plain.items() if getattr(self, name) != default]
            faults += [f"{name} means nothing to {self.format}, whose values are fixed" for name in given]
        elif self.propagate is not None and (self.method in ("rtn", "search") or self.loftq_r is not None):
            faults.append("propagate is for gptq, which looks at layers' inputs; leave it out")
        if self.propagate is not None and not 0 <= self.propagate <= 1:
            faults.append(f"propagate is {self.propagate}; it is a share from 0 to 1")
        faults += not_positive(self, "loftq_r", "loftq_steps")
        if self.loftq_r is None and self.loftq_steps != 5:
            faults.append("loftq_steps counts the steps of LoftQ; give its rank as well, loftq_r")
        if self.loftq_r is not None and self.method == "gptq":
            faults.append(
                "loftq_r brings weights near to what they were, and gptq moves them away from that for the sake of the "
                "layers' outputs on rows: choose --method search or rtn"
            )
        refuse(faults)
