"""Quantise a matrix along its rows with one float32 scale per row: the form of the fastest exact FP8 GEMM.

A row's unit follows from its largest block code, so the row is looked at twice. Rows up to `_HELD` elements wait in
registers for the second look, in the input's dtype and in chunks, so that few lanes idle on widths that are no power
of two; longer rows are read again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.device import (
    block_maxima,
    code_of,
    encode,
    largest_or_nan,
    power_of_two,
    tile_scales,
    uniform,
    unit_of,
)
from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Random, UnsupportedOperandError, options_of
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import NonFinite

_CHUNK = 2048
_HELD = 12 * _CHUNK


@triton.jit
def _largest(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The largest magnitude [ROWS] of the blocks without NaN or Inf, and whether there are others."""
    absmax, bad = block_maxima(tl.reshape(x, [ROWS, COLS // 128, 4, 32]))
    return tl.max(tl.max(absmax, axis=2), axis=1), tl.max(tl.reshape(bad.to(tl.int32), [ROWS * COLS // 32]))


@triton.jit
def _store_chunk(
    x, unit, target, row, column, rows, padded, seed, stream, draw_row, first_call, calls_per_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """Quantise x [ROWS, COLS] at (row, column) in units of 2^(unit - 127), one per row, and store the bytes."""
    tiles: tl.constexpr = COLS // 128
    blocks = tl.reshape(x, [ROWS, tiles, 4, 32])
    code, bad, _, factor, top = tile_scales(blocks, CARRY, 0)
    noise = 0.0
    if RANDOM:
        noise = uniform(seed, stream, 0, draw_row + row, column // 8, first_call, calls_per_row, ROWS, COLS // 8)
        noise = tl.reshape(noise, [ROWS, tiles, 4, 32])
    y = encode(blocks, code, bad, factor, top * 0 + unit[:, None], noise, SATURATE, False, RANDOM)
    y = tl.reshape(y, [ROWS, COLS]).to(tl.float8e4nv)
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLS)
    tl.store(target + column, y, mask=(r < rows)[:, None] & (c < padded)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _quantise_rows_kernel(
    x_pointer, stride, rows, columns, data, data_stride, scale, flag,
    seed, stream, draw_row, first_call, calls_per_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr, HELD: tl.constexpr, CARRY: tl.constexpr,
    SATURATE: tl.constexpr, RANDOM: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    r, c = row + tl.arange(0, ROWS), tl.arange(0, COLS)
    source = x_pointer + r.to(tl.int64)[:, None] * stride + c[None, :]
    target = data + r.to(tl.int64)[:, None] * data_stride + c[None, :]
    padded = tl.cdiv(columns, 128) * 128
    wrong = 0
    if HELD:
        held = ()
        for i in tl.static_range(CHUNKS):
            inside = (r < rows)[:, None] & (i * COLS + c < columns)[None, :]
            held += (tl.load(source + i * COLS, mask=inside, other=0.0),)
        largest = tl.abs(held[0].to(tl.float32))
        for i in tl.static_range(1, CHUNKS):
            largest = tl.maximum(largest, tl.abs(held[i].to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
        highest = largest_or_nan(largest, 1)
        if tl.max(tl.where(highest < float("inf"), 0, 1)) > 0:  # rare, so blocks are looked at one by one only here
            wrong = 1
            highest = tl.zeros([ROWS], tl.float32)
            for i in tl.static_range(CHUNKS):
                highest = tl.maximum(highest, _largest(held[i].to(tl.float32), ROWS, COLS)[0])
        unit = unit_of(code_of(highest, CARRY))  # the code grows with the maximum
        for i in tl.static_range(CHUNKS):
            _store_chunk(
                held[i].to(tl.float32), unit, target, row, i * COLS, rows, padded,
                seed, stream, draw_row, first_call, calls_per_row, ROWS, COLS, CARRY, SATURATE, RANDOM,
            )  # fmt: skip
    else:
        highest = tl.zeros([ROWS], tl.float32)
        for first in range(0, CHUNKS * COLS, COLS):
            inside = (r < rows)[:, None] & (first + c < columns)[None, :]
            largest, bad = _largest(tl.load(source + first, mask=inside, other=0.0).to(tl.float32), ROWS, COLS)
            highest, wrong = tl.maximum(highest, largest), tl.maximum(wrong, bad)
        unit = unit_of(code_of(highest, CARRY))
        for first in range(0, CHUNKS * COLS, COLS):
            inside = (r < rows)[:, None] & (first + c < columns)[None, :]
            x = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
            _store_chunk(
                x, unit, target, row, first, rows, padded,
                seed, stream, draw_row, first_call, calls_per_row, ROWS, COLS, CARRY, SATURATE, RANDOM,
            )  # fmt: skip
    if CHECK and wrong > 0:
        tl.atomic_or(flag, 1)
    tl.store(scale + r, power_of_two(unit), mask=r < rows)


def quantise_rows(
    x: Tensor,
    operand: Operand,
    *,
    draw: Draw | int | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
) -> Fp8Matrix:
    """Quantise x [rows, K] along K; returns form ROW.

    x  float32 or bfloat16, last axis contiguous (otherwise copied); magnitudes up to 6 * 2^125.

    Values equal `reference.quantise` while a row's block codes span at most 14 binades; beyond, see `forms`. Other
    arguments and errors as for `quant_tiles.quantise_tiles`; macro factors need a scale per tile, so not here.
    """
    options = options_of(operand)
    if options.macro_bits or options.hadamard:
        raise UnsupportedOperandError("one scale per row holds no macro factors or rotation: use quantise_tiles.")
    rows, k = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = empty_tiles(rows, k, Form.ROW, x.device)
    if not x.numel():
        return out
    flag = Flag(x.device, nonfinite)
    width, chunks, height, warps = launch_shape(k)
    random = Random.of(draw, k, options.stochastic)
    _quantise_rows_kernel[(triton.cdiv(rows, height),)](
        x, x.stride(0), rows, k, out.data, out.data.stride(0), out.scale, flag.pointer,
        random.seed, random.stream, random.row, random.first_call, random.calls_per_row,
        ROWS=height, COLS=width, CHUNKS=chunks, HELD=k <= _HELD, CARRY=options.carry, SATURATE=options.saturate,
        RANDOM=options.stochastic, CHECK=flag.checked, num_warps=warps,
    )  # fmt: skip
    flag.raise_if_set(x, name)
    return out


def launch_shape(k: int) -> tuple[int, int, int, int]:
    """Chunk width, chunks, rows of a program and its warps for rows of k elements.

    Chunks are powers of two, as wide as leaves at most an eighth of the lanes without elements; a program holds about
    80 elements a thread at most, measured best at K = 2048, 11008 and 22016.
    """
    width = _CHUNK
    while width > 128 and -(-k // width) * width - k > k // 8:
        width //= 2
    chunks = -(-k // width)
    return width, chunks, _CHUNK // width, 4 if chunks * _CHUNK <= 6 * 2048 else 8
