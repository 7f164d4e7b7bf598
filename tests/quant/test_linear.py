"""Packed layers against dense ones: values and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafold.quant.codecs import CODECS
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.quant.weight import encode, promote

ENCODABLE = {name: codec for name, codec in CODECS.items() if codec.encodes and codec.group_size == 32}
codecs = pytest.mark.parametrize("codec", sorted(ENCODABLE))
affine = pytest.mark.parametrize("codec", [name for name, codec in ENCODABLE.items() if codec.affine])

OUT, GROUPS, WIDTH = 24, 3, 96
RTOL = 2e-6  # float32 sums of 96 and of 35 terms, relative to the largest entry


def close(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Equal within `rtol` of the largest expected entry: rounding errors of a sum follow its terms, not its value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert error < rtol, f"largest error {error:.2e} of the largest entry"


def dense(layer: QuantLinear, x: Tensor, offset: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y, dX and dOffset by autograd through w = scale * code + offset in float64."""
    form, blocks = layer.packed.format, layer.blocks
    x = x.detach().double().requires_grad_(True)
    o = (form.offset(blocks) if offset is None else offset).detach().double().requires_grad_(True)
    codes = form.codes(blocks).double() - form.zero
    weight = (codes * form.scale(blocks).double()[..., None] + o[..., None]).flatten(1)
    y = F.linear(x, weight, None if layer.bias is None else layer.bias.double())
    y.backward(dy.double())
    assert x.grad is not None
    return y.detach(), x.grad, o.grad


@codecs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(7,), (5, 7), (2, 3, 4), (1,), (1, 1)])
def test_forward_and_input_gradient(codec: str, bias: bool, leading: tuple[int, ...]) -> None:
    layer = QuantLinear(encode(torch.randn(OUT, WIDTH), codec), torch.randn(OUT) if bias else None)
    x, dy = torch.randn(*leading, WIDTH, requires_grad=True), torch.randn(*leading, OUT)
    y = layer(x)
    y.backward(dy)
    expected_y, expected_dx, _ = dense(layer, x, None, dy)
    close(y, expected_y, RTOL)
    assert x.grad is not None
    close(x.grad, expected_dx, RTOL)


@affine
@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("leading", [(7,), (5, 7), (1,)])
def test_offset_gradient(codec: str, needs_dx: bool, leading: tuple[int, ...]) -> None:
    layer = QuantLinear(encode(torch.randn(OUT, WIDTH), codec), torch.randn(OUT))
    offset = torch.randn(OUT, GROUPS, requires_grad=True)
    x, dy = torch.randn(*leading, WIDTH, requires_grad=needs_dx), torch.randn(*leading, OUT)
    y = layer(x, offset)
    y.backward(dy)
    expected_y, expected_dx, expected_do = dense(layer, x, offset, dy)
    close(y, expected_y, RTOL)
    assert offset.grad is not None
    assert expected_do is not None
    close(offset.grad, expected_do, RTOL)
    if needs_dx:
        assert x.grad is not None
        close(x.grad, expected_dx, RTOL)


@affine
def test_a_single_vector(codec: str) -> None:
    layer = QuantLinear(encode(torch.randn(OUT, WIDTH), codec))
    offset = torch.randn(OUT, GROUPS, requires_grad=True)
    x, dy = torch.randn(WIDTH, requires_grad=True), torch.randn(OUT)
    layer(x, offset).backward(dy)
    _, dx, do = dense(layer, x[None], offset, dy[None])
    assert x.grad is not None
    assert offset.grad is not None
    assert do is not None
    close(x.grad, dx[0], RTOL)
    close(offset.grad, do, RTOL)


@affine
def test_a_fixed_offset_gets_no_gradient_and_is_used(codec: str) -> None:
    layer = QuantLinear(encode(torch.randn(OUT, WIDTH), codec))
    offset, x, dy = torch.randn(OUT, GROUPS), torch.randn(7, WIDTH, requires_grad=True), torch.randn(7, OUT)
    y = layer(x, offset)
    y.backward(dy)
    expected_y, expected_dx, _ = dense(layer, x, offset, dy)
    close(y, expected_y, RTOL)
    assert x.grad is not None
    close(x.grad, expected_dx, RTOL)
    assert offset.grad is None


