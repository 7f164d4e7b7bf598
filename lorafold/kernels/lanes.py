"""Code for 16 float32 numbers at a time, in the compiler's own vectors: for loops it does not vectorize itself.

It runs on every processor; where vectors are shorter, the compiler takes several.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic  # what it makes is called without the typing context, which a checker cannot know
LOG2E = 1.4426950408889634
FLOATS, BITS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
WORDS = ir.VectorType(ir.IntType(16), 16)
LONG, INT, WORD, FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
# the Taylor series of exp(f ln 2) for f in [-1/2, 1/2], the highest power first
_SERIES = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)


class Lanes:
    """16 float32 numbers while code is generated: arithmetic on them adds instructions."""

    def __init__(self, builder: Any, value: Any):
        self.builder = builder
        self.value = value

    def _like(self, other: Any) -> Any:
        return other.value if isinstance(other, Lanes) else ir.Constant(FLOATS, [float(other)] * 16)

    def __add__(self, other: Any) -> Lanes:
        return Lanes(self.builder, self.builder.fadd(self.value, self._like(other), ("contract",)))

    def __sub__(self, other: Any) -> Lanes:
        return Lanes(self.builder, self.builder.fsub(self.value, self._like(other), ("contract",)))

    def __mul__(self, other: Any) -> Lanes:
        return Lanes(self.builder, self.builder.fmul(self.value, self._like(other), ("contract",)))

    def __rtruediv__(self, other: Any) -> Lanes:
        return Lanes(self.builder, self.builder.fdiv(self._like(other), self.value))

    def sqrt(self) -> Lanes:
        """The square root."""
        root = self.builder.module.declare_intrinsic("llvm.sqrt.v16f32", fnty=ir.FunctionType(FLOATS, [FLOATS]))
        return Lanes(self.builder, self.builder.call(root, [self.value]))

    def __truediv__(self, other: Any) -> Lanes:
        return Lanes(self.builder, self.builder.fdiv(self.value, self._like(other)))

    def larger(self, other: Any) -> Lanes:
        """The larger of both, this one if either is not a number."""
        b, other = self.builder, self._like(other)
        return Lanes(b, b.select(b.fcmp_ordered("<", self.value, other), other, self.value))

    def smaller(self, other: Any) -> Lanes:
        """The smaller of both, this one if either is not a number."""
        b, other = self.builder, self._like(other)
        return Lanes(b, b.select(b.fcmp_ordered(">", self.value, other), other, self.value))

    def where(self, mask: Any, otherwise: float) -> Lanes:
        """These numbers where the mask is set, another elsewhere."""
        return Lanes(self.builder, self.builder.select(mask, self.value, self._like(otherwise)))

    def exp2(self) -> Lanes:
        """2^x, and 2^-126 for all that is smaller; relative error below 3e-7; x below 127; NaN stays NaN."""
        b, x = self.builder, self.larger(-126.0)
        floor = b.module.declare_intrinsic("llvm.floor.v16f32", fnty=ir.FunctionType(FLOATS, [FLOATS]))
        whole = Lanes(b, b.call(floor, [(x + 0.5).value]))
        f, p = x - whole, Lanes(b, self._like(_SERIES[0]))
        for factor in _SERIES[1:]:
            p = p * f + factor
        power = b.shl(b.add(b.fptosi(whole.value, BITS), _numbers(127)), _numbers(23))
        return p * Lanes(b, b.bitcast(power, FLOATS))

    def over_lanes(self, combine: Callable[[Lanes, Lanes], Lanes]) -> Lanes:
        """All lanes combined, in every lane."""
        here = self
        for step in (8, 4, 2, 1):
            turned = ir.Constant(BITS, [lane ^ step for lane in range(16)])
            here = combine(here, Lanes(self.builder, self.builder.shuffle_vector(here.value, here.value, turned)))
        return here

    def sum(self) -> Lanes:
        """The sum over the lanes, in every lane."""
        return self.over_lanes(Lanes.__add__)

    def sigmoid(self) -> Lanes:
        """1 / (1 + exp(-x)), and 0 where the exponential leaves the range of a float32."""
        power = self * -LOG2E
        within = self.builder.fcmp_unordered("<=", power.value, self._like(126.0))
        return (1.0 / (power.exp2() + 1.0)).where(within, 0.0)

    def rounded(self) -> Lanes:
        """Rounded to bfloat16, as float32."""
        b = self.builder
        return Lanes(b, b.bitcast(b.shl(b.zext(self.round(), BITS), _numbers(16)), FLOATS))

    def round(self) -> Any:
        """As bfloat16 words: nearest, ties to even; what is not a number stays so."""
        b = self.builder
        bits = b.bitcast(self.value, BITS)
        bits = b.select(b.fcmp_unordered("uno", self.value, self.value), _numbers(0x7FC00000), bits)
        odd = b.and_(b.lshr(bits, _numbers(16)), _numbers(1))
        return b.trunc(b.lshr(b.add(bits, b.add(odd, _numbers(0x7FFF))), _numbers(16)), WORDS)


def _numbers(value: int) -> Any:
    return ir.Constant(BITS, [value] * 16)


def splat(builder: Any, number: Any, lanes: int = 16) -> Any:
    """A vector of one number of any type."""
    kind = ir.VectorType(number.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def everywhere(builder: Any, number: Any) -> Lanes:
    """One float32 number in all lanes."""
    return Lanes(builder, splat(builder, number))


def place(builder: Any, address: Any, index: Any, size: int, kind: Any) -> Any:
    """A pointer to vector `index` of those that begin at an address, each of `size` bytes."""
    return builder.inttoptr(builder.add(address, builder.mul(index, LONG(size))), kind.as_pointer())


def load(builder: Any, address: Any, index: Any) -> Lanes:
    """16 float32 numbers."""
    return Lanes(builder, builder.load(place(builder, address, index, 64, FLOATS), align=4))


def load_words(builder: Any, address: Any, index: Any) -> Lanes:
    """16 bfloat16 numbers, anywhere."""
    words = builder.zext(builder.load(place(builder, address, index, 32, WORDS), align=2), BITS)
    return Lanes(builder, builder.bitcast(builder.shl(words, _numbers(16)), FLOATS))


def store(builder: Any, lanes: Lanes, address: Any, index: Any) -> None:
    """16 float32 numbers."""
    builder.store(lanes.value, place(builder, address, index, 64, FLOATS), align=4)


def store_words(builder: Any, lanes: Lanes, address: Any, index: Any) -> None:
    """16 numbers as bfloat16, anywhere."""
    builder.store(lanes.round(), place(builder, address, index, 32, WORDS), align=2)


def _store_word(builder: Any, lanes: Lanes, address: Any, index: Any) -> None:
    builder.store(builder.extract_element(lanes.round(), INT(0)), place(builder, address, index, 2, WORD))


def _store_float(builder: Any, lanes: Lanes, address: Any, index: Any) -> None:
    builder.store(builder.extract_element(lanes.value, INT(0)), place(builder, address, index, 4, FLOAT))


class Numbers(NamedTuple):
    """How numbers of a row are read and written, 16 at a time, rounded as if written, and one of equal ones written."""

    load: Callable[[Any, Any, Any], Lanes]
    store: Callable[[Any, Lanes, Any, Any], None]
    rounded: Callable[[Lanes], Lanes]
    store_one: Callable[[Any, Lanes, Any, Any], None]


def numbers_of(kind: Any) -> Numbers:
    """Those of a numba type: uint16 stands for bfloat16, and float32 for itself."""
    if kind == types.uint16:
        return Numbers(load_words, store_words, Lanes.rounded, _store_word)
    return Numbers(load, store, lambda lanes: lanes, _store_float)


class State:
    """Lanes that change from turn to turn of a loop; the compiler keeps them in a register."""

    def __init__(self, builder: Any, start: float):
        self.builder, self.place = builder, cgutils.alloca_once(builder, FLOATS)
        builder.store(ir.Constant(FLOATS, [start] * 16), self.place)

    def get(self) -> Lanes:
        """The numbers of this turn."""
        return Lanes(self.builder, self.builder.load(self.place))

    def set(self, lanes: Lanes) -> None:
        """The numbers of the next turn."""
        self.builder.store(lanes.value, self.place)


@contextlib.contextmanager
def vectors(builder: Any, length: Any) -> Iterator[Any]:
    """A loop over the vectors of a row; the number of each."""
    with cgutils.for_range(builder, builder.lshr(length, LONG(4))) as loop:
        yield loop.index
