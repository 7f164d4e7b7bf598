"""Decoding 32 weights at a time: where codes stand in the bytes of each format, and how they become weights.

Codes that count steps become weights by arithmetic. Others, and to bfloat16 all of 4 bits where the processor permutes
32 words (AVX-512 BW, vpermw), have one of 16 weights, which are computed once for a group, rounded once, and put
in the place of every code by the processor's permutation; processors without one compare. The result is that of
torch's operations, bit for bit.
"""

# a table is the address of the 16 float32 values of the codes, or the float32 code that stands for zero; scales are
# (scale, offset) of 32 weights, or of 16 and the next 16; codes are 32 bytes, or two vectors of 16 whole numbers

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

from lorafold.kernels.lanes import BITS, FLOATS, INT, LONG, WORDS, Lanes, everywhere, intrinsic, numbers_of, splat
from lorafold.kernels.lanes import store as store_floats

# kvalues_iq4nl of ggml-common.h
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# quantiles of the normal distribution (QLoRA, arXiv 2305.14314, appendix E)
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_BYTES, _HALF_BYTES = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(8), 16)
_WORDS = ir.VectorType(ir.IntType(16), 32)
_TURNS = [i // 2 + 16 * (i % 2) for i in range(32)]  # one of the first 16, one of the second 16, ...


@functools.cache
def has(feature: str) -> bool:
    """Whether numba compiles for a processor that has this; its settings may ask for an older one."""
    _triple, _processor, features = cpu_target.target_context.codegen().magic_tuple()  # type: ignore[union-attr]
    return f"+{feature}" in str(features).split(",")


def permutes() -> bool:
    """Whether 32 words are looked up at once."""
    return has("avx512bw")


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _constant(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _mix(builder: Any, first: Any, second: Any, order: Any) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT, len(order)), list(order)))


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(builder.module.declare_intrinsic(name, fnty=kind), list(arguments))


def _halves(builder: Any, codes: Any) -> Any:
    """Codes as two vectors of 16 whole numbers."""
    if isinstance(codes, list):
        return codes
    return [builder.zext(_mix(builder, codes, codes, range(at, at + 16)), BITS) for at in (0, 16)]


def _as_words(builder: Any, codes: Any) -> Any:
    """Codes as 32 words."""
    if isinstance(codes, list):
        first, second = (builder.trunc(half, WORDS) for half in codes)
        return _mix(builder, first, second, range(32))
    return builder.zext(codes, _WORDS)


def _weights(builder: Any, values: Any, scale: Any, offset: Any) -> Lanes:
    """scale * value + offset, rounded twice as torch's operations do."""
    product = builder.fmul(values, splat(builder, scale))
    return Lanes(builder, builder.fadd(product, splat(builder, offset)))


def _entries(builder: Any, entries: Any, codes: Any) -> Any:
    """One of 16 float32 numbers for each of 16 codes."""
    if has("avx512f"):
        return _call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, entries, codes)
    if not has("avx2"):
        found = splat(builder, builder.extract_element(entries, INT(0)))
        for code in range(1, 16):
            entry = splat(builder, builder.extract_element(entries, INT(code)))
            found = builder.select(builder.icmp_unsigned("==", codes, _constant(BITS, code)), entry, found)
        return found
    low, high = (_mix(builder, entries, entries, range(at, at + 8)) for at in (0, 8))
    found = []
    for at in (0, 8):
        here = _mix(builder, codes, codes, range(at, at + 8))
        either = [_call(builder, "llvm.x86.avx2.permps", half.type, half, here) for half in (low, high)]
        found.append(builder.select(builder.icmp_unsigned("<", here, _constant(here.type, 8)), *either))
    return _mix(builder, found[0], found[1], range(16))


def _low(builder: Any, packed: Any) -> Any:
    return builder.and_(packed, _constant(packed.type, 15))


def _high(builder: Any, packed: Any) -> Any:
    return builder.lshr(packed, _constant(packed.type, 4))


