"""Every codec against gguf-py: encode byte for byte, decode bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lorafold.quant.codecs import CODECS
from lorafold.quant.ggml import GGML_CODECS
from lorafold.quant.weight import QuantizedWeight, encode, promote

PLAIN = {codec.name: codec for codec in GGML_CODECS}
codecs = pytest.mark.parametrize("codec", sorted(PLAIN))
AFFINE = [name for name, codec in PLAIN.items() if codec.affine]
SYMMETRIC = [name for name, codec in PLAIN.items() if codec.promotes_to]

shapes = st.tuples(st.integers(1, 20), st.integers(1, 4).map(lambda groups: 32 * groups))


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """Matrices of every size a file may hold: random ones, all-equal groups, zeros, rows of tiny and large scale."""
    rows, width = draw(shapes)
    values = np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal((rows, width // 32, 32))
    # group by group: 1e-30 rounds to a scale of 0, 1e-6 to a subnormal one, 1e5 is beyond float16
    size = draw(hnp.arrays(np.float64, (rows, width // 32, 1), elements=st.sampled_from([1e-30, 1e-6, 0.02, 1.0, 1e5])))
    shift = draw(hnp.arrays(np.float64, (rows, width // 32, 1), elements=st.sampled_from([0.0, 1.0, -3.0])))
    flat = draw(hnp.arrays(np.float64, (rows, width // 32, 1), elements=st.sampled_from([0.0, 1.0, 1.0, 1.0])))
    return ((values * flat + shift) * size).reshape(rows, width).astype(np.float32) + np.float32(0)  # no -0.0


def reference(weight: np.ndarray, codec: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return quantize(weight, GGMLQuantizationType[codec])


HALVES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}  # where a block holds float16, if not at its beginning


def random_blocks(codec: str, rows: int, groups: int, seed: int, finite: bool = True) -> Tensor:
    """Any bytes at all, apart from float16 numbers that are infinite or not a number."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows, groups, CODECS[codec].block_bytes), np.uint8)
    for at in HALVES_AT.get(codec, (0, 2) if CODECS[codec].affine else (0,)) if finite else ():
        halves = blocks[..., at : at + 2].copy().view(np.uint16)
        halves[(halves & 0x7C00) == 0x7C00] &= 0x83FF  # what is left is zero or subnormal
        blocks[..., at : at + 2] = halves.view(np.uint8)
    return torch.from_numpy(blocks)


def bits(values: np.ndarray | Tensor) -> np.ndarray:
    return np.asarray(values).view(np.uint32)


def packed(blocks: Tensor, codec: str) -> QuantizedWeight:
    return QuantizedWeight(codec, (blocks.shape[0], blocks.shape[1] * 32), blocks)


@codecs
@given(weight=weights())
@settings(max_examples=40, deadline=None)
def test_encode_equals_gguf_byte_for_byte(codec: str, weight: np.ndarray) -> None:
    ours = encode(torch.from_numpy(weight), codec)
    assert ours.shape == weight.shape
    np.testing.assert_array_equal(ours.blocks.reshape(weight.shape[0], -1).numpy(), reference(weight, codec))


@codecs
@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 5)), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_decode_equals_gguf_bit_for_bit(codec: str, shape: tuple[int, int], seed: int) -> None:
    """On random bytes: scales of either sign, subnormal and zero, every code."""
    blocks = random_blocks(codec, *shape, seed)
    expected = dequantize(blocks.reshape(shape[0], -1).numpy(), GGMLQuantizationType[codec])
    np.testing.assert_array_equal(bits(packed(blocks, codec).decode()), bits(expected))


@codecs
def test_encode_keeps_the_sign_of_the_peak_and_the_first_of_equals(codec: str) -> None:
    rows = torch.zeros(4, 32)
    rows[0, 3], rows[0, 7] = 2.0, -2.0
    rows[1, 3], rows[1, 7] = -2.0, 2.0
    rows[2] = torch.arange(32.0)
    rows[3] = -torch.arange(32.0)
    np.testing.assert_array_equal(encode(rows, codec).blocks.flatten(1).numpy(), reference(rows.numpy(), codec))


