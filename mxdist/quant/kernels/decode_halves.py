"""The fast product of few rows with packed weights: nibbles become float16 in registers, a block a tensor core step.

    y[m, n] = sum over blocks b of s[n, b] * sum over the block of w[n, k] x[m, k]

A word of eight nibbles becomes eight float16 numbers with 11 integer instructions. An inner sum is one product of 32,
exact in float32, and the block's scale is applied to it, not to the elements. A program's warps take different
outputs, or blocks of the same ones, and the contraction may be split over programs: the last of them to finish adds
the partial sums, always in one order, so that the same x gives the same y.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxdist.quant.kernels.device import INTERPRETED, power_of_two
from mxdist.quant.kernels.packed import Source
from mxdist.quant.kernels.parts import finished, is_last_part, sum_of_parts
from mxdist.quant.kernels.quant_halves import quantise_halves
from mxdist.quant.recipe import Operand

BLOCK = 32
_TO_VALUE = tl.constexpr(2.0**14)
"""A nibble in float16's bits is 2^-14 of its value."""
# The four bytes of a word: low nibbles to $0 and $1, high ones to $2 and $3. Sign and magnitude of a nibble go to where
# float16's upper byte has them.
_UNPACK = tl.constexpr(
    """{
    .reg .b32 low, high, moved;
    shl.b32 low, $4, 4;
    and.b32 low, low, 0x80808080;
    shl.b32 moved, $4, 1;
    lop3.b32 low, moved, 0x0E0E0E0E, low, 0xEA;
    and.b32 high, $4, 0x80808080;
    shr.b32 moved, $4, 3;
    lop3.b32 high, moved, 0x0E0E0E0E, high, 0xEA;
    prmt.b32 $0, low, 0, 0x1404;
    prmt.b32 $1, low, 0, 0x3424;
    prmt.b32 $2, high, 0, 0x1404;
    prmt.b32 $3, high, 0, 0x3424;
    }"""
)


