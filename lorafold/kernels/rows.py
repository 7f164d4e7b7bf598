"""Passes over one row of numbers, for the loops of numba kernels: bfloat16 where a row is words, float32 between.

Everything takes addresses; lengths are multiples of 16. Where a `kind` is asked for, rows hold numbers of its type:
bfloat16 (a uint16) or float32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from lorafold.kernels.lanes import (
    BITS,
    FLOATS,
    INT,
    LOG2E,
    LONG,
    Lanes,
    State,
    everywhere,
    intrinsic,
    load,
    numbers_of,
    place,
    splat,
    store,
    vectors,
)


def _seen(builder: Any, first: Any, last: Any) -> Any:
    """seen(i): the mask of the lanes of vector i that stand from `first` to `last`."""
    lane = ir.Constant(BITS, list(range(16)))
    low, high = (splat(builder, builder.trunc(x, INT)) for x in (first, last))

    def seen(index: Any) -> Any:
        number = builder.add(splat(builder, builder.trunc(builder.shl(index, LONG(4)), INT)), lane)
        after, before = builder.icmp_signed(">=", number, low), builder.icmp_signed("<=", number, high)
        return builder.and_(after, before)

    return seen


def _put(builder: Any, lanes: Lanes, target: Any) -> None:
    """One number of those that are the same in all lanes."""
    builder.store(builder.extract_element(lanes.value, INT(0)), builder.inttoptr(target, ir.FloatType().as_pointer()))


@intrinsic
def softmax_row(typing_context, kind, row, length, first, last, scale, out, found):  # noqa: ARG001 (numba's protocol)
    """exp(scale * (score - largest)) of float32 scores from `first` to `last`, at `out`; 0 elsewhere.

    Two numbers are found: the largest score, and by what to multiply so that the sum is 1, which is no number if a
    score that is seen is none, or infinite.
    """

    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, row, length, first, last, scale, out, found = arguments
        highest, total, undefined = (State(builder, x) for x in (float("-inf"), 0.0, 0.0))
        seen = _seen(builder, first, last)
        with vectors(builder, length) as i:
            x, mask = load(builder, row, i), seen(i)
            highest.set(highest.get().larger(x.where(mask, float("-inf"))))
            undefined.set(undefined.get() + x.where(mask, 0.0) * 0.0)
        largest = highest.get().over_lanes(Lanes.larger)
        factor = everywhere(builder, scale) * LOG2E
        with vectors(builder, length) as i:
            e = ((load(builder, row, i) - largest) * factor).exp2().where(seen(i), 0.0)
            total.set(total.get() + e)
            numbers.store(builder, e, out, i)
        _put(builder, largest, found)
        _put(builder, 1.0 / (total.get().sum() + undefined.get().sum()), builder.add(found, LONG(4)))

    return types.void(kind, *[types.intp] * 4, types.float32, *[types.intp] * 2), generate


@intrinsic
def softmax_backward_row(typing_context, kind, row, d, length, first, last, scale, largest, inverse, out):  # noqa: ARG001
    """Scores become weights by what was found of them, in place; d, the gradient of these, that of the scores.

    That stands in place, in float32 as all of these, and at `out`.
    """
    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, row, d, length, first, last, scale, largest, inverse, out = arguments
        dot, seen = State(builder, 0.0), _seen(builder, first, last)
        factor, top, share = (everywhere(builder, x) for x in (scale, largest, inverse))
        with vectors(builder, length) as i:
            p = (((load(builder, row, i) - top) * (factor * LOG2E)).exp2() * share).where(seen(i), 0.0)
            store(builder, p, row, i)
            dot.set(dot.get() + p * load(builder, d, i))
        mean = dot.get().sum()
        with vectors(builder, length) as i:
            given = load(builder, row, i) * (load(builder, d, i) - mean) * factor
            store(builder, given, d, i)
            numbers.store(builder, given, out, i)

    return types.void(kind, *[types.intp] * 5, *[types.float32] * 3, types.intp), generate


@intrinsic
def widen_row(typing_context, kind, row, length, out):  # noqa: ARG001 (numba's protocol)
    """Numbers as float32."""
    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, row, length, out = arguments
        with vectors(builder, length) as i:
            store(builder, numbers.load(builder, row, i), out, i)

    return types.void(kind, *[types.intp] * 3), generate


@intrinsic
def scaled_row(typing_context, kind, row, length, factor, out):  # noqa: ARG001 (numba's protocol)
    """float32 numbers times one."""
    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, row, length, factor, out = arguments
        by = everywhere(builder, factor)
        with vectors(builder, length) as i:
            numbers.store(builder, load(builder, row, i) * by, out, i)

    return types.void(kind, types.intp, types.intp, types.float32, types.intp), generate


@intrinsic
def add_row(typing_context, row, length, sums):  # noqa: ARG001 (numba's protocol)
    """float32 numbers are added to others."""

    def generate(_context, builder, _signature, arguments):
        row, length, sums = arguments
        with vectors(builder, length) as i:
            store(builder, load(builder, sums, i) + load(builder, row, i), sums, i)

    return types.void(*[types.intp] * 3), generate


@intrinsic
def rotate_row(typing_context, kind, rotated, row, cos, sin, width, out):  # noqa: ARG001 (numba's protocol)
    """The rotary embedding (arXiv 2104.09864) of a row of one kind, as numbers of the other."""
    given, results = numbers_of(kind), numbers_of(rotated)

    def generate(_context, builder, _signature, arguments):
        _, _, row, cos, sin, width, out = arguments
        half = builder.lshr(width, LONG(5))  # in vectors
        with cgutils.for_range(builder, half) as loop:
            i, j = loop.index, builder.add(loop.index, half)
            x, y = given.load(builder, row, i), given.load(builder, row, j)
            c, s = ([load(builder, table, at) for at in (i, j)] for table in (cos, sin))
            results.store(builder, x * c[0] - y * s[0], out, i)
            results.store(builder, y * c[1] + x * s[1], out, j)

    return types.void(kind, rotated, *[types.intp] * 5), generate


@intrinsic
def clear(typing_context, address, size):  # noqa: ARG001 (numba's protocol)
    """So many bytes become 0, a multiple of 64."""

    def generate(_context, builder, _signature, arguments):
        address, size = arguments
        nothing = Lanes(builder, ir.Constant(FLOATS, [0.0] * 16))
        with vectors(builder, builder.lshr(size, LONG(2))) as i:
            store(builder, nothing, address, i)

    return types.void(types.intp, types.intp), generate


@intrinsic
def copy(typing_context, source, size, out):  # noqa: ARG001 (numba's protocol)
    """So many bytes, a multiple of 64, go elsewhere."""

    def generate(_context, builder, _signature, arguments):
        source, size, out = arguments
        with vectors(builder, builder.lshr(size, LONG(2))) as i:
            value = builder.load(place(builder, source, i, 64, FLOATS), align=2)
            builder.store(value, place(builder, out, i, 64, FLOATS), align=2)

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def swiglu_row(typing_context, kind, gate, up, length, out):  # noqa: ARG001 (numba's protocol)
    """silu(gate) * up."""
    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, gate, up, length, out = arguments
        with vectors(builder, length) as i:
            g = numbers.load(builder, gate, i)
            numbers.store(builder, g * g.sigmoid() * numbers.load(builder, up, i), out, i)

    return types.void(kind, *[types.intp] * 4), generate


@intrinsic
def swiglu_backward_row(typing_context, kind, gate, up, dy, length, d_gate, d_up):  # noqa: ARG001 (numba's protocol)
    """The gradients of silu(gate) * up."""
    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, gate, up, dy, length, d_gate, d_up = arguments
        with vectors(builder, length) as i:
            g, u, d = (numbers.load(builder, x, i) for x in (gate, up, dy))
            s = g.sigmoid()
            numbers.store(builder, d * u * s * (g * (s * -1.0 + 1.0) + 1.0), d_gate, i)
            numbers.store(builder, d * g * s, d_up, i)

    return types.void(kind, *[types.intp] * 6), generate


@intrinsic
def rms_norm_row(typing_context, kind, x, weight, length, eps, out, rstd):  # noqa: ARG001 (numba's protocol)
    """weight * x / rms(x), with the float32 weight; 1 / rms(x) goes to its own place.

    x / rms(x) is rounded before it is multiplied, as transformers does.
    """
    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, x, weight, length, eps, out, rstd = arguments
        squares = State(builder, 0.0)
        with vectors(builder, length) as i:
            value = numbers.load(builder, x, i)
            squares.set(squares.get() + value * value)
        count = everywhere(builder, builder.sitofp(length, ir.FloatType()))
        inverse = 1.0 / (squares.get().sum() / count + everywhere(builder, eps)).sqrt()
        number = builder.extract_element(inverse.value, INT(0))
        builder.store(number, builder.inttoptr(rstd, ir.FloatType().as_pointer()))
        with vectors(builder, length) as i:
            normal = numbers.rounded(numbers.load(builder, x, i) * inverse)
            numbers.store(builder, normal * load(builder, weight, i), out, i)

    return types.void(kind, *[types.intp] * 3, types.float32, types.intp, types.intp), generate


@intrinsic
def rms_norm_backward_row(typing_context, kind, x, weight, rstd, dy, length, dx):  # noqa: ARG001 (numba's protocol)
    """rstd (G - Xhat mean(G Xhat)) with G = dY weight and Xhat = X rstd."""
    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, x, weight, rstd, dy, length, dx = arguments
        inverse, dot = everywhere(builder, rstd), State(builder, 0.0)
        with vectors(builder, length) as i:
            g = numbers.load(builder, dy, i) * load(builder, weight, i)
            dot.set(dot.get() + g * numbers.load(builder, x, i) * inverse)
        mean = dot.get().sum() / everywhere(builder, builder.sitofp(length, ir.FloatType()))
        with vectors(builder, length) as i:
            g = numbers.load(builder, dy, i) * load(builder, weight, i)
            numbers.store(builder, (g - numbers.load(builder, x, i) * inverse * mean) * inverse, dx, i)

    return types.void(kind, types.intp, types.intp, types.float32, *[types.intp] * 3), generate


@intrinsic
def logits_row(typing_context, kind, logits, length, largest):  # noqa: ARG001 (numba's protocol)
    """The largest of some logits, and the sum of exp(logit - largest): two float32 numbers side by side."""
    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, logits, length, largest = arguments
        highest, total = State(builder, float("-inf")), State(builder, 0.0)
        with vectors(builder, length) as i:
            highest.set(highest.get().larger(numbers.load(builder, logits, i)))
        top = highest.get().over_lanes(Lanes.larger)
        with vectors(builder, length) as i:
            total.set(total.get() + ((numbers.load(builder, logits, i) - top) * LOG2E).exp2())
        for n, lanes in enumerate((top, total.get().sum())):
            number = builder.extract_element(lanes.value, INT(0))
            builder.store(number, builder.inttoptr(builder.add(largest, LONG(4 * n)), ir.FloatType().as_pointer()))

    return types.void(kind, *[types.intp] * 3), generate


@intrinsic
def probabilities_row(typing_context, kind, logits, length, largest, total):  # noqa: ARG001 (numba's protocol)
    """exp(logit - largest) / total, in place."""
    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, logits, length, largest, total = arguments
        top, inverse = everywhere(builder, largest), 1.0 / everywhere(builder, total)
        with vectors(builder, length) as i:
            e = ((numbers.load(builder, logits, i) - top) * LOG2E).exp2()
            numbers.store(builder, e * inverse, logits, i)

    return types.void(kind, types.intp, types.intp, types.float32, types.float32), generate


@intrinsic
def pool_row(typing_context, kind, x, length, group, out):  # noqa: ARG001 (numba's protocol)
    """The sums of each `group` numbers that follow one another."""
    numbers = numbers_of(kind)

    def generate(_context, builder, _signature, arguments):
        _, x, length, group, out = arguments
        size = builder.lshr(group, LONG(4))
        with cgutils.for_range(builder, builder.udiv(length, group)) as outer:
            total = State(builder, 0.0)
            with cgutils.for_range(builder, size) as inner:
                at = builder.add(builder.mul(outer.index, size), inner.index)
                total.set(total.get() + numbers.load(builder, x, at))
            numbers.store_one(builder, total.get().sum(), out, outer.index)

    return types.void(kind, *[types.intp] * 4), generate
