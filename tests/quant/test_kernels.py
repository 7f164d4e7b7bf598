"""The CPU kernels against torch operations: the same bits, in float32 and bfloat16."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafold.quant import kernels, vectors
from lorafold.quant.codecs import CODECS, GGUF_CODECS
from tests.quant.test_ggml import HALVES_AT, random_blocks

codecs = pytest.mark.parametrize("codec", sorted(GGUF_CODECS))  # test_mlx.py has the others
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def both(codec: str, blocks: Tensor, dtype: torch.dtype, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(kernel, torch operations)."""
    form = CODECS[codec]
    assert kernels.usable("Q4_1", blocks, dtype)
    stored = form.offset(blocks) if offset is None else offset
    return form.decode(blocks, dtype, offset), form.decode_reference(blocks, form.scale(blocks), stored, dtype)


def same_bits(a: Tensor, b: Tensor) -> None:
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(integer).numpy(), b.view(integer).numpy())


@codecs
@dtypes
@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 5)), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_kernels_equal_torch_bit_for_bit(codec: str, dtype: torch.dtype, shape: tuple[int, int], seed: int) -> None:
    blocks = random_blocks(codec, *shape, seed)
    same_bits(*both(codec, blocks, dtype))


@codecs
@dtypes
def test_kernels_take_an_offset(codec: str, dtype: torch.dtype) -> None:
    groups = 3 * CODECS[codec].block_weights // CODECS[codec].group_size
    offset = torch.randn(groups, 6).T.requires_grad_(True)  # neither contiguous nor detached
    kernel, reference = both(codec, random_blocks(codec, 6, 3, seed=0), dtype, offset)
    same_bits(kernel, reference.detach())


@codecs
@dtypes
def test_any_number_of_threads_gives_the_same(codec: str, dtype: torch.dtype) -> None:
    blocks = random_blocks(codec, 257, 3, seed=0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = CODECS[codec].decode(blocks, dtype)
        torch.set_num_threads(2)
        same_bits(CODECS[codec].decode(blocks, dtype), one)
    finally:
        torch.set_num_threads(before)


@codecs
@dtypes
def test_strided_and_empty_blocks(codec: str, dtype: torch.dtype) -> None:
    blocks = random_blocks(codec, 8, 4, seed=0)
    for view in (blocks[::2], blocks[:, 1:3], blocks[:0], blocks[3:4]):
        same_bits(*both(codec, view, dtype))


@codecs
@dtypes
def test_infinities_and_nans_stay_what_they_are(codec: str, dtype: torch.dtype) -> None:
    """Parameters of a damaged file: a weight must not turn into a number because its NaN has a long payload."""
    blocks = random_blocks(codec, 4, 2, seed=0)
    at = HALVES_AT.get(codec, (0,))[0]
    for row, half in enumerate((0x7C00, 0xFC00, 0x7FFF, 0xFE01)):
        blocks[row, 0, at : at + 2] = torch.tensor([half & 255, half >> 8], dtype=torch.uint8)
    kernel, reference = both(codec, blocks, dtype)
    torch.testing.assert_close(kernel, reference, rtol=0, atol=0, equal_nan=True)


def test_other_cases_go_to_torch() -> None:
    blocks = random_blocks("Q4_1", 2, 2, seed=0)
    assert not kernels.usable("Q4_1", blocks, torch.float16)
    assert not kernels.usable("Q4_1", blocks.to("meta"), torch.float32)


EVERY = [*sorted(GGUF_CODECS), "NF4", "NF4-DQ", "MLX4-G32-F32", "MLX4-G128-BF16"]
EVERY += [f"MLX{bits}-G64-F16" for bits in (2, 3, 5, 6, 8)]


@dtypes
@pytest.mark.parametrize("codec", EVERY)
def test_scales_of_all_sizes(codec: str, dtype: torch.dtype) -> None:
    """Random codes with scales and offsets among which are some that are not a number, or no number."""
    form = CODECS[codec]
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (7, 6, form.block_bytes), dtype=torch.uint8, generator=generator)
    groups = 6 * form.block_weights // form.group_size
    scale, offset = ((torch.randn(7, groups, generator=generator) * 10.0).exp() for _ in range(2))
    offset = -offset if form.affine else torch.full_like(offset, -0.0)
    scale[0, 0], scale[1, 0], scale[2, 0] = torch.nan, torch.inf, 0.0
    kernel = kernels.decode(codec, blocks, scale, offset, dtype)
    reference = form.decode_reference(blocks, scale, offset, dtype)
    assert torch.equal(kernel.isnan(), reference.isnan())
    same_bits(*(torch.where(reference.isnan(), 0, decoded) for decoded in (kernel, reference)))


OLDER = """
import sys, torch
from lorafold.quant import kernels, vectors
from lorafold.quant.codecs import CODECS
for codec in sys.argv[1:]:
    form, generator = CODECS[codec], torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (5, 2, form.block_bytes), dtype=torch.uint8, generator=generator)
    scale, offset = torch.randn(2, 5, 2 * form.block_weights // form.group_size, generator=generator)
    offset = offset if form.affine else torch.full_like(offset, -0.0)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(
            kernels.decode(codec, blocks, scale, offset, dtype), form.decode_reference(blocks, scale, offset, dtype)
        ), codec
print(*(feature for feature in ("avx2", "avx512f", "avx512bw") if vectors.has(feature)))
"""


HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
with_avx2 = pytest.mark.skipif(not vectors.has("avx2"), reason="no AVX2")


@pytest.mark.parametrize(
    ("setting", "has"),
    [
        ({"NUMBA_CPU_NAME": "generic"}, ""),
        ({"NUMBA_ENABLE_AVX": "0"}, ""),
        pytest.param(HASWELL, "avx2", marks=with_avx2),
    ],
)
def test_numba_may_compile_for_an_older_processor(setting: dict[str, str], has: str) -> None:
    """As for a cache that several machines share: LLVM is not asked for what that one does not have."""
    codecs = ["Q4_1", "Q5_0", "Q6_K", "IQ4_NL", "NF4", "MLX3-G32-F16"]
    command = [sys.executable, "-c", OLDER, *codecs]
    done = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == has


def test_blocks_that_are_not_contiguous() -> None:
    blocks = random_blocks("Q4_1", 4, 6, seed=0)
    for part in (blocks[:, ::2], blocks.transpose(0, 1), torch.cat([blocks, blocks], 2)[..., :20]):
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(CODECS["Q4_1"].decode(part, dtype), CODECS["Q4_1"].decode(part.contiguous(), dtype))


@dtypes
@pytest.mark.parametrize("codec", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_scales_are_read_out_of_blocks(codec: str, dtype: torch.dtype) -> None:
    """Every number that a float16 can be, with codes of ones and an offset of zero."""
    form = CODECS[codec]
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 1, 2)
    rest = torch.full((1 << 16, 1, form.block_bytes - 2), 0xFF, dtype=torch.uint8)
    blocks, nothing = torch.cat([halves, rest], -1), torch.zeros(1 << 16, 1)
    assert kernels.reads_scale(codec)
    exact = form.decode_reference(blocks, form.scale(blocks), nothing, dtype)
    torch.testing.assert_close(form.decode(blocks, dtype, nothing), exact, rtol=0, atol=0, equal_nan=True)
