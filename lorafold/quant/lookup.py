"""Decoding 4-bit codes with one table lookup for 32 weights, on processors with 512-bit byte and word instructions.

A group of 4-bit codes has 16 different weights. They are computed and rounded once, and an instruction that permutes 32
words (AVX-512 BW, vpermw) puts one in the place of every code. The result is that of `kernels.py`, bit for bit.
"""

# raw uint8 [O, B, bytes], scale and offset float32 [O, G], values float32 [16] of the codes, out uint16 [O, I]

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import config, njit, prange, types
from numba.core.registry import cpu_target

from lorafold.kernels.lanes import intrinsic

_BYTES, _HALF_BYTES = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(8), 16)
_WORDS, _HALF_WORDS = ir.VectorType(ir.IntType(16), 32), ir.VectorType(ir.IntType(16), 16)
_FLOATS, _BITS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
_TURNS = [i // 2 + 16 * (i % 2) for i in range(32)]  # one of the first 16, one of the second 16, ...
_SIGNATURE = types.void(types.intp, types.float32, types.float32, types.intp, types.intp)


@functools.cache
def supported() -> bool:
    """Whether numba compiles for a processor that has the instructions; its settings may ask for an older one."""
    _triple, _processor, features = cpu_target.target_context.codegen().magic_tuple()  # type: ignore[union-attr]
    return "+avx512bw" in str(features).split(",") and not config.DISABLE_JIT  # type: ignore[attr-defined]


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _splat(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _mix(builder: Any, first: Any, second: Any, order: Any) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), 32), list(order)))


def _everywhere(builder: Any, number: Any) -> Any:
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(_BITS, [0] * 16))


def _table(builder: Any, values: Any, scale: Any, offset: Any) -> Any:
    """scale * value + offset of 16 values, rounded to bfloat16 as `round_bfloat16` does; in words, twice."""
    product = builder.fmul(_load(builder, values, _FLOATS), _everywhere(builder, scale))
    weights = builder.fadd(product, _everywhere(builder, offset))
    bits = builder.bitcast(weights, _BITS)
    bits = builder.select(builder.fcmp_unordered("uno", weights, weights), _splat(_BITS, 0x7FC00000), bits)
    odd = builder.and_(builder.lshr(bits, _splat(_BITS, 16)), _splat(_BITS, 1))
    bits = builder.add(bits, builder.add(odd, _splat(_BITS, 0x7FFF)))
    words = builder.trunc(builder.lshr(bits, _splat(_BITS, 16)), _HALF_WORDS)
    return _mix(builder, words, words, range(32))


def _low(builder: Any, packed: Any) -> Any:
    return builder.and_(packed, _splat(packed.type, 15))


def _high(builder: Any, packed: Any) -> Any:
    return builder.lshr(packed, _splat(packed.type, 4))


def _one_after_the_other(builder: Any, source: Any) -> Any:
    packed = _load(builder, source, _HALF_BYTES)
    return _mix(builder, _low(builder, packed), _high(builder, packed), range(32))


def _low_first(builder: Any, source: Any) -> Any:
    packed = _load(builder, source, _HALF_BYTES)
    return _mix(builder, _low(builder, packed), _high(builder, packed), _TURNS)


def _high_first(builder: Any, source: Any) -> Any:
    packed = _load(builder, source, _HALF_BYTES)
    return _mix(builder, _high(builder, packed), _low(builder, packed), _TURNS)


def _low_of_32(builder: Any, source: Any) -> Any:
    return _low(builder, _load(builder, source, _BYTES))


def _high_of_32(builder: Any, source: Any) -> Any:
    return _high(builder, _load(builder, source, _BYTES))


def _storing(take: Callable[[Any, Any], Any]) -> Any:
    """store(values, scale, offset, source, out): 32 weights of the codes that `take` finds at the address `source`."""

    @intrinsic
    def store(typing_context, values, scale, offset, source, out):  # noqa: ARG001 (numba's protocol)
        def generate(context, builder, signature, arguments):  # noqa: ARG001
            values, scale, offset, source, out = arguments
            codes = builder.zext(take(builder, source), _WORDS)
            permute = ir.FunctionType(_WORDS, [_WORDS, _WORDS])
            lookup = builder.module.declare_intrinsic("llvm.x86.avx512.permvar.hi.512", fnty=permute)
            entries = builder.call(lookup, [_table(builder, values, scale, offset), codes])
            builder.store(entries, builder.inttoptr(out, _WORDS.as_pointer()), align=1)

        return _SIGNATURE, generate

    return store


_store_halves, _store_low_first, _store_high_first = map(_storing, (_one_after_the_other, _low_first, _high_first))
_store_low, _store_high = map(_storing, (_low_of_32, _high_of_32))


@intrinsic
def _half(typing_context, address):  # noqa: ARG001 (numba's protocol)
    """The float16 number at an address, as float32."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        number = builder.load(builder.inttoptr(arguments[0], ir.HalfType().as_pointer()), align=2)
        return builder.fpext(number, ir.FloatType())

    return types.float32(types.intp), generate


@njit(parallel=True, cache=True)
def halves(raw, scale, offset, values, at, out):
    """Q4_0, Q4_1, IQ4_NL: groups of 32 from byte `at`; low halves of 16 bytes, then their high halves.

    Without scales (an array of no rows) those at the beginning of each block are taken.
    """
    stored = len(scale) == 0
    for r in prange(raw.shape[0]):
        v, source, target = values.ctypes.data, raw[r].ctypes.data, out[r].ctypes.data
        for g in range(raw.shape[1]):
            place = source + g * raw.shape[2]
            s = _half(place) if stored else scale[r, g]
            _store_halves(v, s, offset[r, g], place + at, target + 64 * g)


@njit(parallel=True, cache=True)
def low_first(raw, scale, offset, values, at, out):
    """MLX with 4 bits: groups of 32, 64 or 128; the low half of a byte is the code before its high half."""
    chunks = (raw.shape[2] - at) // 16
    for r in prange(raw.shape[0]):
        v, source, target = values.ctypes.data, raw[r].ctypes.data + at, out[r].ctypes.data
        for g in range(raw.shape[1]):
            s, o = scale[r, g], offset[r, g]
            for c in range(chunks):
                _store_low_first(v, s, o, source + g * raw.shape[2] + 16 * c, target + 64 * (g * chunks + c))


@njit(parallel=True, cache=True)
def high_first(raw, scale, offset, values, at, out):
    """NF4: groups of 64; the high half of a byte is the code before its low half."""
    for r in prange(raw.shape[0]):
        v, source, target = values.ctypes.data, raw[r].ctypes.data + at, out[r].ctypes.data
        for g in range(raw.shape[1]):
            s, o, place = scale[r, g], offset[r, g], source + g * raw.shape[2]
            _store_high_first(v, s, o, place, target + 128 * g)
            _store_high_first(v, s, o, place + 16, target + 128 * g + 64)


@njit(parallel=True, cache=True)
def pairs(raw, scale, offset, values, at, out):
    """Q4_K: 256 weights in 4 times 32 bytes, whose low halves are one group and whose high halves are the next."""
    for r in prange(raw.shape[0]):
        v, source, target = values.ctypes.data, raw[r].ctypes.data + at, out[r].ctypes.data
        for b in range(raw.shape[1]):
            for c in range(4):
                g, place = 8 * b + 2 * c, source + b * raw.shape[2] + 32 * c
                _store_low(v, scale[r, g], offset[r, g], place, target + 64 * g)
                _store_high(v, scale[r, g + 1], offset[r, g + 1], place, target + 64 * g + 64)
