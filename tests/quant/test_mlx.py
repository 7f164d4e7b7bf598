"""MLX's affine format against MLX's own quantizer and decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.quant.codecs import CODECS
from lorafold.quant.mlx import BITS, GROUPS, STORED, MLXCodec, mlx_codec
from lorafold.quant.weight import QuantizedWeight, encode

mx: Any = pytest.importorskip("mlx.core")
MLX_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
all_bits = pytest.mark.parametrize("bits", BITS)
all_groups = pytest.mark.parametrize("group", GROUPS)
all_types = pytest.mark.parametrize("stored", STORED)


def to_bytes(array: Any) -> torch.Tensor:
    """uint8 [rows, bytes] of an MLX matrix."""
    words = np.array(array.view({2: mx.uint16, 4: mx.uint32}[array.dtype.size]))
    return torch.from_numpy(words.view(np.uint8).copy())


def quantized(bits: int, group: int, stored: str, seed: int = 0) -> tuple[QuantizedWeight, np.ndarray]:
    """A matrix that MLX quantized, and what MLX decodes it to in float32."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((9, 3 * group)) * 10.0 ** generator.uniform(-3, 1, (9, 1))
    weight[0], weight[1] = 0, 7.5  # groups of equal weights
    codes, scales, biases = mx.quantize(mx.array(weight.astype(np.float32)).astype(MLX_TYPES[stored]), group, bits)
    parts = [to_bytes(part).reshape(9, 3, -1) for part in (scales, biases, codes)]
    decoded = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), group, bits)
    name = mlx_codec(bits, group, stored)
    return QuantizedWeight(name, (9, 3 * group), torch.cat(parts, -1)), np.array(decoded)


def codec_of(bits: int, group: int, stored: str) -> MLXCodec:
    codec = CODECS[mlx_codec(bits, group, stored)]
    assert isinstance(codec, MLXCodec)
    return codec


@all_bits
@all_groups
@all_types
@pytest.mark.parametrize("size", [1e-6, 1.0, 300.0])
def test_encode_equals_mlx_byte_for_byte(bits: int, group: int, stored: str, size: float) -> None:
    """Random groups, groups of equal weights, and groups whose largest magnitude is positive or negative."""
    weight = torch.randn(12, 2 * group, generator=torch.Generator().manual_seed(bits)) * size
    weight[0], weight[1], weight[2], weight[3] = 0, 0.75 * size, weight[2].abs(), -weight[3].abs()
    weight = weight.to(STORED[stored])
    parts = mx.quantize(mx.array(weight.float().numpy()).astype(MLX_TYPES[stored]), group, bits)
    codes, scales, biases = (to_bytes(part).reshape(12, 2, -1) for part in parts)
    ours = encode(weight, mlx_codec(bits, group, stored))
    assert torch.equal(ours.blocks, torch.cat([scales, biases, codes], -1))


@all_bits
@all_groups
@all_types
def test_decode_equals_mlx_bit_for_bit(bits: int, group: int, stored: str) -> None:
    """In float32; the kernel and torch operations, which also agree in bfloat16."""
    weight, expected = quantized(bits, group, stored)
    codec, blocks = weight.format, weight.blocks
    np.testing.assert_array_equal(weight.decode().numpy(), expected)
    for dtype in (torch.float32, torch.bfloat16):
        reference = codec.decode_reference(blocks, codec.scale(blocks), codec.offset(blocks), dtype)
        assert torch.equal(weight.decode(dtype), reference)
    assert codec.bits_per_weight == bits + 16 * STORED[stored].itemsize / group


@all_bits
@all_types
@given(seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_parts_make_the_same_bytes(bits: int, stored: str, seed: int) -> None:
    weight, _ = quantized(bits, 64, stored, seed)
    codec, blocks = codec_of(bits, 64, stored), weight.blocks
    parts = codec.scale(blocks), codec.offset(blocks), codec.codes(blocks)
    assert torch.equal(codec.assemble(*parts), blocks)
    assert torch.equal(codec.with_offset(blocks, codec.offset(blocks)), blocks)


@all_types
def test_moved_offsets_are_what_is_stored(stored: str) -> None:
    """Rounded to the type of the file; unmoved where the update is zero; scale and codes stay; gradients pass."""
    weight, _ = quantized(4, 64, stored)
    codec, offset = codec_of(4, 64, stored), weight.format.offset(weight.blocks)
    update = (0.01 * torch.randn(offset.shape)).requires_grad_(True)
    with torch.no_grad():
        update[3] = 0
    moved = codec.move_offset(offset, update)
    expected = (offset + update.detach()).to(STORED[stored]).float()
    expected[3] = offset[3]
    assert torch.equal(moved.detach(), expected)
    new = codec.with_offset(weight.blocks, moved.detach())
    assert torch.equal(codec.offset(new), expected)
    assert torch.equal(codec.scale(new), codec.scale(weight.blocks))
    assert torch.equal(codec.codes(new), codec.codes(weight.blocks))
    (moved * torch.arange(27.0).view(9, 3)).sum().backward()
    assert update.grad is not None
    assert torch.equal(update.grad, torch.arange(27.0).view(9, 3))


def test_weights_beyond_the_parameters_are_refused() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 3] = 1e5
    with pytest.raises(ValueError, match="too large for"):
        encode(weight, mlx_codec(4, 32, "F16"))
    assert torch.isfinite(encode(weight, mlx_codec(4, 32, "BF16")).decode()).all()
