"""Matrix tiles (AMX) for numba kernels: products of bfloat16 matrices, 32 rows by 32 columns at a time.

A tile is 16 rows of 64 bytes. The left operand is read as it lies in memory, 32 numbers of 16 rows; the right one is
laid out first, as 16 rows of 16 pairs of numbers that follow each other along the sum. Sums are float32.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (TDPBF16PS).
"""

# all addresses and strides are in bytes; a panel is 32 columns of the right operand, 64 K bytes for sums of K products

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import config, njit, types
from numba.core.registry import cpu_target

from lorafold.kernels.lanes import intrinsic

_PERMISSION = (158, 0x1023, 18)  # Linux: arch_prctl, ARCH_REQ_XCOMP_PERM, tile data
_BYTE, _LONG, _VOID = ir.IntType(8), ir.IntType(64), ir.VoidType()
_PLACE = _BYTE.as_pointer()
_WORDS, _DWORDS, _FLOATS = (
    ir.VectorType(kind, n) for kind, n in ((ir.IntType(16), 32), (ir.IntType(32), 16), (ir.FloatType(), 16))
)
SETTINGS = np.zeros(64, np.uint8)  # 8 tiles of 16 rows of 64 bytes
SETTINGS[0], SETTINGS[16:32:2], SETTINGS[48:56] = 1, 64, 16


@functools.cache
def supported() -> bool:
    """Whether numba compiles for a processor with tiles, and the system lets this process use them."""
    _triple, _processor, features = cpu_target.target_context.codegen().magic_tuple()  # type: ignore[union-attr]
    if llvm_version_info[0] < 16:  # older versions write bfloat16 conversions otherwise
        return False
    able = {"+amx-tile", "+amx-bf16", "+avx512bf16"} <= set(str(features).split(","))
    if not able or config.DISABLE_JIT or platform.system() != "Linux":  # type: ignore[attr-defined]
        return False
    return ctypes.CDLL(None).syscall(*_PERMISSION) == 0


