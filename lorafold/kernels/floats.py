"""Products of small float32 matrices in the compiler's own vectors, for loops of numba kernels: 6 rows by 16 columns at
a time, whose sums stay in registers.
"""

# all addresses and strides are in bytes

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from lorafold.kernels.lanes import FLOAT, FLOATS, LONG, Lanes, State, everywhere, intrinsic, load, store

ROWS = 6


@intrinsic
def _six_rows(typing_context, a, a_row, a_step, b, b_step, length, sums, sums_row, more):  # noqa: ARG001 (numba's protocol)
    """sums[r, :] = sum over k of a[r, k] b[k, :], added to what is there if there is `more`."""

    def generate(_context, builder, _signature, arguments):
        a, a_row, a_step, b, b_step, length, sums, sums_row, more = arguments
        fma = builder.module.declare_intrinsic("llvm.fmuladd.v16f32", fnty=ir.FunctionType(FLOATS, [FLOATS] * 3))
        nothing = ir.Constant(FLOATS, [0.0] * 16)
        totals = [State(builder, 0.0) for _ in range(ROWS)]
        targets = [builder.add(sums, builder.mul(sums_row, LONG(r))) for r in range(ROWS)]
        sources = [builder.add(a, builder.mul(a_row, LONG(r))) for r in range(ROWS)]
        for total, target in zip(totals, targets, strict=True):
            before = load(builder, target, LONG(0))
            total.set(Lanes(builder, builder.select(more, before.value, nothing)))
        with cgutils.for_range(builder, length) as loop:
            step = builder.mul(loop.index, a_step)
            across = load(builder, builder.add(b, builder.mul(loop.index, b_step)), LONG(0))
            for total, source in zip(totals, sources, strict=True):
                number = builder.load(builder.inttoptr(builder.add(source, step), FLOAT.as_pointer()))
                factor = everywhere(builder, number)
                total.set(Lanes(builder, builder.call(fma, [factor.value, across.value, total.get().value])))
        for total, target in zip(totals, targets, strict=True):
            store(builder, total.get(), target, LONG(0))

    return types.void(*[types.intp] * 8, types.boolean), generate


@njit(cache=True)
def product(a, a_row, a_step, m, b, b_step, b_panel, n, k, sums, sums_row, more):
    """sums [m, n] = A B for A [m, k] and B [k, n], or added to what is there; m a multiple of 6, n of 16.

    The next number along k is `a_step` or `b_step` farther, the next row of A `a_row`, 16 columns of B `b_panel`.
    """
    for j in range(n // 16):
        for i in range(0, m, ROWS):
            place = sums + i * sums_row + 64 * j
            _six_rows(a + i * a_row, a_row, a_step, b + j * b_panel, b_step, k, place, sums_row, more)
