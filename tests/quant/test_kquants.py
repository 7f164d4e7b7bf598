"""K-quants and IQ4_NL: decoded as gguf-py does, offsets in steps, promotion; on blocks of llama.cpp's quantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafold.quant.codecs import CODECS
from lorafold.quant.kquants import K_CODECS, KCodec
from lorafold.quant.linear import QuantLinear
from lorafold.quant.weight import QuantizedWeight, encode, promote, steps_apart
from tests.ggml_quantizer import ggml_quantize
from tests.quant.test_ggml import bits, random_blocks

K = {codec.name: codec for codec in K_CODECS}
AFFINE = {name: codec for name, codec in K.items() if isinstance(codec, KCodec) and codec.affine}
codecs = pytest.mark.parametrize("codec", sorted(K))
affine = pytest.mark.parametrize("codec", sorted(AFFINE))
cases = st.tuples(st.integers(1, 7), st.integers(1, 4)), st.integers(0, 2**32)


def quantized(codec: str, rows: int = 24, blocks: int = 3, seed: int = 0) -> QuantizedWeight:
    """A random matrix as llama.cpp quantizes it, with rows of very different size and one of zeros."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, 256 * blocks)) * 10.0 ** generator.uniform(-4, 2, (rows, 1))
    weight[0] = 0
    weight[1] += 3 * np.abs(weight[1]).max()  # all of one sign: minima of zero
    stored = ggml_quantize(weight.astype(np.float32), codec)
    raw = torch.from_numpy(stored.reshape(rows, -1, K[codec].block_bytes))
    return QuantizedWeight(codec, weight.shape, raw)


@codecs
@given(*cases)
@settings(max_examples=40, deadline=None)
def test_decode_equals_gguf_bit_for_bit(codec: str, shape: tuple[int, int], seed: int) -> None:
    """On random bytes: every code, parameters of either sign, subnormal and zero."""
    blocks = random_blocks(codec, *shape, seed)
    expected = dequantize(blocks.reshape(shape[0], -1).numpy(), GGMLQuantizationType[codec])
    weight = QuantizedWeight(codec, (shape[0], shape[1] * K[codec].block_weights), blocks)
    np.testing.assert_array_equal(bits(weight.decode()), bits(expected))


@codecs
def test_decode_of_what_llama_cpp_quantized(codec: str) -> None:
    weight = quantized(codec)
    expected = dequantize(weight.blocks.flatten(1).numpy(), GGMLQuantizationType[codec])
    np.testing.assert_array_equal(bits(weight.decode()), bits(expected))