class _BFloat(ir.types.Type):
    """bfloat16 as LLVM knows it."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _instruction(name: str, kinds: list[Any], *numbers: int) -> Any:
    """A numba function for one LLVM intrinsic: tile numbers are fixed, addresses and strides are its arguments."""
    signature = types.void(*[types.intp] * (len(kinds) - len(numbers)))

    def generate(_context, builder, _signature, arguments):
        values = [_BYTE(n) for n in numbers]
        for value, kind in zip(arguments, kinds[len(numbers) :], strict=True):
            values.append(builder.inttoptr(value, kind) if kind is _PLACE else value)
        builder.call(builder.module.declare_intrinsic(name, fnty=ir.FunctionType(_VOID, kinds)), values)

    if len(signature.args) == 2:
        return intrinsic(lambda _typing, _place, _stride: (signature, generate))
    if len(signature.args) == 1:
        return intrinsic(lambda _typing, _place: (signature, generate))
    return intrinsic(lambda _typing: (signature, generate))


configure, release = _instruction("llvm.x86.ldtilecfg", [_PLACE]), _instruction("llvm.x86.tilerelease", [])
_zero0, _zero1, _zero2, _zero3 = (_instruction("llvm.x86.tilezero", [_BYTE], t) for t in range(4))
_load0, _load1, _load4, _load5, _load6, _load7 = (
    _instruction("llvm.x86.tileloadd64", [_BYTE, _PLACE, _LONG], t) for t in (0, 1, 4, 5, 6, 7)
)
_store0, _store1, _store2, _store3 = (
    _instruction("llvm.x86.tilestored64", [_BYTE, _PLACE, _LONG], t) for t in range(4)
)
_add046, _add147, _add256, _add357 = (
    _instruction("llvm.x86.tdpbf16ps", [_BYTE] * 3, *tiles) for tiles in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))
)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def round_pair(typing_context, first, second, target):  # noqa: ARG001 (numba's protocol)
    """16 float32 numbers at one address and 16 at another become 32 bfloat16 numbers at a third."""

    def generate(_context, builder, _signature, arguments):
        first, second, target = arguments
        low, high = (builder.load(_at(builder, place, _FLOATS), align=64) for place in (first, second))
        rounded = ir.VectorType(_BFloat(), 32)
        convert = builder.module.declare_intrinsic(
            "llvm.x86.avx512bf16.cvtne2ps2bf16.512", fnty=ir.FunctionType(rounded, [_FLOATS, _FLOATS])
        )
        builder.store(builder.call(convert, [high, low]), _at(builder, target, rounded), align=2)

    return types.void(types.intp, types.intp, types.intp), generate


@njit(inline="always")
def round_row(source, target):
    """32 float32 numbers at an address become bfloat16 at another."""
    round_pair(source, source + 64, target)


def _shuffle(builder: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


@intrinsic
def _fetch(typing_context, place):  # noqa: ARG001 (numba's protocol)
    """Ask for a line of memory that will be read soon; any address will do."""

    def generate(_context, builder, _signature, arguments):
        kind = ir.FunctionType(_VOID, [_PLACE, *[ir.IntType(32)] * 3])
        near, read, data = (ir.Constant(ir.IntType(32), n) for n in (2, 0, 1))
        call = builder.module.declare_intrinsic("llvm.prefetch", [_PLACE], kind)
        builder.call(call, [builder.inttoptr(arguments[0], _PLACE), read, near, data])

    return types.void(types.intp), generate


@intrinsic
def turn(typing_context, source, stride, target):  # noqa: ARG001 (numba's protocol)
    """16 rows of 16 double words, `stride` bytes apart, are transposed into a tile."""

    def generate(_context, builder, _signature, arguments):
        source, stride, target = arguments
        rows = []
        for i in range(16):
            place = builder.add(source, builder.mul(stride, _LONG(i)))
            rows.append(builder.load(_at(builder, place, _DWORDS), align=1))
        for step in (8, 4, 2, 1):  # swaps the off-diagonal quarters of blocks of 2 * step
            for i in (i for i in range(16) if not i & step):
                a, b = rows[i], rows[i | step]
                rows[i] = _shuffle(
                    builder, a, b, [lane if not lane & step else 16 + (lane ^ step) for lane in range(16)]
                )
                rows[i | step] = _shuffle(
                    builder, a, b, [lane ^ step if not lane & step else 16 + lane for lane in range(16)]
                )
        for i, row in enumerate(rows):
            builder.store(row, _at(builder, builder.add(target, _LONG(64 * i)), _DWORDS), align=64)

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def _interleave(typing_context, first, second, target):  # noqa: ARG001 (numba's protocol)
    """32 words of two rows, alternating: the first 16 pairs go to one tile, the others to the next."""

    def generate(_context, builder, _signature, arguments):
        first, second, target = arguments
        a, b = (builder.load(_at(builder, place, _WORDS), align=1) for place in (first, second))
        for half in range(2):
            pairs = _shuffle(builder, a, b, [lane // 2 + 16 * half + 32 * (lane % 2) for lane in range(32)])
            builder.store(pairs, _at(builder, builder.add(target, _LONG(1024 * half)), _WORDS), align=64)

    return types.void(types.intp, types.intp, types.intp), generate


@njit(cache=True)
def lay(weight, stride, transposed, j, k, out):
    """Panel j of the weight: 32 columns of its [K, N], as tiles; the lines of the panel after the next are fetched."""
    if transposed:
        for i in range(k // 32):
            source = weight + 32 * j * stride + 64 * i
            turn(source, stride, out + 2048 * i)
            turn(source + 16 * stride, stride, out + 2048 * i + 1024)
    else:
        for i in range(k // 2):
            source = weight + 2 * i * stride + 64 * j
            _interleave(source, source + stride, out + 2048 * (i // 16) + 64 * (i % 16))
            _fetch(source + 128)
            _fetch(source + stride + 128)


@njit(inline="always")
def _begin():
    _zero0()
    _zero1()
    _zero2()
    _zero3()


@njit(inline="always")
def _add(x, stride, tiles):
    """32 numbers of 32 rows times 32 columns."""
    _load4(x, stride)
    _load6(tiles, 64)
    _load7(tiles + 1024, 64)
    _add046()
    _add147()
    _load5(x + 16 * stride, stride)
    _add256()
    _add357()


@njit(inline="always")
def _end(sums, across):
    _store0(sums, across)
    _store1(sums + 64, across)
    _store2(sums + 16 * across, across)
    _store3(sums + 16 * across + 64, across)


@njit(cache=True)
def panel(x, stride, tiles, steps, sums, across):
    """32 rows of X times 32 columns: float32 sums, `across` bytes from row to row."""
    _begin()
    for k in range(steps):
        _add(x + 64 * k, stride, tiles + 2048 * k)
    _end(sums, across)


@njit(cache=True)
def add_half_panel(x, stride, tiles, steps, begun, sums, across):
    """16 rows of X times 32 columns, added to float32 sums that were `begun`, or are to be."""
    if begun:
        _load0(sums, across)
        _load1(sums + 64, across)
    else:
        _zero0()
        _zero1()
    for k in range(steps):
        _load4(x + 64 * k, stride)
        _load6(tiles + 2048 * k, 64)
        _load7(tiles + 2048 * k + 1024, 64)
        _add046()
        _add147()
    _store0(sums, across)
    _store1(sums + 64, across)


@njit(cache=True)
def panel_while_moving(
    x, stride, tiles, steps, e, e_stride, e_tiles, e_steps, sums, done, target, target_stride, first, last
):
    """32 rows of X times 32 columns, and of E times others: float32 sums [32, 32] of both.

    Meanwhile, since tiles multiply by themselves, other sums that are done become bfloat16 rows at `target` (0: none),
    and of the next 32 rows of X those from `first` to `last` are asked for.
    """
    _begin()
    row, steps_in_all = 0, steps + e_steps
    for k in range(steps_in_all):
        if k < steps:
            _add(x + 64 * k, stride, tiles + 2048 * k)
            for ahead in range(first, last):
                _fetch(x + stride * (32 + ahead) + 64 * k)
        else:
            _add(e + 64 * (k - steps), e_stride, e_tiles + 2048 * (k - steps))
        until = 32 * (k + 1) // steps_in_all if target else 0
        while row < until:
            round_row(done + 128 * row, target + target_stride * row)
            row += 1
    _end(sums, 128)
