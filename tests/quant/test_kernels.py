"""The CPU kernels against torch operations: the same bits, in float32 and bfloat16."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
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
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = CODECS[codec].decode(blocks, dtype)
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        same_bits(CODECS[codec].decode(blocks, dtype), one)
    finally:
        numba.set_num_threads(before)


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


VECTORS = ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "NF4", "NF4-DQ", "MLX4-G32-F32", "MLX4-G128-BF16"]


@dtypes
@pytest.mark.parametrize("permutes", [True, False])
@pytest.mark.parametrize("codec", VECTORS)
def test_vectors_and_loops_decode_the_same(
    codec: str, permutes: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random codes with scales and offsets of all sizes, among them what is not a number or no number."""
    form = CODECS[codec]
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (7, 6, form.block_bytes), dtype=torch.uint8, generator=generator)
    groups = 6 * form.block_weights // form.group_size
    scale, offset = ((torch.randn(7, groups, generator=generator) * 10.0).exp() for _ in range(2))
    offset = -offset if form.affine else torch.full_like(offset, -0.0)
    scale[0, 0], scale[1, 0], scale[2, 0] = torch.nan, torch.inf, 0.0
    able = vectors.permutes() and permutes
    monkeypatch.setattr(vectors, "permutes", lambda: able)
    counts_steps = codec not in ("IQ4_NL", "NF4", "NF4-DQ")
    looked_up = dtype == torch.bfloat16 and able
    assert (vectors.covering(codec, dtype) is not None) == (counts_steps or looked_up)
    by_vectors = kernels.decode(codec, blocks, scale, offset, dtype)
    monkeypatch.setattr(vectors, "covering", lambda *_: None)
    same_bits(by_vectors, kernels.decode(codec, blocks, scale, offset, dtype))


@pytest.mark.parametrize("setting", [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_ENABLE_AVX": "0"}])
def test_numba_may_compile_for_an_older_processor(setting: dict[str, str]) -> None:
    """As for a cache that several machines share: LLVM is not asked for what that one does not have."""
    code = (
        "import torch; from lorafold.quant.weight import encode; from lorafold.quant import vectors;"
        "w = encode(torch.randn(4, 64), 'Q4_1'); exact = w.decode(torch.float32).bfloat16();"
        "assert not vectors.permutes(); assert torch.equal(w.decode(torch.bfloat16), exact)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | setting, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    assert kernels.reads_scale(codec, dtype)
    exact = form.decode_reference(blocks, form.scale(blocks), nothing, dtype)
    torch.testing.assert_close(form.decode(blocks, dtype, nothing), exact, rtol=0, atol=0, equal_nan=True)
