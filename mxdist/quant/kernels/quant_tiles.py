"""Quantise a matrix into 1 x 128 tiles of E4M3, along its rows, along its columns, or both.

The column form is the operand of wgrad, whose contraction runs over tokens: it comes out transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Options, Random, UnsupportedOperandError, options_of
from mxdist.quant.kernels.piece import quantise_piece_by_column, quantise_piece_by_row
from mxdist.quant.kernels.quant_both import launch_both, one_read_fits
from mxdist.quant.kernels.quant_pairs import launch_pairs, pairs_fit
from mxdist.quant.kernels.runs import PIECE, TILES
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import NonFinite

# Rows and columns of a program's piece, and its warps.
_ROWS_ONLY = (64, 128, 4)
_COLUMNS_ONLY = (128, 64, 4)  # a column tile is 128 tokens
_SQUARES = (128, 128, 8)


# Rows are no compile-time constant, not even 1: token counts change from step to step.
@triton.jit(do_not_specialize=["rows"])
def _quantise_tiles_kernel(
    x_pointer, stride, rows, columns, flag, data, data_stride, scale, scale_stride,
    seed, stream, draw_row, first_call, calls_per_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, BY_COLUMN: tl.constexpr, ONE_SCALE: tl.constexpr, CARRY: tl.constexpr,
    SATURATE: tl.constexpr, MACRO_BITS: tl.constexpr, RANDOM: tl.constexpr, HADAMARD: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(1) * ROWS, tl.program_id(0) * COLS
    if BY_COLUMN:
        quantise_piece_by_column(
            x_pointer, stride, row, column, rows, columns, data, data_stride, scale, scale_stride, flag, 0,
            seed, stream, draw_row, first_call, calls_per_row,
            COLS, PIECE if ONE_SCALE else TILES, CARRY, SATURATE, MACRO_BITS, RANDOM, HADAMARD, CHECK,
        )  # fmt: skip
    else:
        quantise_piece_by_row(
            x_pointer, stride, row, column, rows, columns, data, data_stride, scale, scale_stride, flag,
            seed, stream, draw_row, first_call, calls_per_row,
            ROWS, COLS, CARRY, SATURATE, MACRO_BITS, RANDOM, CHECK,
        )  # fmt: skip


def quantise_tiles(
    x: Tensor,
    row: Operand | None = None,
    column: Operand | None = None,
    *,
    column_form: Form = Form.TILE,
    row_draw: Draw | int | None = None,
    column_draw: Draw | int | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
) -> tuple[Fp8Matrix | None, Fp8Matrix | None]:
    """Quantise x [rows, K] along K as `row` says, along its rows as `column` says; None leaves one out.

    x            float32 or bfloat16, last axis contiguous (otherwise copied); magnitudes up to 6 * 2^125.
    column_form  TILE, or SQUARE: then each 128 x 128 square of x^T shares a scale (not with macro factors).
    row_draw, column_draw  random bits for stochastic rounding, as for `reference.quantise` of x and of x^T.
    nonfinite    "error" raises ValueError and waits for the device; "propagate" makes blocks with NaN or Inf NaN.

    Returns (matrix [rows, K] in form TILE, matrix [K, rows] in `column_form`), equal to `reference.quantise` of x and
    x^T. Raises `UnsupportedOperandError` for operands these kernels do not do.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    flag = Flag(x.device, nonfinite)
    row_options = None if row is None else options_of(row)
    column_options = None if column is None else options_of(column)
    _check(row_options, column_options, column_form)
    by_row = by_column = None
    (rows, k), device = x.shape, x.device
    if row_options is not None:
        by_row = empty_tiles(rows, k, Form.TILE, device)
        row_random = Random.of(row_draw, k, row_options.stochastic)
    if column_options is not None:
        by_column = empty_tiles(k, rows, column_form, device, column_options.hadamard)
        column_random = Random.of(column_draw, rows, column_options.stochastic)
    if by_row and row_options and by_column and column_options and one_read_fits(row_options, column_options):
        if pairs_fit(x, row_options, column_options):
            launch_pairs(x, by_row, by_column, row_options, flag)
        else:
            launch_both(x, by_row, row_options, row_random, by_column, column_options, column_random, flag)
    else:
        if by_row and row_options:
            _launch(x, by_row, row_options, row_random, flag, False)
        if by_column and column_options:
            _launch(x, by_column, column_options, column_random, flag, True)
    flag.raise_if_set(x, name)
    return by_row, by_column


def _launch(x: Tensor, out: Fp8Matrix, options: Options, random: Random, flag: Flag, by_column: bool) -> None:
    if not x.numel():
        return
    rows, k = x.shape
    height, width, warps = _ROWS_ONLY
    if by_column:
        height, width, warps = _SQUARES if out.form is Form.SQUARE else _COLUMNS_ONLY
        if options.stochastic and out.form is Form.TILE:
            width = 32  # random bits need registers
    _quantise_tiles_kernel[(-(-k // width), -(-rows // height))](
        x, x.stride(0), rows, k, flag.pointer,
        out.data, out.data.stride(0), out.scale, out.scale.stride(0 if out.form is Form.SQUARE else 1),
        random.seed, random.stream, random.row, random.first_call, random.calls_per_row,
        ROWS=height, COLS=width, BY_COLUMN=by_column, ONE_SCALE=out.form is Form.SQUARE,
        CARRY=options.carry, SATURATE=options.saturate, MACRO_BITS=options.macro_bits, RANDOM=options.stochastic,
        HADAMARD=options.hadamard, CHECK=flag.checked, num_warps=warps,
    )  # fmt: skip


def _check(row: Options | None, column: Options | None, column_form: Form) -> None:
    if row is not None and row.hadamard:
        raise UnsupportedOperandError("the kernels rotate only operands of wgrad: the reference backend does others.")
    if column_form is Form.ROW:
        raise ValueError("a column's scale over all tokens needs a second read: use TILE or SQUARE.")
    if column_form is Form.SQUARE and column is not None and column.macro_bits:
        raise UnsupportedOperandError("a 128 x 128 square has one scale, so no macro factor per row: use TILE.")
