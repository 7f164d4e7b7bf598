"""Every packed format by its name."""

from lorafold.quant.bnb import BNB_CODECS
from lorafold.quant.ggml import GGML_CODECS, Codec
from lorafold.quant.kquants import K_CODECS
from lorafold.quant.mlx import MLX_CODECS

GGUF_CODECS: dict[str, Codec] = {codec.name: codec for codec in (*GGML_CODECS, *K_CODECS)}
CODECS: dict[str, Codec] = {**GGUF_CODECS, **{codec.name: codec for codec in (*MLX_CODECS, *BNB_CODECS)}}
