"""NF4 and 8-bit against bitsandbytes on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafold.quant import kernels
from lorafold.quant.bnb import dynamic_values
from lorafold.quant.weight import QuantizedWeight, encode

functional = pytest.importorskip("bitsandbytes").functional

SHAPES = [(1, 64), (7, 64), (48, 576), (300, 192)]  # 1, 7, 432 and 900 blocks: under, over and far over one nest
shapes = pytest.mark.parametrize("shape", SHAPES)


def _weights(shape: tuple[int, int], kind: str) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.02
    if kind == "heavy tails":
        weight = weight**3
    elif kind == "zeros":
        weight[:, :64] = 0
    elif kind == "tiny":
        weight *= 1e-30
    return weight


kinds = pytest.mark.parametrize("kind", ["normal", "heavy tails", "zeros", "tiny"])


@kinds
@shapes
@pytest.mark.parametrize("nested", [False, True])
def test_nf4_equals_bitsandbytes(shape: tuple[int, int], kind: str, nested: bool) -> None:
    weight = _weights(shape, kind)
    ours = encode(weight, "NF4-DQ" if nested else "NF4")
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    assert torch.equal(ours.blocks[..., ours.format.codes_at :].flatten(), packed.flatten())
    if nested:
        assert torch.equal(ours.blocks[..., 0].flatten(), state.absmax)
        assert ours.extra is not None
        assert torch.equal(ours.extra, torch.cat([state.offset[None], state.state2.absmax]))
    assert torch.equal(ours.decode(), functional.dequantize_4bit(packed, state).view(shape))
    state.dtype = torch.bfloat16
    assert torch.equal(ours.decode(torch.bfloat16), functional.dequantize_4bit(packed, state).view(shape))


@kinds
@shapes
def test_int8_equals_bitsandbytes(shape: tuple[int, int], kind: str) -> None:
    weight = _weights(shape, kind).half()
    ours = encode(weight, "INT8")
    codes, largest, _ = functional.int8_vectorwise_quant(weight)
    nonzero = largest > 0  # a row of zeros is not a number there
    assert torch.equal(ours.format.codes(ours.blocks)[nonzero, 0], codes[nonzero])
    assert torch.equal(ours.decode()[nonzero], functional.int8_vectorwise_dequant(codes, largest)[nonzero])
    assert not ours.decode()[~nonzero].any()


def test_the_table_of_the_second_level() -> None:
    assert torch.equal(dynamic_values(), functional.create_dynamic_map())


@pytest.mark.parametrize("codec", ["NF4", "NF4-DQ"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_torch_agree(codec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = encode(_weights((48, 576), "heavy tails"), codec)
    fast = weight.decode(dtype)
    monkeypatch.setattr(kernels, "usable", lambda *_: False)
    assert torch.equal(weight.decode(dtype), fast)


@pytest.mark.parametrize("codec", ["NF4", "INT8"])
def test_encoding_what_was_decoded_changes_nothing(codec: str) -> None:
    """The codes; 8-bit magnitudes come back within a rounding. With double quantization the magnitudes' mean moves."""
    first = encode(_weights((48, 576), "normal"), codec)
    again = encode(first.decode(), codec)
    assert torch.equal(first.format.codes(again.blocks), first.format.codes(first.blocks))
    torch.testing.assert_close(again.decode(), first.decode(), rtol=1e-6, atol=0)


def test_sizes() -> None:
    """4.5 bits with float32 magnitudes; 4.125 and a little with 8-bit ones; to another device and back."""
    sizes = {codec: encode(_weights((300, 192), "normal"), codec).nbytes * 8 / 57600 for codec in ("NF4", "NF4-DQ")}
    assert sizes["NF4"] == 4.5
    assert 4.125 < sizes["NF4-DQ"] < 4.14
    weight: QuantizedWeight = encode(_weights((7, 64), "normal"), "NF4-DQ")
    assert torch.equal(weight.to("cpu").decode(), weight.decode())


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        encode(torch.full((1, 64), float("inf")), "NF4")