@codecs
def test_encode_at_the_edges_of_rounding(codec: str) -> None:
    """Just below, at and above every half step; Q8_0 rounds as C's roundf does, away from zero only from 0.5 on."""
    form = CODECS[codec]
    top = (1 << form.bits) - 1 if form.affine else form.zero or 127
    edges = np.arange(top, dtype=np.float32)[:, None] + np.float32(0.5)
    near = [np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, np.float32(top))]
    # an entry that makes the step 1: the highest code's, or the most negative's where that is the peak's
    peak = np.full((top, 1), -top if form.zero else top, np.float32)
    below = [] if form.affine else [-n for n in near]
    columns = [peak, *near, *below]
    weight = np.concatenate([*columns, np.zeros((top, 32 - len(columns)), np.float32)], 1)
    assert (form.scale(encode(torch.from_numpy(weight), codec).blocks) == 1).all()
    np.testing.assert_array_equal(
        encode(torch.from_numpy(weight), codec).blocks.flatten(1).numpy(), reference(weight, codec)
    )


@codecs
def test_encoding_what_was_decoded_loses_little(codec: str) -> None:
    """Half a step at most, of steps as large as the group's range or peak divided by the codes."""
    weight = torch.randn(64, 128)
    groups = weight.unflatten(1, (-1, 32))
    form = CODECS[codec]
    span = groups.amax(-1) - groups.amin(-1) if form.affine else groups.abs().amax(-1)
    step = span / ({4: 15, 5: 31}[form.bits] if form.affine else {4: 8, 5: 16, 8: 127}[form.bits])
    error = (encode(weight, codec).decode() - weight).unflatten(1, (-1, 32)).abs().amax(-1)
    # a symmetric format lacks the code opposite to the peak's: that entry may be off by a whole step;
    # and the scale is rounded to 11 bits, which the highest code multiplies
    allowed = (0.5 if form.affine or form.bits == 8 else 1.0) + (1 << form.bits) * 2.0**-11
    assert (error <= step * allowed).all()


@codecs
def test_assemble_inverts_the_parts(codec: str) -> None:
    blocks = random_blocks(codec, 7, 3, seed=5)
    form = CODECS[codec]
    np.testing.assert_array_equal(
        form.assemble(form.scale(blocks), form.offset(blocks), form.codes(blocks)).numpy(), blocks.numpy()
    )


@codecs
def test_sizes_equal_ggmls(codec: str) -> None:
    from gguf.constants import GGML_QUANT_SIZES

    form = CODECS[codec]
    assert (form.group_size, form.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[codec]]
    assert form.ggml_type == GGMLQuantizationType[codec].value
    assert form.bits_per_weight == form.block_bytes / 4
    assert encode(torch.randn(3, 64), codec).nbytes == 3 * 2 * form.block_bytes


# offsets


@pytest.mark.parametrize("codec", AFFINE)
def test_with_offset_touches_only_the_offset(codec: str) -> None:
    blocks = random_blocks(codec, 6, 3, seed=1)
    before = blocks.clone()
    offset = torch.randn(6, 3).half().float()
    changed = CODECS[codec].with_offset(blocks, offset)
    np.testing.assert_array_equal(blocks.numpy(), before.numpy())
    np.testing.assert_array_equal(changed[..., :2].numpy(), before[..., :2].numpy())
    np.testing.assert_array_equal(changed[..., 4:].numpy(), before[..., 4:].numpy())
    np.testing.assert_array_equal(CODECS[codec].offset(changed).numpy(), offset.numpy())


@pytest.mark.parametrize("codec", AFFINE)
def test_the_stored_offset_put_back_gives_the_same_bytes(codec: str) -> None:
    """A zero update leaves the file as it was, also where an offset is -0.0."""
    blocks = random_blocks(codec, 6, 3, seed=1)
    blocks[0, 0, 2:4] = torch.tensor([0x00, 0x80], dtype=torch.uint8)  # -0.0
    form = CODECS[codec]
    for update in (torch.zeros(6, 3), torch.zeros(6, 3, requires_grad=True)):
        rounded = form.move_offset(form.offset(blocks), update).detach()
        np.testing.assert_array_equal(form.with_offset(blocks, rounded).numpy(), blocks.numpy())


@pytest.mark.parametrize("codec", AFFINE)
def test_a_folded_offset_decodes_to_the_weights_of_the_forward_pass(codec: str) -> None:
    """Decoding with an offset handed in equals decoding the bytes into which it was written."""
    blocks = random_blocks(codec, 6, 3, seed=2)
    form = CODECS[codec]
    offset = form.move_offset(form.offset(blocks), 0.01 * torch.randn(6, 3))
    for dtype in (torch.float32, torch.bfloat16):
        handed = packed(blocks, codec).decode(dtype, offset)
        written = packed(form.with_offset(blocks, offset), codec).decode(dtype)
        assert torch.equal(handed, written)


