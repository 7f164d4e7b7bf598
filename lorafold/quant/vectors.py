"""Decoding 32 weights at a time: codes of 4, 5 and 8 bits that stand side by side.

A group of 4-bit codes has 16 different weights. To bfloat16 they are computed and rounded once where the processor has
an instruction that permutes 32 words (AVX-512 BW, vpermw), which puts one in the place of every code. Elsewhere, and to
float32, codes that count steps become weights by arithmetic. The result is that of `kernels.py`, bit for bit.
"""

# raw uint8 [O, B, bytes], scale and offset float32 [O, G], out uint16 (bfloat16) or float32 [O, I]; a table is the
# address of the 16 float32 values of the codes, or the float32 code that stands for zero

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import config, njit, prange, types
from numba.core.registry import cpu_target

from lorafold.kernels.lanes import Lanes, everywhere, intrinsic, numbers_of

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
_FLOATS, _BITS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
_TURNS = [i // 2 + 16 * (i % 2) for i in range(32)]  # one of the first 16, one of the second 16, ...


@functools.cache
def permutes() -> bool:
    """Whether numba compiles for a processor that looks up 32 words at once; its settings may ask for an older one."""
    _triple, _processor, features = cpu_target.target_context.codegen().magic_tuple()  # type: ignore[union-attr]
    return "+avx512bw" in str(features).split(",") and not config.DISABLE_JIT  # type: ignore[attr-defined]


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _splat(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _mix(builder: Any, first: Any, second: Any, order: Any) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), 32), list(order)))


def _weights(builder: Any, values: Any, scale: Any, offset: Any) -> Any:
    """scale * value + offset, rounded twice as the loops of `kernels.py` do."""
    product = builder.fmul(values, everywhere(builder, scale).value)
    return builder.fadd(product, everywhere(builder, offset).value)


def _table(builder: Any, values: Any, scale: Any, offset: Any) -> Any:
    """scale * value + offset of 16 values as bfloat16 words, twice."""
    words = Lanes(builder, _weights(builder, _load(builder, values, _FLOATS), scale, offset)).round()
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


def _with_fifth_bit(builder: Any, source: Any) -> Any:
    """32 bits, the highest of each code, before the low and the high halves of 16 bytes."""
    bits = _load(builder, source, ir.IntType(32))
    highest = builder.zext(builder.bitcast(bits, ir.VectorType(ir.IntType(1), 32)), _BYTES)
    rest = _one_after_the_other(builder, builder.add(source, ir.IntType(64)(4)))
    return builder.or_(rest, builder.shl(highest, _splat(_BYTES, 4)))


def _from_minus_128(builder: Any, source: Any) -> Any:
    """Signed bytes, 128 more of each."""
    return builder.xor(_load(builder, source, _BYTES), _splat(_BYTES, 128))


def _storing(take: Callable[[Any, Any], Any]) -> Any:
    """store(kind, table, scale, offset, source, out): 32 weights of the codes that `take` finds at `source`."""

    @intrinsic
    def store(typing_context, kind, table, scale, offset, source, out):  # noqa: ARG001 (numba's protocol)
        def look_up(_context, builder, _signature, arguments):
            _, values, scale, offset, source, out = arguments
            codes = builder.zext(take(builder, source), _WORDS)
            permute = ir.FunctionType(_WORDS, [_WORDS, _WORDS])
            lookup = builder.module.declare_intrinsic("llvm.x86.avx512.permvar.hi.512", fnty=permute)
            entries = builder.call(lookup, [_table(builder, values, scale, offset), codes])
            builder.store(entries, builder.inttoptr(out, _WORDS.as_pointer()), align=1)

        def compute(_context, builder, _signature, arguments):
            _, zero, scale, offset, source, out = arguments
            codes = take(builder, source)
            for half in range(2):
                lanes = ir.Constant(_BITS, [16 * half + lane for lane in range(16)])
                counts = builder.zext(builder.shuffle_vector(codes, codes, lanes), _BITS)
                values = builder.fsub(builder.sitofp(counts, _FLOATS), everywhere(builder, zero).value)
                weights = Lanes(builder, _weights(builder, values, scale, offset))
                numbers_of(kind).store(builder, weights, out, ir.IntType(64)(half))

        signature = types.void(kind, table, types.float32, types.float32, types.intp, types.intp)
        return signature, compute if table == types.float32 else look_up

    return store


_store_halves, _store_low_first, _store_high_first = map(_storing, (_one_after_the_other, _low_first, _high_first))
_store_low, _store_high = map(_storing, (_low_of_32, _high_of_32))
_store_fifth, _store_bytes = map(_storing, (_with_fifth_bit, _from_minus_128))


@intrinsic
def _half(typing_context, address):  # noqa: ARG001 (numba's protocol)
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


