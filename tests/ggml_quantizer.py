"""llama.cpp's own quantizer, for the formats that gguf-py only decodes."""

from __future__ import annotations

import ctypes

import numpy as np
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES

GGML_ONLY = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")


def ggml_quantize(weight: np.ndarray, kind: str) -> np.ndarray:
    """A matrix [out, in] as ggml_quantize_chunk (ggml.h) stores it, uint8 [out, bytes of a row]."""
    import xllamacpp.xllamacpp as extension

    function = ctypes.CDLL(extension.__file__).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    number = GGMLQuantizationType[kind]
    group, block_bytes = GGML_QUANT_SIZES[number]
    rows, width = weight.shape
    assert width % group == 0, f"rows of {width} do not fit {kind}"
    source = np.ascontiguousarray(weight, np.float32)
    out = np.empty((rows, width // group * block_bytes), np.uint8)
    written = function(number, source.ctypes.data, out.ctypes.data, 0, rows, width, None)
    assert written == out.size
    return out
