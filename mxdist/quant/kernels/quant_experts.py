"""Quantise what the GEMMs of experts read along both axes, fused with what produces it: one launch for all experts.

    tokens   rows as they came, filled up on the way: those that fill up never exist in bfloat16
    rows     rows that are filled up already
    swiglu   silu(gate) up, from the first GEMM's output; rounded as bfloat16 on its way, but never written

SwiGLU's backward is a kernel of its own that writes bfloat16: fused with its quantisers it was slower (1.03 ms against
0.98 ms for 262,144 rows of 768 on an H200), for want of registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Options, Random
from mxdist.quant.kernels.piece import quantise_piece
from mxdist.quant.kernels.quant_both import RANDOM_SHAPE, SHAPE
from mxdist.quant.kernels.quant_pairs import PARTS, WARPS, columns_of_pairs, pairs_fit, rows_of_pairs
from mxdist.quant.kernels.runs import GIVEN, TILES, quantise_runs, rotate_runs
from mxdist.quant.kernels.segments import ByColumn, ByRow, Segments
from mxdist.quant.kernels.swiglu import swiglu

TOKENS, ROWS_THERE, SWIGLU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _produce(x, x_stride, map, r, c, half, SOURCE: tl.constexpr):
    """Rows r and columns c: of tokens, map being int32 tokens; of rows; or of SwiGLU in float32."""
    if SOURCE == SWIGLU:
        at = x + r.to(tl.int64)[:, None] * x_stride + c[None, :]
        gate, up = tl.load(at).to(tl.float32), tl.load(at + half).to(tl.float32)
        values = swiglu(gate, up)
    elif SOURCE == TOKENS:
        token = tl.load(map + r)
        at = x + token.to(tl.int64)[:, None] * x_stride + c[None, :]
        values = tl.load(at, mask=(token >= 0)[:, None] & (c >= 0)[None, :], other=0.0)
    else:
        values = tl.load(x + r.to(tl.int64)[:, None] * x_stride + c[None, :])
    return values


@triton.jit
def _quantise_experts_kernel(
    x, x_stride, map, half, table, width, data, scale, data_t, scale_t, margin, flag, seed, stream, seed_t, stream_t,
    SOURCE: tl.constexpr, BY_COLUMN: tl.constexpr, SQUARES: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHECK: tl.constexpr,
    CARRY: tl.constexpr, SATURATE: tl.constexpr, MACRO_BITS: tl.constexpr, RANDOM: tl.constexpr,
    CARRY_T: tl.constexpr, SATURATE_T: tl.constexpr, RANDOM_T: tl.constexpr, HADAMARD_T: tl.constexpr,
):  # fmt: skip
    tile, column = tl.program_id(1), tl.program_id(0) * 128
    first, tiles, fourth = tl.load(table + 5 * tile), tl.load(table + 5 * tile + 1), tl.load(table + 5 * tile + 2)
    expert, size = tl.load(table + 5 * tile + 3), tl.load(table + 5 * tile + 4)
    row, start = 128 * (tile - first), 128 * first.to(tl.int64)
    unit = 1
    for part in range(0, 128, ROWS):
        r, c = 128 * tile + part + tl.arange(0, ROWS), column + tl.arange(0, 128)
        highest = quantise_piece(
            _produce(x, x_stride, map, r, c, half, SOURCE).to(tl.float32), row + part, column,
            data + start * width, width, scale + start * (width // 128), 128 * tiles, flag, 128 * tiles, width,
            seed + expert, stream, 0, 0, tl.cdiv(width, 8),
            ROWS, 128, CARRY, SATURATE, MACRO_BITS, RANDOM, CHECK,
        )  # fmt: skip
        unit = tl.maximum(unit, highest)
    if BY_COLUMN:
        if SQUARES:
            scales, stride = scale_t + (width // 128) * fourth.to(tl.int64), tl.cdiv(tiles, 4) * 4
        else:
            scales, stride = scale_t + first.to(tl.int64) * width, width
        for part in range(0, 128, COLS):
            r, c = 128 * tile + 32 * tl.arange(0, 4), column + part + tl.arange(0, COLS)
            xs = ()
            for i in tl.static_range(32):
                xs += (_produce(x, x_stride, map, r + i, c, half, SOURCE),)
            if HADAMARD_T:
                xs = rotate_runs(xs)
            quantise_runs(
                xs, row, column + part, 128 * tiles, width, data_t + start * width, 128 * tiles, scales, stride, flag,
                unit + margin, seed_t + expert, stream_t, 0, 0, tl.cdiv(size, 8),
                COLS, GIVEN if SQUARES else TILES, CARRY_T, SATURATE_T, 0, RANDOM_T, False,
            )  # fmt: skip


@triton.jit
def _quantise_expert_pairs_kernel(
    x, x_stride, map, table, words, data, scale, data_t, scale_t, flag,
    PARTS: tl.constexpr, SQUARES: tl.constexpr, CHECK: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """`_quantise_experts_kernel` for tokens and rows as `quant_pairs` does them."""
    x_words, data_t_words = x.to(tl.pointer_type(tl.int32)), data_t.to(tl.pointer_type(tl.int32))
    data_halves = data.to(tl.pointer_type(tl.int16))
    tile, word = tl.program_id(1), tl.program_id(0) * 64
    first, tiles, fourth = tl.load(table + 5 * tile), tl.load(table + 5 * tile + 1), tl.load(table + 5 * tile + 2)
    row, start = 128 * (tile - first), 128 * first.to(tl.int64)
    rows = 128 * tiles
    unit = rows_of_pairs(
        x_words, x_stride, 128 * tile, 128 * (tile + 1), map, word, words, flag, row, rows, data_halves + start * words,
        words, scale + start * (words // 64), rows, PARTS, CARRY, CHECK,
    )  # fmt: skip
    if SQUARES:
        scales, stride = scale_t + (words // 64) * fourth.to(tl.int64), tl.cdiv(tiles, 4) * 4
    else:
        scales, stride = scale_t + first.to(tl.int64) * 2 * words, 2 * words
    columns_of_pairs(
        x_words, x_stride, 128 * tile, 128 * (tile + 1), map, word, words, row, data_t_words + start * (words // 2),
        rows // 4, scales, stride, unit, SQUARES, CARRY,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """One orientation of a result: its operand, and where its random numbers start; expert e draws with seed + e."""

    options: Options
    random: Random = Random()  # noqa: RUF009 - frozen


def quantise_experts(
    x: Tensor,
    segments: Segments,
    *,
    source: tl.constexpr = TOKENS,
    row: Wanted,
    column: Wanted | None = None,
    column_form: Form = Form.TILE,
    flag: Flag,
) -> tuple[ByRow, ByColumn | None]:
    """Quantise the experts' rows along K as `row` says and, unless `column` is None, along tokens as it says.

    x              bfloat16: rows as they came [R, K] for TOKENS, filled up [rows, K] for ROWS_THERE, and for SWIGLU the
                   first GEMM's output [rows, 2 K], gate before up. K is a multiple of 128.
    column_form    TILE, or SQUARE; a square's unit is the largest of its rows'.
    """
    k = x.shape[1] // 2 if source == SWIGLU else x.shape[1]
    by_row = ByRow.empty(segments, k)
    by_column = ByColumn.empty(segments, k, column_form, column.options.hadamard) if column else None
    if not segments.rows:
        return by_row, by_column
    if by_column and column and source != SWIGLU and pairs_fit(x, row.options, column.options):
        _quantise_expert_pairs_kernel[(k // TILE, len(segments.table))](
            x, x.stride(0) // 2, segments.source if source == TOKENS else None, segments.table, k // 2,
            by_row.data, by_row.scale, by_column.data, by_column.scale, flag.pointer,
            PARTS=PARTS, SQUARES=column_form is Form.SQUARE, CHECK=flag.checked, CARRY=row.options.carry,
            num_warps=WARPS,
        )  # fmt: skip
        return by_row, by_column
    other = column or Wanted(NOTHING)
    height, width, warps = RANDOM_SHAPE if other.options.stochastic else SHAPE
    # Rows rounded by a rule that saturates may have units one binade below what the columns' rule asks for.
    margin = int(row.options.carry < other.options.carry)
    _quantise_experts_kernel[(k // TILE, len(segments.table))](
        x, x.stride(0), segments.source, k, segments.table, k,
        by_row.data, by_row.scale, by_column and by_column.data, by_column and by_column.scale, margin, flag.pointer,
        row.random.seed, row.random.stream, other.random.seed, other.random.stream,
        SOURCE=source, BY_COLUMN=column is not None, SQUARES=column_form is Form.SQUARE,
        ROWS=height if column else height // 2, COLS=width, CHECK=flag.checked,
        CARRY=row.options.carry, SATURATE=row.options.saturate, MACRO_BITS=row.options.macro_bits,
        RANDOM=row.options.stochastic, CARRY_T=other.options.carry, SATURATE_T=other.options.saturate,
        RANDOM_T=other.options.stochastic, HADAMARD_T=other.options.hadamard, num_warps=warps,
    )  # fmt: skip
    return by_row, by_column


NOTHING = Options(carry=0, saturate=False, macro_bits=0, stochastic=False, hadamard=False)
