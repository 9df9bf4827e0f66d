"""What the tile quantisers do with one piece of a matrix: quantise it along rows or columns, store bytes and scales."""

from __future__ import annotations

import triton
import triton.language as tl

from mxdist.quant.kernels.device import encode, scale_of, tile_scales, uniform, unit_of
from mxdist.quant.kernels.runs import load_runs, quantise_runs, rotate_runs


@triton.jit
def quantise_piece(
    x, row, column, data, data_stride, scale, scale_stride, flag, rows, columns,
    seed, stream, draw_row, first_call, calls_per_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr,
    MACRO_BITS: tl.constexpr, RANDOM: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Quantise x [ROWS, COLS], the piece at (row, column) of [rows, columns], along its rows; one scale per tile.

    Returns the largest unit of a tile, int32.
    """
    tiles: tl.constexpr = COLS // 128
    blocks = tl.reshape(x, [ROWS, tiles, 4, 32])
    code, bad, _, factor, top = tile_scales(blocks, CARRY, MACRO_BITS)
    if CHECK and tl.max(bad.to(tl.int32).reshape([ROWS * tiles * 4])) > 0:
        tl.atomic_or(flag, 1)
    unit = unit_of(top)
    noise = 0.0
    if RANDOM:
        noise = uniform(seed, stream, 0, draw_row + row, column // 8, first_call, calls_per_row, ROWS, COLS // 8)
        noise = tl.reshape(noise, [ROWS, tiles, 4, 32])
    y = tl.reshape(encode(blocks, code, bad, factor, unit, noise, SATURATE, MACRO_BITS > 0, RANDOM), [ROWS, COLS])

    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLS)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(data + r.to(tl.int64)[:, None] * data_stride + c[None, :], y.to(tl.float8e4nv), mask=inside)

    value = scale_of(unit, factor, MACRO_BITS > 0)
    first_tile = column // 128
    tile = first_tile + tl.arange(0, tiles)
    inside = (r < rows)[:, None] & (tile < columns // 128)[None, :]
    tl.store(scale + tile.to(tl.int64)[None, :] * scale_stride + r[:, None], value, mask=inside)
    return tl.max(tl.reshape(unit, [ROWS * tiles]))


@triton.jit
def quantise_piece_by_row(
    x_pointer, stride, row, column, rows, columns, data, data_stride, scale, scale_stride, flag,
    seed, stream, draw_row, first_call, calls_per_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr, MACRO_BITS: tl.constexpr,
    RANDOM: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Quantise the piece [ROWS, COLS] of x [rows, columns] along its rows, COLS a multiple of 128; see above."""
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLS)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(x_pointer + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    return quantise_piece(
        x, row, column, data, data_stride, scale, scale_stride, flag, rows, tl.cdiv(columns, 128) * 128,
        seed, stream, draw_row, first_call, calls_per_row,
        ROWS, COLS, CARRY, SATURATE, MACRO_BITS, RANDOM, CHECK,
    )  # fmt: skip


@triton.jit
def quantise_piece_by_column(
    x_pointer, stride, row, column, rows, columns, data, data_stride, scale, scale_stride, flag, square_unit,
    seed, stream, draw_row, first_call, calls_per_row,
    COLS: tl.constexpr, SCALES: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr, MACRO_BITS: tl.constexpr,
    RANDOM: tl.constexpr, HADAMARD: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Quantise the piece [128, COLS] of x [rows, columns] along its columns, see `runs.quantise_runs`."""
    xs = load_runs(x_pointer, stride, row, column, rows, columns, COLS)
    if HADAMARD:
        xs = rotate_runs(xs)
    quantise_runs(
        xs, row, column, rows, columns, data, data_stride, scale, scale_stride, flag, square_unit,
        seed, stream, draw_row, first_call, calls_per_row,
        COLS, SCALES, CARRY, SATURATE, MACRO_BITS, RANDOM, CHECK,
    )  # fmt: skip
