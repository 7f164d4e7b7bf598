"""The Triton kernel against torch operations: the same bits, in float32, bfloat16 and float16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafold.quant import gpu
from lorafold.quant.codecs import CODECS
from lorafold.quant.weight import QuantizedWeight, encode
from tests.gpu import INTERPRETED, bfloat16_rounded, devices  # noqa: F401 (a fixture)
from tests.quant.test_ggml import HALVES_AT, random_blocks

pytestmark = [
    pytest.mark.usefixtures("bfloat16_rounded"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy, of infinities
]
codecs = pytest.mark.parametrize("codec", sorted(name for name in CODECS if name not in ("INT8", "NF4-DQ")))
ONE_OF_A_KIND = ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "NF4", "MLX3-G64-BF16"]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def same_bits(actual: Tensor, expected: Tensor) -> None:
    integer = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.cpu().view(integer), expected.view(integer))


def blocks_of(codec: str, rows: int, blocks: int, seed: int = 0) -> Tensor:
    """Random bytes with finite parameters; codes of the size that a quantizer makes where parameters are wide."""
    form = CODECS[codec]
    if codec.startswith(("MLX", "NF4")):
        generator = torch.Generator().manual_seed(seed)
        return encode(torch.randn(rows, blocks * form.block_weights, generator=generator), codec).blocks
    return random_blocks(codec, rows, blocks, seed)


def reference(codec: str, blocks: Tensor, dtype: torch.dtype, offset: Tensor | None, scale: Tensor | None) -> Tensor:
    form = CODECS[codec]
    scale, offset = form.scale(blocks) if scale is None else scale, form.offset(blocks) if offset is None else offset
    return form.decode_reference(blocks, scale, offset, dtype)


@devices
@codecs
@dtypes
def test_decoded_bits_are_those_of_torch(codec: str, dtype: torch.dtype, device: str) -> None:
    """Of every format; rows and blocks fill a tile of the kernel, or a part of one."""
    for rows, count in ((1, 1), (5, 3), (3, 47 if CODECS[codec].block_weights == 32 else 11)):
        blocks = blocks_of(codec, rows, count)
        actual = gpu.decode(CODECS[codec], blocks.to(device), dtype)
        same_bits(actual, reference(codec, blocks, dtype, None, None))


@devices
@pytest.mark.parametrize("codec", ONE_OF_A_KIND)
@pytest.mark.parametrize("given", ["offset", "scale", "both"])
def test_offsets_and_scales_may_be_given(codec: str, given: str, device: str) -> None:
    """As trained: neither contiguous nor detached."""
    form, blocks = CODECS[codec], blocks_of(codec, 5, 3)
    groups = 3 * form.block_weights // form.group_size
    offset, scale = (torch.randn(groups, 5).T.requires_grad_(True) for _ in range(2))
    offset, scale = offset if given != "scale" else None, scale if given != "offset" else None
    there = [None if x is None else x.to(device) for x in (offset, scale)]
    actual = gpu.decode(form, blocks.to(device), torch.bfloat16, *there)
    same_bits(actual, reference(codec, blocks, torch.bfloat16, offset, scale).detach())


@devices
@dtypes
@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (48, 1088)])
def test_double_quantized_magnitudes(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    weight = encode(torch.randn(shape), "NF4-DQ")
    assert weight.extra is not None
    scale = weight.format.nested_scale(weight.blocks, weight.extra)  # type: ignore[attr-defined]
    actual = gpu.decode(weight.format, weight.blocks.to(device), dtype, None, scale.to(device))
    same_bits(actual, weight.format.decode_reference(weight.blocks, scale, torch.full_like(scale, -0.0), dtype))


@devices
@dtypes
@pytest.mark.parametrize("shape", [(1, 4), (3, 68), (2, 4100)])
def test_eight_bits_with_a_scale_for_each_row(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    blocks = encode(torch.randn(shape), "INT8").blocks
    actual = gpu.decode(CODECS["INT8"], blocks.to(device), dtype)
    same_bits(actual, reference("INT8", blocks, dtype, None, None))


@devices
@pytest.mark.parametrize("codec", ONE_OF_A_KIND)
def test_strided_and_empty_blocks(codec: str, device: str) -> None:
    blocks = blocks_of(codec, 6, 4)
    for view in (blocks[::2], blocks[:, 1:3], blocks[:0], blocks.flip(0)):
        actual = gpu.decode(CODECS[codec], view.to(device), torch.float32)
        same_bits(actual, reference(codec, view.contiguous(), torch.float32, None, None))


@devices
@pytest.mark.parametrize("codec", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "Q2_K"])
@dtypes
def test_infinities_and_nans_stay_what_they_are(codec: str, dtype: torch.dtype, device: str) -> None:
    blocks = blocks_of(codec, 4, 2)
    at = HALVES_AT.get(codec, (0,))[0]
    for row, half in enumerate((0x7C00, 0xFC00, 0x7FFF, 0xFE01)):
        blocks[row, 0, at : at + 2] = torch.tensor([half & 255, half >> 8], dtype=torch.uint8)
    actual = gpu.decode(CODECS[codec], blocks.to(device), dtype).cpu()
    torch.testing.assert_close(actual, reference(codec, blocks, dtype, None, None), rtol=0, atol=0, equal_nan=True)


def test_other_types_and_devices_go_elsewhere() -> None:
    blocks = blocks_of("Q4_1", 2, 2)
    assert not gpu.usable(blocks, torch.bfloat16)
    assert not gpu.usable(blocks.to("meta"), torch.float32)


@pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here")
def test_packed_weights_on_a_gpu_decode_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatch, with the interpreter in the place of a GPU: float16 is what the CPU's kernels do not make."""
    weight = QuantizedWeight("Q4_1", (5, 96), blocks_of("Q4_1", 5, 3))
    decoded = []
    kernel = gpu.decode
    monkeypatch.setattr(gpu, "usable", lambda *_: True)
    monkeypatch.setattr(gpu, "decode", lambda *arguments: decoded.append(kernel(*arguments)) or decoded[-1])
    for dtype in (torch.float16, torch.bfloat16):
        same_bits(weight.decode(dtype), reference("Q4_1", weight.blocks, dtype, None, None))
    assert len(decoded) == 2
