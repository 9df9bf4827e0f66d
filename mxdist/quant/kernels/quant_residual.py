"""Quantise along rows into 1 x 128 tiles of E4M3 with any macro method, and append the residuals of listed tiles.

Outlier fallback as a longer GEMM: [x1 | alpha x2] [W | W of the listed tiles]^T. The list is the same in every row, so
a product grows by its share of K, whatever the data: by one tile of 16 at K = 2048, four of 86 at K = 11008.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels import terms
from mxdist.quant.kernels.device import power_of_two
from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Random, TermOptions
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import NonFinite

SHAPE = (32, 4)
"""Rows of a program's piece, which is a tile wide, and its warps."""


@triton.jit
def _store(y, unit, g, rows, r, at, data, data_stride, scale, scale_stride, ROWS: tl.constexpr):
    """Store a term in units as bytes of tile `at`, and its scales."""
    c = at * 128 + tl.arange(0, 128)
    y = tl.reshape(y, [ROWS, 128]).to(tl.float8e4nv)
    tl.store(data + r.to(tl.int64)[:, None] * data_stride + c[None, :], y, mask=(r < rows)[:, None])
    value = tl.reshape(power_of_two(unit) * g, [ROWS])
    tl.store(scale + at.to(tl.int64) * scale_stride + r, value, mask=r < rows)


@triton.jit(do_not_specialize=["rows"])
def _quantise_residual_kernel(
    x, stride, rows, columns, flag, slots, alpha, data, data_stride, scale, scale_stride,
    seed, stream, draw_row, first_call, calls_per_row,
    ROWS: tl.constexpr, METHOD: tl.constexpr, BITS: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr,
    RANDOM: tl.constexpr, LISTED: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(1) * ROWS, tl.program_id(0)
    r, c = row + tl.arange(0, ROWS), tile * 128 + tl.arange(0, 128)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    loaded = tl.load(x + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    noise = 0.0
    if RANDOM:
        noise = terms.tile_noise(seed, stream, 0, draw_row + row, tile, first_call, calls_per_row, ROWS)
    blocks = tl.reshape(loaded, [ROWS, 1, 4, 32])
    left, y, _code, unit, _byte, g, bad, _max = terms.first_term(blocks, noise, METHOD, BITS, CARRY, SATURATE, RANDOM)
    if CHECK and tl.max(tl.reshape(bad.to(tl.int32), [ROWS * 4])) > 0:
        tl.atomic_or(flag, 1)
    y = tl.where(bad[:, :, :, None], float("nan"), y)
    _store(y, unit, g, rows, r, tile, data, data_stride, scale, scale_stride, ROWS)
    if LISTED:
        slot = tl.load(slots + tile)
        if slot >= 0:
            if RANDOM:
                noise = terms.tile_noise(seed, stream, 1, draw_row + row, tile, first_call, calls_per_row, ROWS)
            y_2, _code_2, unit_2 = terms.second_term(left, unit, noise, CARRY, SATURATE, RANDOM)
            at = tl.cdiv(columns, 128) + slot
            _store(y_2, unit_2, alpha * g, rows, r, at, data, data_stride, scale, scale_stride, ROWS)


def quantise_with_residual(
    x: Tensor,
    operand: Operand,
    tiles: Tensor | None = None,
    *,
    draw: Draw | int | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
    out: Fp8Matrix | None = None,
) -> Fp8Matrix:
    """Quantise x [rows, K] along K; returns form TILE [rows, K to whole tiles + 128 for each of `tiles`].

    x      float32 or bfloat16, last axis contiguous (otherwise copied); magnitudes up to 6 * 2^125.
    tiles  int64 [n], `Frozen.tiles`: alpha times the residual of the i-th lies in the i-th appended tile. None, or an
           operand without fallback, appends nothing.
    out    where to write, of this shape and form.

    Together the two parts equal `reference.quantise`: bit for bit, but for the rounding of their sum. Raises
    `UnsupportedOperandError` for operands these kernels do not do.
    """
    options = TermOptions.of(operand)
    tiles = tiles if options.fallback else None
    rows, k = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    count = 0 if tiles is None else len(tiles)
    out = out or empty_tiles(rows, (triton.cdiv(k, TILE) + count) * TILE if count else k, Form.TILE, x.device)
    if not x.numel():
        return out
    flag, random = Flag(x.device, nonfinite), Random.of(draw, k, options.stochastic)
    height, warps = SHAPE
    _quantise_residual_kernel[(triton.cdiv(k, TILE), triton.cdiv(rows, height))](
        x, x.stride(0), rows, k, flag.pointer, None if tiles is None else _slots(tiles, k), options.alpha,
        out.data, out.data.stride(0), out.scale, out.scale.stride(1),
        random.seed, random.stream, random.row, random.first_call, random.calls_per_row,
        ROWS=height, METHOD=options.method, BITS=options.bits, CARRY=options.carry, SATURATE=options.saturate,
        RANDOM=options.stochastic, LISTED=tiles is not None, CHECK=flag.checked,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    flag.raise_if_set(x, name)
    return out


def _slots(tiles: Tensor, k: int) -> Tensor:
    """int32 [tiles along K]: where each tile's residual is appended, -1 where it has none."""
    slots = torch.full((triton.cdiv(k, TILE),), -1, dtype=torch.int32, device=tiles.device)
    slots[tiles] = torch.arange(len(tiles), dtype=torch.int32, device=tiles.device)
    return slots


def room_for_tiles(rows: int, k: int, form: Form, count: int, device: torch.device) -> tuple[Fp8Matrix, Fp8Matrix]:
    """Return (an uninitialised matrix with `count` more tiles along K, a view of it without them).

    k is a multiple of 128; form TILE or SQUARE.
    """
    full = empty_tiles(rows, k + count * TILE, form, device)
    return full, Fp8Matrix(full.data[:, :k], full.scale[:, : k // TILE], form, k)


def repeat_tiles(full: Fp8Matrix, tiles: Tensor) -> None:
    """Write copies of `tiles`, the first ones' indices, into the last tiles of a matrix from `room_for_tiles`."""
    own = full.k // TILE - len(tiles)
    data = full.data.view(torch.uint8).view(full.rows, -1, TILE)
    data[:, own:] = data[:, tiles]
    full.scale[:, own:] = full.scale[:, tiles]
