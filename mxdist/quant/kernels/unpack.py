"""Packed MXFP4 to E4M3 bytes and float32 scales: what was sent or saved, ready for a GEMM."""

from __future__ import annotations

import triton
import triton.language as tl

from mxdist.quant.format import E8M0_NAN, TILE
from mxdist.quant.kernels import terms
from mxdist.quant.kernels.decode_tiles import expanded
from mxdist.quant.kernels.device import power_of_two, unit_of
from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.options import METHODS
from mxdist.quant.layout import as_rows
from mxdist.quant.reference import NonFinite
from mxdist.quant.tensor import MXTensor

_ROWS, _TILES, _WARPS = 32, 4, 4
"""Rows and tiles along K of a program, and its warps."""


@triton.jit(do_not_specialize=["rows"])
def _unpack_kernel(
    codes, code_width, scales, scale_width, macro, macro_width, rows, tiles, data, data_stride, scale, scale_stride,
    METHOD: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # A thread reads eight bytes and writes sixteen, a warp whole lines: pieces come before rows, or Triton would give
    # every thread of a warp a row of its own.
    PIECES: tl.constexpr = 8 * TILES
    first, r = tl.program_id(0) * TILES, tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    far, inside, piece = r.to(tl.int64), r < rows, 8 * first + tl.arange(0, PIECES)
    n = (8 * piece)[:, None, None] + tl.arange(0, 8)[None, None, :]
    there = inside[None, :, None] & (n < code_width)
    byte = tl.load(codes + far[None, :, None] * code_width + n, mask=there, other=0)
    block = (piece // 2)[:, None]
    code = tl.load(scales + far[None, :] * scale_width + block, mask=inside[None, :] & (block < scale_width), other=1)
    code = tl.reshape(code.to(tl.int32), [TILES, 8, ROWS])
    unit = unit_of(tl.max(code, axis=1))
    shift = tl.reshape(code - unit[:, None, :], [PIECES * ROWS])
    y = tl.reshape(expanded(tl.reshape(byte, [PIECES * ROWS, 8]), shift), [PIECES, ROWS, 16])
    c = (16 * piece)[:, None, None] + tl.arange(0, 16)[None, None, :]
    kept = inside[None, :, None] & (piece < 8 * tiles)[:, None, None]
    tl.store(data + far[None, :, None] * data_stride + c, y.to(tl.float8e4nv), mask=kept)
    decoded, tile = power_of_two(unit), first + tl.arange(0, TILES)
    present = inside[None, :] & (tile < tiles)[:, None]
    if METHOD != terms.NO_FACTOR:
        own = macro + far[None, :] * macro_width + tile[:, None]
        decoded = decoded * terms.factors(tl.load(own, mask=present, other=0).to(tl.int32), METHOD)[1]
    tl.store(scale + tile.to(tl.int64)[:, None] * scale_stride + r[None, :], decoded, mask=present)


def unpack(mx: MXTensor, nonfinite: NonFinite = "error") -> Fp8Matrix:
    """Return an `MXTensor` [..., K] with blocks of 32 as form TILE [rows, K]: bytes and scales of `e4m3.to_e4m3`.

    ValueError for a tensor with outlier fallback, macro blocks other than of 128, other blocks, or NaN blocks; with
    nonfinite "propagate" nobody looks for those, nor waits for the device.
    """
    operand, k = mx.operand, mx.shape[-1]
    if operand.fallback is not None or operand.block != 32 or (operand.macro and operand.macro.size != TILE):
        raise ValueError("only tensors of one term, with blocks of 32 and macro blocks of 128, are tiles of E4M3.")
    if nonfinite == "error" and (mx.scales == E8M0_NAN).any():
        raise ValueError("a tensor with NaN blocks cannot be converted to E4M3.")
    codes, scales = as_rows(mx.codes), as_rows(mx.scales)
    macro = None if mx.macro is None else as_rows(mx.macro)
    rows, tiles = codes.shape[0], -(-k // TILE)
    out = empty_tiles(rows, k, Form.TILE, codes.device, operand.hadamard != "none")
    if out.data.numel():
        _unpack_kernel[(-(-tiles // _TILES), -(-rows // _ROWS))](
            codes, codes.shape[1], scales, scales.shape[1], macro, 0 if macro is None else macro.shape[1], rows, tiles,
            out.data, out.data.stride(0), out.scale, out.scale.stride(1),
            METHOD=METHODS[operand.macro.method] if operand.macro else 0, ROWS=_ROWS, TILES=_TILES, num_warps=_WARPS,
        )  # fmt: skip
    return out
