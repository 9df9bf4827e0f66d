"""Quantise a matrix along its rows with one float32 scale per row: the form of the fastest exact FP8 GEMM.

A row's unit follows from its largest block code, so the row is looked at twice. Rows up to `_ONE_READ` elements stay
in registers; longer ones are read again, which the caches serve.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.device import block_maxima, code_of, encode, power_of_two, tile_scales, uniform, unit_of
from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Random, UnsupportedOperandError, options_of
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import NonFinite

_ONE_READ = 16384
_CHUNK = 4096  # of a longer row at a time


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x_pointer, stride, rows, columns, data, data_stride, scale, flag,
    seed, stream, draw_row, first_call, calls_per_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr,
    RANDOM: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = COLS // 128
    row = tl.program_id(0) * ROWS
    r, c = row + tl.arange(0, ROWS), tl.arange(0, COLS)
    source = x_pointer + r.to(tl.int64)[:, None] * stride + c[None, :]
    target = data + r.to(tl.int64)[:, None] * data_stride + c[None, :]
    padded = tl.cdiv(columns, 128) * 128
    if CHUNKS == 1:
        x = tl.load(source, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0).to(tl.float32)
        blocks = tl.reshape(x, [ROWS, tiles, 4, 32])
        code, bad, _, factor, top = tile_scales(blocks, CARRY, 0)
        highest = tl.max(top, axis=1)
        unit = unit_of(highest)
        noise = 0.0
        if RANDOM:
            noise = uniform(seed, stream, 0, draw_row + row, 0, first_call, calls_per_row, ROWS, COLS // 8)
            noise = tl.reshape(noise, [ROWS, tiles, 4, 32])
        y = encode(blocks, code, bad, factor, top * 0 + unit[:, None], noise, SATURATE, False, RANDOM)
        y = tl.reshape(y, [ROWS, COLS]).to(tl.float8e4nv)
        tl.store(target, y, mask=(r < rows)[:, None] & (c < padded)[None, :])
        wrong = tl.max(bad.to(tl.int32).reshape([ROWS * tiles * 4]))
    else:
        highest = tl.full([ROWS], 0.0, tl.float32)
        wrong = 0
        for first in range(0, CHUNKS * COLS, COLS):
            inside = (r < rows)[:, None] & (first + c < columns)[None, :]
            x = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
            absmax, bad = block_maxima(tl.reshape(x, [ROWS, tiles, 4, 32]))
            highest = tl.maximum(highest, tl.max(tl.max(absmax, axis=2), axis=1))
            if CHECK:
                wrong = tl.maximum(wrong, tl.max(bad.to(tl.int32).reshape([ROWS * tiles * 4])))
        unit = unit_of(code_of(highest, CARRY))  # the code grows with the maximum
        for first in range(0, CHUNKS * COLS, COLS):
            inside = (r < rows)[:, None] & (first + c < columns)[None, :]
            x = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
            blocks = tl.reshape(x, [ROWS, tiles, 4, 32])
            code, bad, _, factor, top = tile_scales(blocks, CARRY, 0)
            noise = 0.0
            if RANDOM:
                noise = uniform(seed, stream, 0, draw_row + row, first // 8, first_call, calls_per_row, ROWS, COLS // 8)
                noise = tl.reshape(noise, [ROWS, tiles, 4, 32])
            y = encode(blocks, code, bad, factor, top * 0 + unit[:, None], noise, SATURATE, False, RANDOM)
            y = tl.reshape(y, [ROWS, COLS]).to(tl.float8e4nv)
            tl.store(target + first, y, mask=(r < rows)[:, None] & (first + c < padded)[None, :])
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
    width = max(128, triton.next_power_of_2(k)) if k <= _ONE_READ else _CHUNK
    height = max(1, 2048 // width)
    random = Random.of(draw, k, options.stochastic)
    _kernel[(triton.cdiv(rows, height),)](
        x, x.stride(0), rows, k, out.data, out.data.stride(0), out.scale, flag.pointer,
        random.seed, random.stream, random.row, random.first_call, random.calls_per_row,
        ROWS=height, COLS=width, CHUNKS=triton.cdiv(k, width), CARRY=options.carry, SATURATE=options.saturate,
        RANDOM=options.stochastic, CHECK=flag.checked, num_warps=4 if width < 4096 else 8,
    )  # fmt: skip
    flag.raise_if_set(x, name)
    return out
