"""Products on matrix tiles against float64: what they round to, whatever the number of rows and the rank."""

from __future__ import annotations

import pytest
import torch

from lorafold.kernels import products, tiles
from lorafold.quant.linear import cross, multiply

pytestmark = pytest.mark.skipif(not tiles.supported(), reason="a processor with matrix tiles")


@pytest.mark.parametrize("rank", [0, 1, 8, 32, 40])
@pytest.mark.parametrize("rows", [64, 96, 1000])
@pytest.mark.parametrize("transposed", [True, False])
def test_products_with_a_branch(rows: int, rank: int, transposed: bool) -> None:
    torch.manual_seed(0)
    wide, narrow = 160, 352
    x = torch.randn(rows, wide).bfloat16()
    weight = torch.randn(narrow, wide).bfloat16()
    e, f = torch.randn(rows, rank).bfloat16(), torch.randn(narrow, rank).bfloat16().float()
    wanted = x.double() @ weight.double().t() + 2.0 * e.double() @ f.double().t()
    if not transposed:
        weight, f = weight.t().contiguous(), f.t().contiguous()
    assert products.usable(x, weight)
    result = multiply(x, weight, transposed, (e, f, 2.0) if rank else None)
    # rounded once, to 8 bits, after sums of up to 200 products of about 1 in float32
    torch.testing.assert_close(result.double(), wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("wide", "narrow"), [(9600, 160), (256, 32)], ids=["in pieces", "rows shared"])
@pytest.mark.parametrize("transposed", [True, False])
def test_products_too_large_for_a_cache_or_too_narrow_for_two(wide: int, narrow: int, transposed: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(96, wide).bfloat16(), torch.randn(narrow, wide).bfloat16()
    wanted, threads = x.double() @ weight.double().t(), torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            result = multiply(x, weight if transposed else weight.t().contiguous(), transposed)
            torch.testing.assert_close(result.double(), wanted, rtol=2**-8, atol=wide**0.5 * 1e-4)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("narrow", [1, 8, 16, 48])
@pytest.mark.parametrize("rows", [64, 96, 1000, 1024])
def test_sums_over_rows(rows: int, narrow: int) -> None:
    torch.manual_seed(0)
    p, d = torch.randn(rows, narrow).bfloat16(), torch.randn(rows, 352).bfloat16()
    wanted = p.double().t() @ d.double()
    assert products.crosses(p, d)
    torch.testing.assert_close(cross(p, d).double(), wanted, rtol=1e-5, atol=1e-4)  # float32 sums of 1,024 products


def test_a_branch_without_tiles() -> None:
    """Float32 goes to torch's library."""
    x, weight, e, f = (torch.randn(70, n) for n in (64, 64, 8, 8))
    assert not products.usable(x, weight)
    torch.testing.assert_close(multiply(x, weight, True, (e, f, 0.5)), x @ weight.t() + 0.5 * e @ f.t())