@triton.jit
def _half(nibble):
    """float16 with a nibble's sign and magnitude in its upper bits, for the interpreter."""
    return (((nibble & 8) << 12) | ((nibble & 7) << 9)).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _elements(byte, SHARES: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """2^-14 of the values of bytes [BLOCKS / 2, SHARES WIDTH, 32]: float16 [BLOCKS SHARES, WIDTH, 32].

    Every eight are 0, 2, 4, 6, 1, 3, 5, 7.

    In that order no value moves between a thread's registers, or between threads: a word is a lane's share.
    """
    if INTERPRETED:
        low, high = _half(byte.to(tl.int32) & 15), _half(byte.to(tl.int32) >> 4)
    else:
        low, high = tl.inline_asm_elementwise(
            _UNPACK, "=r,=r,=r,=r,r", [byte], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    words = tl.reshape(tl.join(low, high), [BLOCKS // 2, SHARES, WIDTH, 2, 4, 4, 2])
    return tl.reshape(tl.permute(words, [0, 3, 1, 2, 4, 6, 5]), [BLOCKS * SHARES, WIDTH, 32])


@triton.jit
def reciprocal(f):
    """1 / f for f in [1, 2), perhaps off in the last bit: a division that is not takes eight instructions."""
    if INTERPRETED:
        return 1.0 / f
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [f], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _block_scales(code, byte, METHOD: tl.constexpr, SHARES: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """Block scales float32 [BLOCKS SHARES, WIDTH, 1] of E8M0 codes and macro bytes [SHARES WIDTH, BLOCKS]."""
    scale = power_of_two(code)
    if METHOD == 3:  # as terms.factors
        scale = scale * (1.0 + byte.to(tl.float32) * 0.25)
    elif METHOD != 0:
        scale = scale * reciprocal(1.0 + byte.to(tl.float32) * 0.00390625)
    scale = tl.permute(tl.reshape(scale, [SHARES, WIDTH, BLOCKS]), [2, 0, 1])
    return tl.reshape(scale, [BLOCKS * SHARES, WIDTH])[:, :, None]


@triton.jit
def _bytes(codes, row, first, code_width, BLOCKS: tl.constexpr, EVEN: tl.constexpr):
    """The codes of BLOCKS blocks of rows [WIDTH]: uint8 [BLOCKS / 2, WIDTH, 32].

    In this shape they are read in whole sectors, and lie in shared memory so that no two of a warp's reads collide:
    Triton arranges them so for two blocks side by side, not for a longer piece of a row.
    """
    n = first // 2 + 32 * tl.arange(0, BLOCKS // 2)[:, None, None] + tl.arange(0, 32)[None, None, :]
    pointers = codes + row[None, :, None] * code_width + n
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=n < code_width, other=0)


@triton.jit
def _codes(scales, row, first, units, BLOCKS: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr):
    """E8M0 codes int32 [WIDTH, BLOCKS] of rows [WIDTH] of units * UNIT codes; 0 where there are none.

    scales  words of four codes where UNIT allows it: shorter pieces do not go through the pipeline; otherwise bytes
    """
    WORD: tl.constexpr = 4 if UNIT >= 4 else 1
    width = units * (UNIT // WORD)
    n = (first // WORD + tl.arange(0, BLOCKS // WORD))[None, :]
    pointers = scales + row[:, None] * width + n
    code = (tl.load(pointers) if EVEN else tl.load(pointers, mask=n < width, other=0)).to(tl.int32)
    if WORD == 4:
        code = (code[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255
    return tl.reshape(code, [row.shape[0], BLOCKS])


@triton.jit
def _macro_bytes(macro_row, block, blocks, MACRO: tl.constexpr):
    """Macro bytes of blocks [BLOCKS] of rows [WIDTH, 1]."""
    return tl.load(macro_row + (block * 32 // MACRO)[None, :], mask=(block < blocks)[None, :], other=0)


@triton.jit
def _right(held, SHARES: tl.constexpr, BLOCKS: tl.constexpr):
    """Rows [BM, 32 BLOCKS] as right operands of every share: [BLOCKS SHARES, 32, BM]."""
    right = tl.permute(tl.reshape(held, [held.shape[0], BLOCKS, 32]), [1, 2, 0])
    right = tl.broadcast_to(right[:, None, :, :], [BLOCKS, SHARES, 32, held.shape[0]])
    return tl.reshape(right, [BLOCKS * SHARES, 32, held.shape[0]])


@triton.jit
def _term(
    codes, scales, row, first, block, code_width, scale_units, byte, alpha, right,
    METHOD: tl.constexpr, SHARES: tl.constexpr, SHARE: tl.constexpr, BLOCKS: tl.constexpr, UNIT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """alpha times the blocks' products with one term of the weights: [BLOCKS SHARES, SHARE, BM]."""
    code = _codes(scales, row, block, scale_units, BLOCKS, UNIT, EVEN)
    w = _elements(_bytes(codes, row, first, code_width, BLOCKS, EVEN), SHARES, SHARE, BLOCKS)
    return tl.dot(w, right) * (_block_scales(code, byte, METHOD, SHARES, SHARE, BLOCKS) * alpha)


@triton.jit
def _tile(table, tile, rows, BM: tl.constexpr):
    """A tile's expert, its first row, and the end of the rows."""
    if table is None:
        return 0, tile * BM, rows
    else:
        return tl.load(table + 3 * tile), tl.load(table + 3 * tile + 1), tl.load(table + 3 * tile + 2)


@triton.jit(do_not_specialize=["rows"])
def _product(
    x, x_stride, units, table, codes, scales, macro, residual_codes, residual_scales, alpha, bias, out, partial,
    finished, rows, outputs, code_width, scale_units, macro_width,
    LENGTH: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr,
    DEPTH: tl.constexpr, EVEN: tl.constexpr, METHOD: tl.constexpr, MACRO: tl.constexpr, FALLBACK: tl.constexpr,
    AHEAD: tl.constexpr, THREADS: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = DEPTH // 32
    SHARE: tl.constexpr = WIDTH // SHARES
    ALONG: tl.constexpr = THREADS // 32 // SHARES  # warps along K
    tile, part = tl.program_id(1), tl.program_id(2)
    if AHEAD:
        gdc_wait()  # all that is read or written from here on may be of the kernel ahead
        gdc_launch_dependents()  # not sooner: kernels that wait would pile up and take the room of this one
    expert, start, stop = _tile(table, tile, rows, BM)
    if start >= stop:
        return
    first_output = tl.program_id(0) * WIDTH
    column, r = first_output + tl.arange(0, WIDTH), start + tl.arange(0, BM)
    weight_row = (expert * outputs + tl.minimum(column, outputs - 1)).to(tl.int64)  # beyond the end, any will do
    inside, left = (r < stop)[:, None], x + r.to(tl.int64)[:, None] * x_stride
    c, b = tl.arange(0, DEPTH), tl.arange(0, BLOCKS)
    first_block, scale_width = part * (LENGTH // 32), scale_units * UNIT
    macro_row = macro + weight_row[:, None] * macro_width if METHOD != 0 else codes
    byte = tl.zeros((WIDTH, BLOCKS), tl.uint8)
    if METHOD != 0:
        byte = _macro_bytes(macro_row, first_block + b, scale_width, MACRO)
    total = tl.zeros((ALONG * SHARES, SHARE, BM), tl.float32)
    for step in tl.range(0, LENGTH, DEPTH, num_stages=STAGES):  # said of the loop, it holds for scales too
        first = part * LENGTH + step
        block = first_block + step // 32
        next_byte = byte
        if METHOD != 0:  # a step ahead: too few bytes for the pipeline
            next_byte = _macro_bytes(macro_row, block + BLOCKS + b, scale_width, MACRO)
        right = _right(tl.load(left + first + c[None, :], mask=inside, other=0.0), SHARES, BLOCKS)
        sums = _term(
            codes, scales, weight_row, first, block, code_width, scale_units, byte, 1.0, right,
            METHOD, SHARES, SHARE, BLOCKS, UNIT, EVEN,
        )  # fmt: skip
        if FALLBACK:
            sums += _term(
                residual_codes, residual_scales, weight_row, first, block, code_width, scale_units, byte, alpha, right,
                METHOD, SHARES, SHARE, BLOCKS, UNIT, EVEN,
            )  # fmt: skip
        total += tl.sum(tl.reshape(sums, [BLOCKS // ALONG, ALONG * SHARES, SHARE, BM]), 0)
        byte = next_byte
    y = tl.reshape(tl.sum(tl.reshape(total, [ALONG, SHARES, SHARE, BM]), 0), [WIDTH, BM])
    to = r.to(tl.int64)[None, :] * outputs + column[:, None]
    inside = (r < stop)[None, :] & (column < outputs)[:, None]
    unit = tl.load(units + r, mask=r < stop, other=1.0)[None, :] * _TO_VALUE
    if SPLIT > 1:
        size = rows.to(tl.int64) * outputs
        count = finished + tile * tl.num_programs(0) + tl.program_id(0)
        if not is_last_part(y, partial, count, part, size, to, inside, SPLIT):
            return
        y = sum_of_parts(partial, count, size, to, inside, SPLIT)
    y = y * unit
    if bias is not None:
        y += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[:, None]
    tl.store(out + to, y.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Shape:
    """How a product is cut.

    width   outputs of a program
    depth   elements along K of a step
    warps   of a program
    shares  parts of the outputs, each with as many of the warps, which share out the blocks of a step
    stages  of the pipeline
    split   programs along K
    ahead   the kernels start before those ahead of them end, and wait for them

    A part has at least 16 outputs, and a step at least a block for each of its warps. Sums over several warps go
    through shared memory at the end, which costs more than it gains when there are more than two or four.
    """

    width: int
    depth: int
    warps: int
    shares: int
    stages: int
    split: int
    ahead: bool = False


def is_narrow(height: int, outputs: int, k: int, tiles: int, multiprocessors: int) -> bool:
    """Whether programs of 16 outputs are needed to fill the GPU, and come before splitting, whose end takes time."""
    return height <= 16 and triton.cdiv(outputs, 64) * tiles < multiprocessors // 2 and k <= 4096


def shape_of(height: int, outputs: int, k: int, tiles: int, multiprocessors: int, residual: int = 0) -> Shape:
    """The shape for tiles of `height` rows: the fastest of `tools.bench.decode_shapes`, or close to it, on an H200.

    residual  weights have a second term
    """
    if is_narrow(height, outputs, k, tiles, multiprocessors):
        return Shape(16, 512, 4, 1, stages=4, split=1, ahead=True)
    # With more rows there are more sums for the same registers.
    narrow = height > 32 or (height > 16 and residual)
    width, depth, shares = (32, 128, 2) if narrow else (64, 128, 4) if height > 16 else (64, 256, 4)
    programs = triton.cdiv(outputs, width) * tiles
    split = max(1, min(multiprocessors // programs, triton.cdiv(k, 512)))
    # Programs that wait take the place of those whose sums others wait for.
    return Shape(width, depth, 4, shares, stages=4, split=split, ahead=split == 1)


def multiply_halves(
    x: Tensor, source: Source, outputs: int, height: int, table: Tensor | None, bias: Tensor | None,
    operand: Operand | None, shape: Shape,
) -> Tensor:  # fmt: skip
    """Return [rows, outputs] of x's dtype, rounded once, for x [rows, K], quantised first unless operand is None.

    source  a weight in blocks of 32; its rows are those of the table's experts, `outputs` each, or `outputs` in all
    table   of `Groups`, for tiles of `height` rows; None: tiles follow one another
    """
    rows, device, blocks = len(x), x.device, source.widths[1]
    length, split = cut(shape, blocks)
    unit = min(16, blocks & -blocks)  # what the width of a row of scales is known to be a multiple of
    codes, scales, macro, residual_codes, residual_scales = source.pointers
    if unit >= 4:
        scales, residual_scales = (
            None if part is None else part.view(torch.int32) for part in (scales, residual_scales)
        )
    ahead = shape.ahead and may_overlap(device)
    values, units = quantise_halves(x, operand, length * split, early=ahead)
    columns, tiles = triton.cdiv(outputs, shape.width), triton.cdiv(rows, height) if table is None else len(table)
    # The interpreter casts to bfloat16 by cutting bits off.
    out = torch.empty(rows, outputs, dtype=torch.float32 if INTERPRETED.value else x.dtype, device=device)
    partial = torch.empty(split, rows, outputs, dtype=torch.float32, device=device) if split > 1 else None
    constants = {key: value for key, value in source.constants.items() if key != "BLOCK"}
    _product[(columns, tiles, split)](
        values, values.stride(0), units, table, codes, scales, macro, residual_codes, residual_scales, source.alpha,
        bias, out, partial,
        finished(device, columns * tiles) if split > 1 else None,
        rows, outputs, source.widths[0], blocks // unit, source.widths[2],
        LENGTH=length, SPLIT=split, BM=height, WIDTH=shape.width, SHARES=shape.shares, DEPTH=shape.depth,
        EVEN=blocks * BLOCK == length * split, AHEAD=ahead, THREADS=32 * shape.warps, UNIT=unit, STAGES=shape.stages,
        **constants, num_warps=shape.warps, num_stages=shape.stages, launch_pdl=ahead,
    )  # fmt: skip
    return out.to(x.dtype)


def cut(shape: Shape, blocks: int) -> tuple[int, int]:
    """Elements of a part of the contraction over `blocks` blocks, and the number of parts."""
    steps = triton.cdiv(blocks * BLOCK, shape.depth)
    length = triton.cdiv(steps, shape.split)
    return length * shape.depth, triton.cdiv(steps, length)


@lru_cache
def may_overlap(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one ahead of it ends: from Hopper on."""
    return not INTERPRETED.value and torch.cuda.get_device_capability(device) >= (9, 0)