def _one_after_the_other(builder: Any, source: Any) -> Any:
    packed = _load(builder, source, _HALF_BYTES)
    return _mix(builder, _low(builder, packed), _high(builder, packed), range(32))


def _low_first(builder: Any, source: Any) -> Any:
    packed = _load(builder, source, _HALF_BYTES)
    return _mix(builder, _low(builder, packed), _high(builder, packed), _TURNS)


def _high_first(builder: Any, source: Any) -> Any:
    packed = _load(builder, source, _HALF_BYTES)
    return _mix(builder, _high(builder, packed), _low(builder, packed), _TURNS)


def _parts(builder: Any, source: Any) -> Any:
    """Bits of 32 bytes, (address, shift, mask), and where there are seven numbers, those of others shifted up."""
    numbers = cgutils.unpack_tuple(builder, source)
    low, *high = (_bits(builder, *numbers[at : at + 3]) for at in range(0, len(numbers) - 1, 3))
    for part in high:
        low = builder.or_(low, builder.shl(part, _byte(builder, numbers[-1])))
    return low


def _bits(builder: Any, address: Any, shift: Any, mask: Any) -> Any:
    moved = builder.lshr(_load(builder, address, _BYTES), _byte(builder, shift))
    return builder.and_(moved, _byte(builder, mask))


def _byte(builder: Any, number: Any) -> Any:
    return splat(builder, builder.trunc(number, _BYTES.element), _BYTES.count)