@codecs
def test_sizes_equal_ggmls(codec: str) -> None:
    form = CODECS[codec]
    assert (form.block_weights, form.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[codec]]
    assert form.ggml_type == GGMLQuantizationType[codec].value
    assert form.scale(random_blocks(codec, 5, 2, 0)).shape == (5, 2 * form.block_weights // form.group_size)
    with pytest.raises(ValueError, match="quantizer"):
        encode(torch.randn(2, 256), codec)


@pytest.mark.parametrize("codec", [name for name, form in K.items() if isinstance(form, KCodec)])
@given(*cases)
@settings(max_examples=20, deadline=None)
def test_parameters_in_one_pass_are_those_of_torch(codec: str, shape: tuple[int, int], seed: int) -> None:
    """Bit for bit, the sign of zeros included."""
    form, blocks = CODECS[codec], random_blocks(codec, *shape, seed)
    scale, offset = form.parameters(blocks)
    np.testing.assert_array_equal(bits(scale), bits(form.scale(blocks)))
    np.testing.assert_array_equal(bits(offset), bits(form.offset(blocks)))


def test_parameters_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NUMBA_DISABLE_JIT no kernel is called."""
    blocks = random_blocks("Q2_K", 3, 2, 0)
    expected = K["Q2_K"].parameters(blocks)
    monkeypatch.setattr("lorafold.quant.kernels.config.DISABLE_JIT", 1)
    monkeypatch.setattr("lorafold.quant.kquants.k_parameters", None)
    for found, wanted in zip(K["Q2_K"].parameters(blocks), expected, strict=True):
        assert torch.equal(found, wanted)


# offsets


@affine
def test_the_stored_offset_put_back_gives_the_same_bytes(codec: str) -> None:
    form = AFFINE[codec]
    for blocks in (quantized(codec).blocks, random_blocks(codec, 9, 3, seed=1)):
        stored = form.offset(blocks)
        moved = form.move_offset(stored, torch.zeros_like(stored))
        np.testing.assert_array_equal(bits(moved), bits(stored))
        np.testing.assert_array_equal(form.with_offset(blocks, moved).numpy(), blocks.numpy())


@affine
@given(*cases, st.sampled_from([1e-7, 1e-3, 0.03, 1.0, 1e3]))
@settings(max_examples=60, deadline=None)
def test_moved_offsets_are_stored_exactly(codec: str, shape: tuple[int, int], seed: int, size: float) -> None:
    """Whatever `move_offset` gives, the bytes hold; scales and codes are as they were. Also below float16's range."""
    form, blocks = AFFINE[codec], random_blocks(codec, *shape, seed)
    generator = torch.Generator().manual_seed(seed)
    stored = form.offset(blocks)
    update = size * torch.randn(stored.shape, generator=generator)
    update[torch.rand(stored.shape, generator=generator) < 0.2] = 0
    moved = form.move_offset(stored, update)
    new = form.with_offset(blocks, moved)
    assert torch.equal(form.offset(new), moved)
    assert torch.equal(form.scale(new), form.scale(blocks))
    assert torch.equal(form.codes(new), form.codes(blocks))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(form.decode(blocks, dtype, moved), form.decode(new, dtype))


@affine
def test_moved_offsets_are_within_half_a_step(codec: str) -> None:
    """Half of dmin = peak / most, where all targets of a block have one sign; float16 rounds dmin by 2^-11."""
    form, weight = AFFINE[codec], quantized(codec)
    stored = form.offset(weight.blocks)
    update = stored * 0.3 * torch.rand(stored.shape, generator=torch.Generator().manual_seed(0))
    apart = form._in_blocks(form.move_offset(stored, update) - stored - update).abs().amax(-1)
    peak = form._in_blocks(stored + update).abs().amax(-1)
    worst = peak * (0.5 / form.most + 2.0**-11) * form._in_blocks(stored).shape[-1] ** 0.5  # the sum is what is least
    assert (apart <= worst + 2.0**-24 * form.most).all()


@affine
def test_only_blocks_that_are_updated_move(codec: str) -> None:
    form, weight = AFFINE[codec], quantized(codec)
    stored = form.offset(weight.blocks)
    update = torch.zeros_like(stored)
    per_block = 256 // form.group_size
    update[5, per_block + 1] = float(stored.abs().amax())
    changed = form.with_offset(weight.blocks, form.move_offset(stored, update)) != weight.blocks
    assert {tuple(at) for at in changed.any(-1).nonzero().tolist()} == {(5, 1)}


@affine
def test_gradient_passes_straight_through(codec: str) -> None:
    form, weight = AFFINE[codec], quantized(codec)
    stored = form.offset(weight.blocks)
    update = torch.zeros_like(stored).requires_grad_(True)
    factors = torch.randn(stored.shape)
    (form.move_offset(stored, update) * factors).sum().backward()
    assert update.grad is not None
    assert torch.equal(update.grad, factors)


@affine
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e9])
def test_what_cannot_be_stored_does_not_become_a_number(codec: str, value: float) -> None:
    form, weight = AFFINE[codec], quantized(codec)
    stored = form.offset(weight.blocks)
    update = torch.zeros_like(stored)
    update[2, 3] = value
    new = form.with_offset(weight.blocks, form.move_offset(stored, update))
    finite = torch.isfinite(form.offset(new))
    assert not finite[2, 3]
    assert finite[3:].all()


# promotion


@pytest.mark.parametrize(("codec", "bound"), [("Q4_K", 0.012), ("Q5_K", 0.025)])
def test_promotion_changes_weights_by_a_trifle(codec: str, bound: float) -> None:
    """Scale and offset are each rounded by 2^-11 of up to 15 (31) steps, half of the scale's error at either end."""
    weight = quantized(codec, rows=200)
    weight = weight.rows((K[codec].scale(weight.blocks).abs().amin(1) > 1e-3).nonzero().flatten())  # normal numbers
    assert weight.shape[0] > 50
    promoted = promote(weight)
    assert promoted.codec == K[codec].promotes_to
    assert torch.equal(promoted.format.codes(promoted.blocks), weight.format.codes(weight.blocks))
    assert 0 < steps_apart(weight.decode(), promoted) < bound


def test_promotion_refuses_what_float16_cannot_hold() -> None:
    blocks = random_blocks("Q4_K", 2, 2, seed=0)
    blocks[1, 1, :2] = torch.tensor([0xFF, 0x7B], dtype=torch.uint8)  # d = 65504
    blocks[1, 1, 4:16] = 63
    with pytest.raises(ValueError, match="Q4_K"):
        promote(QuantizedWeight("Q4_K", (2, 512), blocks))


# layers


@codecs
def test_layer_equals_a_dense_one(codec: str) -> None:
    """Forward pass and the gradient of the input; of the offsets too where they are learned."""
    weight = quantized(codec, rows=16)
    scale = weight.decode().abs().amax(1, keepdim=True).clamp_min(1e-3)
    x = torch.randn(5, weight.shape[1], requires_grad=True)
    layer, dense = QuantLinear(weight), weight.decode()
    offset: Tensor | None = None
    if codec in AFFINE:
        offset = weight.format.offset(weight.blocks).requires_grad_(True)
    y = layer(x, offset) / scale.T
    y.square().sum().backward()
    ours = x.grad, None if offset is None else offset.grad
    other = x.detach().clone().requires_grad_(True)
    if offset is not None:
        free = offset.detach().clone().requires_grad_(True)
        dense = dense + (free - free.detach()).repeat_interleave(weight.format.group_size, 1)
    expected = other @ dense.T / scale.T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward()
    torch.testing.assert_close(ours[0], other.grad, rtol=1e-4, atol=1e-3)
    if offset is not None:
        torch.testing.assert_close(ours[1], free.grad, rtol=1e-3, atol=1e-3 * float(free.grad.abs().max()))
