"""Quantise few rows for `decode_tiles`: E4M3 bytes and a float32 scale per tile, as `quant_tiles`, in the lanes' order.

Element 32 b + 8 w + 4 h + i of a tile of 128 lies at 32 w + 16 h + 4 b + i: there the lanes that hold block b of the
weights meet it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxdist.quant.format import TILE
from mxdist.quant.kernels.device import encode, scale_of, tile_scales, unit_of
from mxdist.quant.kernels.options import options_of
from mxdist.quant.recipe import Operand

_ROWS, _WARPS = 4, 2
"""Rows of a program, one tile wide, and its warps."""


@triton.jit(do_not_specialize=["rows"])
def _to_lanes(
    x, stride, rows, data, data_stride, scale, tiles,
    ROWS: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr, MACRO_BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    tile, r = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    far, there = r.to(tl.int64), r < rows
    from_x = x + far[:, None] * stride + tile * 128 + tl.arange(0, 128)[None, :]
    blocks = tl.reshape(tl.load(from_x, mask=there[:, None], other=0.0).to(tl.float32), [ROWS, 1, 4, 32])
    code, bad, _, factor, top = tile_scales(blocks, CARRY, MACRO_BITS)
    unit = unit_of(top)
    y = encode(blocks, code, bad, factor, unit, 0.0, SATURATE, MACRO_BITS > 0, False)
    y = tl.reshape(y, [ROWS, 4, 4, 2, 4])
    four, two = tl.arange(0, 4), tl.arange(0, 2)
    to = (4 * four)[:, None, None, None] + (32 * four)[None, :, None, None] + (16 * two)[None, None, :, None] + four
    to = data + far[:, None, None, None, None] * data_stride + tile * 128 + to[None, :, :, :, :]
    tl.store(to, y.to(tl.float8e4nv), mask=there[:, None, None, None, None])
    value = tl.reshape(scale_of(unit, factor, MACRO_BITS > 0), [ROWS])
    tl.store(scale + far * tiles + tile, value, mask=there)


def quantise_lanes(x: Tensor, operand: Operand, height: int, early: bool = False) -> tuple[Tensor, Tensor]:
    """Return (bytes float8_e4m3fn [padded, K], scales float32 [padded, tiles]) of x [rows, K], K whole tiles.

    Rows are padded to a multiple of `height`; what lies there is not written. NaN and Inf make their block NaN.
    `options.runs_in_tiles` says which operands. An early kernel starts before the one ahead of it ends, waits for it,
    and lets the next one do the same.
    """
    (rows, k), options = x.shape, options_of(operand)
    padded, tiles = triton.cdiv(rows, height) * height, k // TILE
    data = torch.empty(padded, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(padded, tiles, dtype=torch.float32, device=x.device)
    _to_lanes[(tiles, triton.cdiv(rows, _ROWS))](
        x, x.stride(0), rows, data, k, scale, tiles,
        ROWS=_ROWS, CARRY=options.carry, SATURATE=options.saturate, MACRO_BITS=options.macro_bits, EARLY=early,
        num_warps=_WARPS, launch_pdl=early,
    )  # fmt: skip
    return data, scale
