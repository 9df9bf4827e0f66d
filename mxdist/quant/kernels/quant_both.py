"""Quantise a matrix along its rows and along its columns from one read of device memory.

A program owns a 128 x 128 square. It reads it once for the rows and again for the columns, which the caches serve:
holding the square for both needs so many registers that it is slower (measured on an H200 at 16384 x 22016: 0.50 ms
this way, 0.62 ms held, 0.53 ms in two launches). What limits it is arithmetic: two roundings of every element fill the
integer pipe to two thirds, against half of the memory's time. `quant_pairs` does the plain ones with less.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.forms import Form, Fp8Matrix
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Options, Random
from mxdist.quant.kernels.piece import quantise_piece_by_column, quantise_piece_by_row
from mxdist.quant.kernels.runs import GIVEN, TILES

# Rows at a time along rows, columns at a time along columns, and warps; random bits need registers.
SHAPE, RANDOM_SHAPE = (128, 128, 8), (128, 32, 4)


@triton.jit(do_not_specialize=["rows"])
def _quantise_both_kernel(
    x, stride, rows, columns, flag, data, data_stride, scale, scale_stride,
    data_t, data_t_stride, scale_t, scale_t_stride,
    seed, stream, draw_row, first_call, calls_per_row,
    seed_t, stream_t, draw_row_t, first_call_t, calls_per_row_t,
    ROWS: tl.constexpr, COLS: tl.constexpr, SQUARES: tl.constexpr, CHECK: tl.constexpr,
    CARRY: tl.constexpr, SATURATE: tl.constexpr, MACRO_BITS: tl.constexpr, RANDOM: tl.constexpr,
    CARRY_T: tl.constexpr, SATURATE_T: tl.constexpr, MACRO_BITS_T: tl.constexpr, RANDOM_T: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(1) * 128, tl.program_id(0) * 128
    unit = 1
    for part in range(0, 128, ROWS):
        highest = quantise_piece_by_row(
            x, stride, row + part, column, rows, columns, data, data_stride, scale, scale_stride, flag,
            seed, stream, draw_row, first_call, calls_per_row,
            ROWS, 128, CARRY, SATURATE, MACRO_BITS, RANDOM, CHECK,
        )  # fmt: skip
        unit = tl.maximum(unit, highest)
    for part in range(0, 128, COLS):
        quantise_piece_by_column(
            x, stride, row, column + part, rows, columns, data_t, data_t_stride, scale_t, scale_t_stride, flag, unit,
            seed_t, stream_t, draw_row_t, first_call_t, calls_per_row_t,
            COLS, GIVEN if SQUARES else TILES, CARRY_T, SATURATE_T, MACRO_BITS_T, RANDOM_T, False, False,
        )  # fmt: skip


def one_read_fits(row: Options, column: Options) -> bool:
    """True when this kernel does both operands: not rotated ones, and both with the same scale rule.

    The unit of a square, shared by its columns, is then the largest of its rows. Macro factors along rows only raise
    the rows' units, by one binade at most, which the square's columns have to spare.
    """
    return not column.hadamard and row.carry == column.carry


def launch_both(
    x: Tensor, by_row: Fp8Matrix, row: Options, row_random: Random, by_column: Fp8Matrix, column: Options,
    column_random: Random, flag: Flag,
) -> None:  # fmt: skip
    """Quantise x [rows, K] into `by_row`, form TILE, and `by_column`, form TILE or SQUARE."""
    if not x.numel():
        return
    squares = by_column.form is Form.SQUARE
    rows, k = x.shape
    height, width, warps = RANDOM_SHAPE if column.stochastic else SHAPE
    _quantise_both_kernel[(-(-k // 128), -(-rows // 128))](
        x, x.stride(0), rows, k, flag.pointer,
        by_row.data, by_row.data.stride(0), by_row.scale, by_row.scale.stride(1),
        by_column.data, by_column.data.stride(0), by_column.scale, by_column.scale.stride(0 if squares else 1),
        row_random.seed, row_random.stream, row_random.row, row_random.first_call, row_random.calls_per_row,
        column_random.seed, column_random.stream, column_random.row, column_random.first_call,
        column_random.calls_per_row,
        ROWS=height, COLS=width, SQUARES=squares, CHECK=flag.checked,
        CARRY=row.carry, SATURATE=row.saturate, MACRO_BITS=row.macro_bits, RANDOM=row.stochastic,
        CARRY_T=column.carry, SATURATE_T=column.saturate, MACRO_BITS_T=column.macro_bits, RANDOM_T=column.stochastic,
        num_warps=warps,
    )  # fmt: skip
