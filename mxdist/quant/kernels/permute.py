"""Rows of tokens to rows of experts in E4M3 bytes, and the sum of a token's expert rows back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels.forms import Form, Fp8Matrix
from mxdist.quant.kernels.segments import ByRow, Segments


@triton.jit
def _gather_kernel(
    data, data_stride, scale, scale_stride, source, table, width, out, out_scale,
    TILES: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, tiles = tl.load(table + 5 * tile), tl.load(table + 5 * tile + 1)
    for part in range(0, 128, 16):
        r = part + tl.arange(0, 16)
        token = tl.load(source + 128 * tile + r).to(tl.int64)
        for chunk in range(CHUNKS):
            c = chunk * COLS + tl.arange(0, COLS)
            inside = (token >= 0)[:, None] & (c < width)[None, :]
            values = tl.load(data + token[:, None] * data_stride + c[None, :], mask=inside, other=0)
            at = out + (128 * tile + r).to(tl.int64)[:, None] * width + c[None, :]
            tl.store(at, values, mask=(c < width)[None, :])
    r, t = tl.arange(0, 128), tl.arange(0, TILES)
    token = tl.load(source + 128 * tile + r)
    inside = (token >= 0)[None, :] & (t < width // 128)[:, None]
    values = tl.load(scale + t[:, None] * scale_stride + token[None, :], mask=inside, other=1.0)
    base = out_scale + 128 * first.to(tl.int64) * (width // 128) + 128 * (tile - first)
    tl.store(base + t[:, None] * (128 * tiles) + r[None, :], values, mask=(t < width // 128)[:, None])


def gather_rows(tokens: Fp8Matrix, segments: Segments) -> ByRow:
    """Return the experts' rows of quantised tokens [T, K], form TILE, K a multiple of 128: bytes are copied.

    Equal to quantising the copies, since rows along K stand alone, at half the bytes and T rows of arithmetic.
    """
    assert tokens.form is Form.TILE, "only tiles keep their scales apart"
    out = ByRow.empty(segments, tokens.k)
    if segments.rows:
        columns = 2048 if tokens.k % 2048 == 0 else 256
        _gather_kernel[(len(segments.table),)](
            tokens.data.view(torch.uint8), tokens.data.stride(0), tokens.scale, tokens.scale.stride(1),
            segments.source, segments.table, tokens.k, out.data.view(torch.uint8), out.scale,
            TILES=triton.next_power_of_2(tokens.k // TILE), CHUNKS=triton.cdiv(tokens.k, columns), COLS=columns,
            num_warps=8,
        )  # fmt: skip
    return out


@triton.jit
def _sum_kernel(rows, slots, out, columns, COPIES: tl.constexpr, COLS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    for copy in range(COPIES):
        slot = tl.load(slots + token * COPIES + copy).to(tl.int64)
        total += tl.load(rows + slot * columns + c, mask=(slot >= 0) & (c < columns), other=0.0).to(tl.float32)
    tl.store(out + token * columns + c, total, mask=c < columns)


def sum_copies(rows: Tensor, segments: Segments) -> Tensor:
    """Return for every token the sum [T, K] of its copies' rows of [rows, K], added in float32 in their order."""
    tokens, copies = segments.slots.shape
    k = rows.shape[1]
    out = torch.empty(tokens, k, dtype=rows.dtype, device=rows.device)
    if out.numel():
        width = min(2048, triton.next_power_of_2(k))
        _sum_kernel[(tokens, triton.cdiv(k, width))](rows, segments.slots, out, k, COPIES=copies, COLS=width)
    return out