@njit(parallel=True, cache=True)
def groups(raw, scale, offset, table, at, out):
    """Groups of 32, by the bytes of their codes, from byte `at`: 16 (Q4_0, Q4_1, IQ4_NL), 20 (Q5_0, Q5_1), 32 (Q8_0).

    16 bytes are low halves, then high halves, before which 4 hold fifth bits. Without scales (an array of no rows)
    those at the beginning of each block are taken. Of signed bytes the table is 128 more than the code of zero.
    """
    stored, size = len(scale) == 0, raw.shape[2] - at
    for r in prange(raw.shape[0]):
        kind, source, target = out.dtype.type(0), raw[r].ctypes.data, out[r].ctypes.data
        for g in range(raw.shape[1]):
            place, to = source + g * raw.shape[2], target + 32 * out.itemsize * g
            s = _half(place) if stored else scale[r, g]
            if size == 16:
                _store_halves(kind, table, s, offset[r, g], place + at, to)
            elif size == 20:
                _store_fifth(kind, table, s, offset[r, g], place + at, to)
            else:
                _store_bytes(kind, table, s, offset[r, g], place + at, to)


@njit(parallel=True, cache=True)
def low_first(raw, scale, offset, table, at, out):
    """MLX with 4 bits: groups of 32, 64 or 128; the low half of a byte is the code before its high half."""
    chunks = (raw.shape[2] - at) // 16
    for r in prange(raw.shape[0]):
        kind, source, target = out.dtype.type(0), raw[r].ctypes.data + at, out[r].ctypes.data
        for g in range(raw.shape[1]):
            s, o = scale[r, g], offset[r, g]
            for c in range(chunks):
                place, to = source + g * raw.shape[2] + 16 * c, target + 32 * out.itemsize * (g * chunks + c)
                _store_low_first(kind, table, s, o, place, to)


@njit(parallel=True, cache=True)
def high_first(raw, scale, offset, table, at, out):
    """NF4: groups of 64; the high half of a byte is the code before its low half."""
    for r in prange(raw.shape[0]):
        kind, source, target = out.dtype.type(0), raw[r].ctypes.data + at, out[r].ctypes.data
        for g in range(raw.shape[1]):
            s, o, place = scale[r, g], offset[r, g], source + g * raw.shape[2]
            for c in range(2):
                _store_high_first(kind, table, s, o, place + 16 * c, target + 32 * out.itemsize * (2 * g + c))


@njit(parallel=True, cache=True)
def pairs(raw, scale, offset, table, at, out):
    """Q4_K: 256 weights in 4 times 32 bytes, whose low halves are one group and whose high halves are the next."""
    for r in prange(raw.shape[0]):
        kind, source, target = out.dtype.type(0), raw[r].ctypes.data + at, out[r].ctypes.data
        for b in range(raw.shape[1]):
            for c in range(4):
                g, place, size = 8 * b + 2 * c, source + b * raw.shape[2] + 32 * c, 32 * out.itemsize
                _store_low(kind, table, scale[r, g], offset[r, g], place, target + size * g)
                _store_high(kind, table, scale[r, g + 1], offset[r, g + 1], place, target + size * g + size)


_COUNT = np.arange(16, dtype=np.float32)
_FORMATS = {  # format -> kernel, what the codes stand for, and the byte at which they begin
    "Q4_0": (groups, _COUNT - 8, 2),
    "Q4_1": (groups, _COUNT, 4),
    "Q4_K": (pairs, _COUNT, 16),
    "Q5_0": (groups, np.arange(32, dtype=np.float32) - 16, 2),
    "Q5_1": (groups, np.arange(32, dtype=np.float32), 4),
    "Q8_0": (groups, np.arange(256, dtype=np.float32) - 128, 2),
    "IQ4_NL": (groups, np.array(IQ4_NL_VALUES, np.float32), 2),
    "NF4": (high_first, np.array(NF4_VALUES, np.float32), 4),
    "NF4-DQ": (high_first, np.array(NF4_VALUES, np.float32), 1),
}


def covering(name: str, dtype: torch.dtype) -> tuple | None:
    """Kernel, table and first byte of codes for a format that is decoded here in this type; None for others."""
    if name.startswith("MLX4"):
        kernel, values, at = low_first, _COUNT, 8 if name.endswith("F32") else 4
    elif name in _FORMATS:
        kernel, values, at = _FORMATS[name]
    else:
        return None
    if dtype == torch.bfloat16 and len(values) == 16 and permutes():
        return kernel, values.ctypes.data, at
    counts_steps = values[-1] - values[0] == len(values) - 1
    return (kernel, np.float32(-values[0]), at) if counts_steps and not config.DISABLE_JIT else None  # type: ignore[attr-defined]