@affine
def test_bfloat16_gradients_follow_float32(codec: str) -> None:
    """Weights, inputs, products and pooled sums are rounded to 8 bits each: about 2^-8 of the largest entry a time."""
    layer = QuantLinear(encode(torch.randn(OUT, WIDTH), codec))
    start = CODECS[codec].offset(layer.blocks)
    x, dy = torch.randn(50, WIDTH).bfloat16(), torch.randn(50, OUT).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        offset, inputs = start.clone().requires_grad_(True), x.detach().to(dtype).requires_grad_(True)
        y = layer(inputs, offset)
        y.backward(dy.to(dtype))
        assert y.dtype == dtype
        assert inputs.grad is not None
        assert inputs.grad.dtype == dtype
        assert offset.grad is not None
        assert offset.grad.dtype == torch.float32
        results.append((y.detach(), inputs.grad, offset.grad))
    for full, half in zip(*results, strict=True):
        close(half, full, 0.01)


@affine
def test_of_the_input_only_pooled_sums_are_kept(codec: str) -> None:
    """The reason for the layer's own backward pass: 1/32 of the input and nothing of the weight survives forward."""
    layer = QuantLinear(encode(torch.randn(OUT, WIDTH), codec))
    offset = CODECS[codec].offset(layer.blocks).requires_grad_(True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        layer(torch.randn(7, WIDTH, requires_grad=True), offset)
    assert sum(kept) == 7 * GROUPS + offset.numel()


@pytest.mark.parametrize("codec", ["Q4_0", "Q5_0"])
def test_a_promoted_layer_computes_the_same(codec: str) -> None:
    layer = QuantLinear(encode(torch.randn(OUT, WIDTH), codec))
    x = torch.randn(7, WIDTH)
    before = layer(x)
    layer.packed = promote(layer.packed)
    assert layer.codec == CODECS[codec].promotes_to
    assert torch.equal(layer(x), before)


@codecs
def test_casts_leave_the_blocks_alone(codec: str) -> None:
    layer = QuantLinear(encode(torch.randn(OUT, WIDTH), codec), torch.randn(OUT))
    blocks = layer.blocks.clone()
    layer.to(torch.bfloat16)
    assert layer.blocks.dtype == torch.uint8
    assert torch.equal(layer.blocks, blocks)
    assert layer(torch.randn(2, WIDTH).bfloat16()).dtype == torch.bfloat16
    assert list(layer.parameters()) == []
    assert (layer.in_features, layer.out_features) == (WIDTH, OUT)
    assert codec in repr(layer)


@codecs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 8.0, 64.0**0.5 / 3])
def test_embedding_equals_the_decoded_table(codec: str, dtype: torch.dtype, scale: float) -> None:
    weight = encode(torch.randn(50, WIDTH), codec)
    layer = QuantEmbedding(weight, dtype, scale)
    table = weight.decode(dtype)
    for ids in (torch.randint(50, (4, 6)), torch.randint(50, (1,)), torch.empty(2, 0, dtype=torch.long)):
        expected = F.embedding(ids, table) * torch.tensor(scale, dtype=dtype)
        vectors = layer(ids)
        assert vectors.dtype == dtype
        assert vectors.shape == (*ids.shape, WIDTH)
        assert torch.equal(vectors, expected)


def test_embedding_of_a_single_id() -> None:
    weight = encode(torch.randn(50, WIDTH), "Q4_1")
    assert torch.equal(QuantEmbedding(weight, torch.float32)(torch.tensor(7)), weight.decode()[7])


@pytest.mark.parametrize("token", [50, -1, -100])
def test_embedding_refuses_ids_outside_the_table(token: int) -> None:
    """As nn.Embedding does; -100 is the usual label of an unsupervised token, and must not become a vector."""
    layer = QuantEmbedding(encode(torch.randn(50, WIDTH), "Q4_1"), torch.float32)
    with pytest.raises(IndexError):
        layer(torch.tensor([[1, token]]))