@pytest.mark.parametrize("codec", [name for name in PLAIN if name not in AFFINE])
def test_with_offset_refuses_a_format_without_one(codec: str) -> None:
    with pytest.raises(ValueError, match=codec):
        CODECS[codec].with_offset(random_blocks(codec, 2, 2, seed=0), torch.zeros(2, 2))


@pytest.mark.parametrize("codec", AFFINE)
@given(values=hnp.arrays(np.float32, 9, elements=st.floats(-60000, 60000, width=32)))
@settings(max_examples=50, deadline=None)
def test_move_offset_rounds_to_what_is_stored_and_passes_gradients_through(codec: str, values: np.ndarray) -> None:
    update = torch.from_numpy(values).requires_grad_(True)
    stored = torch.linspace(-1, 1, 9).half().float()
    moved = CODECS[codec].move_offset(stored, update)
    sums = (stored.numpy() + values).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(moved.detach().numpy(), np.where(values == 0, stored.numpy(), sums))
    weights = torch.arange(9.0)
    (moved * weights).sum().backward()
    assert torch.equal(update.grad, weights)  # also where the update is zero: training starts there
    assert torch.equal(CODECS[codec].move_offset(stored, update.detach()), moved)


# promotion


@pytest.mark.parametrize("codec", SYMMETRIC)
@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 5)), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_promotion_changes_no_weight(codec: str, shape: tuple[int, int], seed: int) -> None:
    """Values compare equal; a zero may change its sign."""
    blocks = random_blocks(codec, *shape, seed)
    limit = 65504 / CODECS[codec].zero
    blocks[CODECS[codec].scale(blocks).abs() > limit] = 0
    weight = packed(blocks, codec)
    promoted = promote(weight)
    assert promoted.codec == CODECS[codec].promotes_to
    assert promoted.shape == weight.shape
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(promoted.decode(dtype), weight.decode(dtype))
    before, after = CODECS[codec], CODECS[promoted.codec]
    assert torch.equal(after.codes(promoted.blocks), before.codes(blocks))
    np.testing.assert_array_equal(promoted.blocks[..., :2].numpy(), blocks[..., :2].numpy())


def with_scale(codec: str, scale: float) -> QuantizedWeight:
    form = CODECS[codec]
    codes = torch.arange(32).expand(2, 1, 32) % (1 << form.bits)
    return packed(form.assemble(torch.full((2, 1), scale), torch.zeros(2, 1), codes), codec)


@pytest.mark.parametrize("codec", SYMMETRIC)
@pytest.mark.parametrize("sign", [1, -1])
def test_promotion_refuses_what_would_overflow(codec: str, sign: int) -> None:
    limit = 65504 // CODECS[codec].zero
    fits = with_scale(codec, sign * limit)
    assert torch.equal(promote(fits).decode(), fits.decode())
    too_large = sign * float(np.nextafter(np.float16(limit), np.float16(np.inf)))
    with pytest.raises(ValueError, match=str(limit)):
        promote(with_scale(codec, too_large))


@pytest.mark.parametrize("codec", SYMMETRIC)
@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_promotion_refuses_scales_that_are_not_finite(codec: str, scale: float) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        promote(with_scale(codec, scale))


@pytest.mark.parametrize("codec", [name for name in PLAIN if name not in SYMMETRIC])
def test_promotion_refuses_formats_without_a_counterpart(codec: str) -> None:
    with pytest.raises(ValueError, match=codec):
        promote(encode(torch.randn(2, 32), codec))


# QuantizedWeight


@codecs
def test_rows_are_decoded_rows(codec: str) -> None:
    weight = encode(torch.randn(9, 96), codec)
    index = torch.tensor([3, 3, 0, 8])
    rows = weight.rows(index)
    assert rows.shape == (4, 96)
    assert torch.equal(rows.decode(), weight.decode()[index])


@codecs
def test_other_dtypes_are_the_float32_weights_rounded_once(codec: str) -> None:
    weight = encode(torch.randn(5, 64), codec)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(weight.decode(dtype), weight.decode().to(dtype))


@codecs
def test_encode_refuses_weights_that_are_not_finite(codec: str) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.randn(2, 64)
        weight[1, 40] = bad
        with pytest.raises(ValueError):  # noqa: PT011
            encode(weight, codec)