def _in_a_row(bits: int) -> Callable[[Any, Any], Any]:
    """Codes of so many bits one after the other, the lowest bits first: 16 in 2 `bits` bytes."""
    starts = [min(i * bits // 8, 2 * bits - 4) for i in range(16)]  # of the four bytes that hold a code
    shifts = ir.Constant(BITS, [i * bits - 8 * start for i, start in enumerate(starts)])
    order = [start + byte for start in starts for byte in range(4)]

    def take(builder: Any, source: Any) -> Any:
        halves = []
        for half in range(2):
            held = _load(builder, builder.add(source, LONG(2 * bits * half)), ir.IntType(16 * bits))
            held = builder.bitcast(held, ir.VectorType(ir.IntType(8), 2 * bits))
            whole = builder.bitcast(_mix(builder, held, held, order), BITS)
            halves.append(builder.and_(builder.lshr(whole, shifts), _constant(BITS, (1 << bits) - 1)))
        return halves

    return take


def _with_fifth_bit(builder: Any, source: Any) -> Any:
    """32 bits, the highest of each code, before the low and the high halves of 16 bytes."""
    bits = _load(builder, source, INT)
    highest = builder.zext(builder.bitcast(bits, ir.VectorType(ir.IntType(1), 32)), _BYTES)
    rest = _one_after_the_other(builder, builder.add(source, LONG(4)))
    return builder.or_(rest, builder.shl(highest, _constant(_BYTES, 4)))


def _from_minus_128(builder: Any, source: Any) -> Any:
    """Signed bytes, 128 more of each."""
    return builder.xor(_load(builder, source, _BYTES), _constant(_BYTES, 128))


def _store_rounded(builder: Any, lanes: Lanes, out: Any, at: int) -> None:
    """Numbers that are bfloat16 already."""
    words = builder.trunc(builder.lshr(builder.bitcast(lanes.value, BITS), _constant(BITS, 16)), WORDS)
    builder.store(words, builder.inttoptr(builder.add(out, LONG(32 * at)), WORDS.as_pointer()), align=2)


def _storing(take: Callable[[Any, Any], Any]) -> Any:
    """store(kind, table, scales, source, out): 32 weights of the codes that `take` finds at `source`."""

    @intrinsic
    def store(typing_context, kind, table, scales, source, out):  # noqa: ARG001 (numba's protocol)
        def words(_context, builder, _signature, arguments):
            _, values, scales, source, out = arguments
            scale, offset = cgutils.unpack_tuple(builder, scales)[:2]
            entries = _weights(builder, _load(builder, values, FLOATS), scale, offset).round()
            twice, codes = _mix(builder, entries, entries, range(32)), _as_words(builder, take(builder, source))
            found = _call(builder, "llvm.x86.avx512.permvar.hi.512", _WORDS, twice, codes)
            builder.store(found, builder.inttoptr(out, _WORDS.as_pointer()), align=1)

        def look_up(_context, builder, _signature, arguments):
            _, values, scales, source, out = arguments
            scale, offset = cgutils.unpack_tuple(builder, scales)[:2]
            entries = _weights(builder, _load(builder, values, FLOATS), scale, offset)
            entries = numbers_of(kind).rounded(entries).value
            for at, codes in enumerate(_halves(builder, take(builder, source))):
                found = Lanes(builder, _entries(builder, entries, codes))
                if kind == types.uint16:
                    _store_rounded(builder, found, out, at)
                else:
                    numbers_of(kind).store(builder, found, out, LONG(at))

        def compute(_context, builder, _signature, arguments):
            _, zero, scales, source, out = arguments
            scales = cgutils.unpack_tuple(builder, scales)
            for at, codes in enumerate(_halves(builder, take(builder, source))):
                own = scales[:2] if at == 0 else scales[-2:]
                values = builder.fsub(builder.sitofp(codes, FLOATS), splat(builder, zero))
                numbers_of(kind).store(builder, _weights(builder, values, *own), out, LONG(at))

        by_table = words if kind == types.uint16 and permutes() else look_up
        return types.void(kind, table, scales, source, out), compute if table == types.float32 else by_table

    return store


store_halves, store_low_first, store_high_first = map(_storing, (_one_after_the_other, _low_first, _high_first))
store_parts, store_fifth, store_bytes = map(_storing, (_parts, _with_fifth_bit, _from_minus_128))
store_2, store_3, store_5, store_6 = (_storing(_in_a_row(bits)) for bits in (2, 3, 5, 6))


@intrinsic
def store_steps(typing_context, factor, source, out):  # noqa: ARG001 (numba's protocol)
    """factor * ((((byte >> shift) & mask) ^ flip) - flip) of 16 bytes, as float32.

    The source is (address, shift, mask, flip); bytes are signed with a flip of 128, and with 0 they are not.
    """

    def generate(_context, builder, _signature, arguments):
        factor, source, out = arguments
        address, *rest = cgutils.unpack_tuple(builder, source)
        shift, mask, flip = (splat(builder, builder.trunc(number, INT)) for number in rest)
        numbers = builder.lshr(builder.zext(_load(builder, address, _HALF_BYTES), BITS), shift)
        numbers = builder.sub(builder.xor(builder.and_(numbers, mask), flip), flip)
        store_floats(
            builder, Lanes(builder, builder.sitofp(numbers, FLOATS)) * everywhere(builder, factor), out, LONG(0)
        )

    return types.void(factor, source, out), generate


@intrinsic
def half(typing_context, address):  # noqa: ARG001 (numba's protocol)
    """The float16 number at an address, as float32; not every processor has an instruction for it."""

    def generate(_context, builder, _signature, arguments):
        whole, single = ir.IntType(32), ir.FloatType()
        half = builder.zext(builder.load(builder.inttoptr(arguments[0], ir.IntType(16).as_pointer()), align=2), whole)
        exponent, rest = builder.and_(half, whole(0x7C00)), builder.and_(half, whole(0x3FF))
        moved = builder.shl(builder.and_(half, whole(0x7FFF)), whole(13))
        bias = builder.select(builder.icmp_unsigned("==", exponent, whole(0x7C00)), whole(224 << 23), whole(112 << 23))
        small = builder.bitcast(builder.fmul(builder.uitofp(rest, single), single(2.0**-24)), whole)
        bits = builder.select(builder.icmp_unsigned("==", exponent, whole(0)), small, builder.add(moved, bias))
        sign = builder.shl(builder.and_(half, whole(0x8000)), whole(16))
        return builder.bitcast(builder.or_(bits, sign), single)

    return types.float32(types.intp), generate
