"""Products with packed weights in FP8: nibbles become E4M3 bytes in registers, 128 elements along K a step.

    y[m, n] = sum over tiles t of a_w[n, t] a_x[m, t] * sum over the tile of w[n, k] x[m, k]

x comes as form TILE of `forms`. Weights are read and expanded once for all the rows of a program: eight nibbles become
eight bytes with nine integer instructions, their block's scale included, which chooses the table of magnitudes that
the nibbles are looked up in. A tile is summed up by the tensor cores, and tiles in float32, as in an FP8 GEMM on what
`unpack` gives. Their 14 bits are exact for blocks a few binades apart; beyond, bits far below the largest product are
lost, at most 2^-12.5 of the sum of magnitudes. The contraction may be split over programs: the last of them to finish
adds the partial sums, always in one order.

Kernels start before those ahead of them end, and wait for them: launching takes as long as some products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxdist.quant.format import TILE
from mxdist.quant.kernels import terms
from mxdist.quant.kernels.decode_halves import may_overlap, reciprocal
from mxdist.quant.kernels.device import INTERPRETED, power_of_two, unit_of
from mxdist.quant.kernels.packed import Source
from mxdist.quant.kernels.parts import finished, is_last_part, sum_of_parts
from mxdist.quant.kernels.quant_lanes import quantise_lanes
from mxdist.quant.recipe import Operand
from mxdist.quant.tensor import MXTensor

# Four bytes of nibbles, $2, and a table of eight E4M3 magnitudes, $3 and $7, to eight bytes, $0 and $1: magnitudes are
# looked up by the nibbles, four at a time; their signs lie at the top of the bytes of the word and of its quadruple.
_EXPAND = tl.constexpr(
    """{
    .reg .b32 index, first, second, signs, moved;
    and.b32 index, $2, 0x77777777;
    prmt.b32 first, $3, $7, index;
    shr.b32 index, index, 16;
    prmt.b32 second, $3, $7, index;
    shl.b32 moved, $2, 4;
    prmt.b32 signs, moved, $2, 0x5140;
    lop3.b32 $0, signs, 0x80808080, first, 0xEA;
    prmt.b32 signs, moved, $2, 0x7362;
    lop3.b32 $1, signs, 0x80808080, second, 0xEA;
    }"""
)


@triton.jit
def tables(shift):
    """E4M3 magnitudes of 0, 0.5, 1, 1.5 and of 2, 3, 4, 6, times 2^shift, as words; shift is -8..6."""
    low = 0x3C383000 + shift * 0x08080800
    low = tl.where(shift < -5, tl.where(shift == -6, 0x0C080400, tl.where(shift == -7, 0x06040200, 0x03020100)), low)
    high = 0x4C484440 + shift * 0x08080808
    high = tl.where(shift < -6, tl.where(shift == -7, 0x14100C08, 0x0C080604), high)
    return low, high


@triton.jit
def _words(byte, low, high):
    """Eight elements of every four bytes [ROWS, N] by their block's tables [ROWS]: E4M3 [ROWS, N / 4, 2, 4]."""
    low, high = tl.broadcast_to(low[:, None], byte.shape), tl.broadcast_to(high[:, None], byte.shape)
    first, second = tl.inline_asm_elementwise(
        _EXPAND, "=r,=r,r,r,r,r,r,r,r,r,r", [byte, low, high], dtype=(tl.float8e4nv, tl.float8e4nv), is_pure=True,
        pack=4,
    )  # fmt: skip
    words = tl.reshape(tl.join(first, second), [byte.shape[0], byte.shape[1] // 4, 4, 2])
    return tl.permute(words, [0, 1, 3, 2])


@triton.jit
def expanded(byte, shift):
    """Values times 2^shift of bytes [ROWS, N], with a shift a line: E4M3 [ROWS, 2 N]; float32 for the interpreter.

    For shifts of -8 to 6; zeros remain so with any.
    """
    if INTERPRETED:
        value = tl.reshape(
            terms.e2m1_values(tl.join(byte & 15, byte >> 4).to(tl.int32)), [byte.shape[0], 2 * byte.shape[1]]
        )
        return value * power_of_two(tl.maximum(shift + 127, 1))[:, None]
    low, high = tables(shift)
    return tl.reshape(_words(byte, low, high), [byte.shape[0], 2 * byte.shape[1]])


@triton.jit
def _expanded_tiles(byte, shift, WIDTH: tl.constexpr):
    """As `expanded`, of bytes [WIDTH, 64], sixteen a block, and shifts [WIDTH, 4]: [WIDTH, 128].

    Element 32 b + 8 w + 4 h + i of a tile comes to 32 w + 16 h + 4 b + i, where the lane that holds block b needs it.
    """
    blocks = expanded(tl.reshape(byte, [WIDTH * 4, 16]), tl.reshape(shift, [WIDTH * 4]))
    return tl.reshape(tl.permute(tl.reshape(blocks, [WIDTH, 4, 4, 2, 4]), [0, 2, 3, 1, 4]), [WIDTH, 128])


@triton.jit
def _top(word):
    """The largest of the four bytes of words."""
    first = tl.maximum(word & 255, (word >> 8) & 255)
    return tl.maximum(first, tl.maximum((word >> 16) & 255, (word >> 24) & 255))


@triton.jit
def _factor(unit, byte, METHOD: tl.constexpr):
    """What bytes of weights are multiplied by: 2^(unit - 127), times the decode factor of a macro byte."""
    factor = power_of_two(unit)
    if METHOD == 3:  # as terms.factors
        return factor * (1.0 + byte.to(tl.float32) * 0.25)
    if METHOD != 0:
        return factor * reciprocal(1.0 + byte.to(tl.float32) * 0.00390625)
    return factor


@triton.jit
def _tile_sums(byte, word, shifts, held, WIDTH: tl.constexpr):
    """Products over a tile [WIDTH, BM], to be multiplied by both factors; and the weights' units [WIDTH].

    byte  codes [WIDTH, 64];  word  the tile's four E8M0 codes [WIDTH];  shifts  [1, 4], from memory
    """
    unit = unit_of(_top(word))
    w = _expanded_tiles(byte, ((word[:, None] >> shifts) & 255) - unit[:, None], WIDTH)
    if INTERPRETED:
        return tl.dot(w, tl.trans(held.to(tl.float32)), input_precision="ieee"), unit
    return tl.dot(w, tl.trans(held)), unit


@triton.jit
def _columns(held, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """The COUNT columns of [WIDTH, COUNT], 1, 2 or 4 of them; the last again where there are fewer than four."""
    if COUNT == 1:
        first = tl.reshape(held, [WIDTH])
        return first, first, first, first
    elif COUNT == 2:
        first, second = tl.split(held)
        return first, second, second, second
    else:
        even, odd = tl.split(tl.reshape(held, [WIDTH, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def _macro_bytes(macro, row, tile, tiles, WIDTH: tl.constexpr, GROUP: tl.constexpr, METHOD: tl.constexpr):
    """Macro bytes [WIDTH, GROUP] of tiles from `tile` on; zeros past the end of a row, and without macro factors."""
    if METHOD == 0:
        return tl.zeros((WIDTH, GROUP), tl.uint8)
    else:
        n = (tile + tl.arange(0, GROUP))[None, :]
        return tl.load(macro + row[:, None] * tiles + n, mask=n < tiles, other=0)


@triton.jit(do_not_specialize=["rows", "groups", "length"])
def _product(
    x, x_stride, x_scale, codes, scale_words, macro, shift_table, bias, out, partial, finished,
    rows, outputs, groups, length,
    SPLIT: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, METHOD: tl.constexpr,
    EARLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles, first_group = groups * GROUP, tl.program_id(2) * length
    column, r = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.program_id(1) * BM + tl.arange(0, BM)
    weight_row = tl.minimum(column, outputs - 1).to(tl.int64)  # beyond the end, any will do
    if EARLY:
        gdc_wait()  # all that is read or written from here on may be of the kernel ahead
        gdc_launch_dependents()  # not sooner: kernels that wait would pile up and take the room of this one
    shifts = tl.load(shift_table + tl.arange(0, 4))[None, :]  # from memory: Triton then loads all in one layout
    group = tl.arange(0, GROUP)[None, :]
    byte_pointers = codes + weight_row[:, None] * (tiles * 64) + tl.arange(0, 64)[None, :]
    word_pointers = scale_words + weight_row[:, None] * tiles + group
    held_pointers = x + r.to(tl.int64)[:, None] * x_stride + tl.arange(0, 128)[None, :]
    x_scale_pointers = x_scale + r.to(tl.int64)[:, None] * tiles + group
    total = tl.zeros((WIDTH, BM), tl.float32)
    macro_bytes = _macro_bytes(macro, weight_row, first_group * GROUP, tiles, WIDTH, GROUP, METHOD)
    for g in tl.range(first_group, tl.minimum(first_group + length, groups), num_stages=STAGES):
        t = g * GROUP
        # A step ahead: too few bytes for the pipeline.
        next_bytes = _macro_bytes(macro, weight_row, t + GROUP, tiles, WIDTH, GROUP, METHOD)
        words = _columns(tl.load(word_pointers + t), WIDTH, GROUP)
        x_factors = _columns(tl.load(x_scale_pointers + t), BM, GROUP)
        macros = _columns(macro_bytes, WIDTH, GROUP)
        for i in tl.static_range(GROUP):
            byte, held = tl.load(byte_pointers + (t + i) * 64), tl.load(held_pointers + (t + i) * 128)
            sums, unit = _tile_sums(byte, words[i], shifts, held, WIDTH)
            total += sums * (_factor(unit, macros[i], METHOD)[:, None] * x_factors[i][None, :])
        macro_bytes = next_bytes
    to, inside = r.to(tl.int64)[None, :] * outputs + column[:, None], (r < rows)[None, :] & (column < outputs)[:, None]
    if SPLIT > 1:
        size = rows.to(tl.int64) * outputs
        count = finished + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if not is_last_part(total, partial, count, tl.program_id(2), size, to, inside, SPLIT):
            return
        total = sum_of_parts(partial, count, size, to, inside, SPLIT)
    if bias is not None:
        total += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[:, None]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a product is cut.

    height  rows of a program: of x
    width   outputs of a program, 64 for every four warps at least
    warps   of a program
    stages  of the pipeline
    group   tiles along K of a step, 1, 2 or 4: their scales are read together
    split   programs along K
    """

    height: int
    width: int
    warps: int
    stages: int
    group: int
    split: int


def tile_shape_of(rows: int, outputs: int, tiles: int, multiprocessors: int) -> TileShape:
    """The shape for x [rows, 128 tiles] and W [outputs, 128 tiles], by what an H200 did (`tools.bench.decode_shapes`).

    Measured for the linears of Qwen2.5-3B and 8 to 256 rows.
    """
    height = max(16, min(64, triton.next_power_of_2(rows)))
    programs = triton.cdiv(outputs, 64) * triton.cdiv(rows, height)
    # Two programs a multiprocessor where they have enough to do; the sums of a split short row cost more than it saves.
    wanted = (2 if tiles > 32 else 1) * multiprocessors
    split = max(1, min(round(wanted / programs), tiles // 4))
    return TileShape(height, width=64, warps=4, stages=3, group=2, split=split)


def multiply_tiles(x: Tensor, weight: MXTensor, bias: Tensor | None, operand: Operand, shape: TileShape) -> Tensor:
    """Return Q(x) W^T + bias [rows, N] of x's dtype, rounded once, for x [rows, K] and W packed [N, K].

    `options.runs_in_tiles` says for which weights and operands of x.
    """
    source, (rows, k), device = Source.of(weight), x.shape, x.device
    outputs, tiles = weight.shape[0], k // TILE
    group = math.gcd(shape.group, tiles)
    length = triton.cdiv(tiles // group, shape.split)
    split = triton.cdiv(tiles // group, length)
    early = may_overlap(device)
    values, factors = quantise_lanes(x, operand, shape.height, early)
    columns, heights = triton.cdiv(outputs, shape.width), triton.cdiv(rows, shape.height)
    # The interpreter casts to bfloat16 by cutting bits off.
    out = torch.empty(rows, outputs, dtype=torch.float32 if INTERPRETED.value else x.dtype, device=device)
    partial = torch.empty(split, rows, outputs, dtype=torch.float32, device=device) if split > 1 else None
    codes, scales, macro, _, _ = source.pointers
    assert scales is not None
    _product[(columns, heights, split)](
        values, k, factors, codes, scales.view(torch.int32), macro, _shifts(device), bias, out, partial,
        finished(device, columns * heights) if split > 1 else None, rows, outputs, tiles // group, length,
        SPLIT=split, BM=shape.height, WIDTH=shape.width, GROUP=group, METHOD=source.constants["METHOD"], EARLY=early,
        STAGES=shape.stages, num_warps=shape.warps, num_stages=shape.stages, launch_pdl=early,
    )  # fmt: skip
    return out.to(x.dtype)


_shift_tables: dict[torch.device, Tensor] = {}


def _shifts(device: torch.device) -> Tensor:
    """Where each of a word's four codes begins."""
    table = _shift_tables.get(device)
    if table is None:
        table = torch.arange(0, 32, 8, dtype=torch.int32, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():  # a graph would keep it its own
            _shift_tables[device] = table
    return table
