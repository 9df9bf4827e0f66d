"""Packed MXFP4 to E4M3 bytes and float32 scales: what was sent or saved, ready for a GEMM."""

from __future__ import annotations

import triton
import triton.language as tl

from mxdist.quant.format import E8M0_NAN, TILE
from mxdist.quant.kernels import terms
from mxdist.quant.kernels.device import power_of_two, unit_of
from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.options import METHODS
from mxdist.quant.layout import as_rows
from mxdist.quant.reference import NonFinite
from mxdist.quant.tensor import MXTensor

_ROWS, _WARPS = 64, 4


@triton.jit(do_not_specialize=["rows"])
def _unpack_kernel(
    codes, code_width, scales, scale_width, macro, macro_width, rows, data, data_stride, scale, scale_stride,
    METHOD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile, r = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    far, inside = r.to(tl.int64), (r < rows)[:, None]
    n, b, c = tile * 64 + tl.arange(0, 64), tile * 4 + tl.arange(0, 4), tile * 128 + tl.arange(0, 128)
    packed = tl.load(codes + far[:, None] * code_width + n[None, :], mask=inside & (n < code_width)[None, :], other=0)
    present = inside & (b < scale_width)[None, :]
    code = tl.load(scales + far[:, None] * scale_width + b[None, :], mask=present, other=1).to(tl.int32)
    unit = unit_of(tl.max(code, axis=1))
    value = terms.e2m1_values(tl.join(packed & 15, packed >> 4).to(tl.int32))  # [ROWS, 64, 2]
    power = power_of_two(tl.maximum(code - unit[:, None] + 127, 1))
    y = tl.reshape(tl.reshape(value, [ROWS, 4, 32]) * power[:, :, None], [ROWS, 128])
    tl.store(data + far[:, None] * data_stride + c[None, :], y.to(tl.float8e4nv), mask=inside)
    decoded = power_of_two(unit)
    if METHOD != terms.NO_FACTOR:
        byte = tl.load(macro + far * macro_width + tile, mask=r < rows, other=0).to(tl.int32)
        decoded = decoded * terms.factors(byte, METHOD)[1]
    tl.store(scale + tile.to(tl.int64) * scale_stride + r, decoded, mask=r < rows)


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
    rows = codes.shape[0]
    out = empty_tiles(rows, k, Form.TILE, codes.device, operand.hadamard != "none")
    if out.data.numel():
        _unpack_kernel[(triton.cdiv(k, TILE), triton.cdiv(rows, _ROWS))](
            codes, codes.shape[1], scales, scales.shape[1], macro, 0 if macro is None else macro.shape[1], rows,
            out.data, out.data.stride(0), out.scale, out.scale.stride(1),
            METHOD=METHODS[operand.macro.method] if operand.macro else 0, ROWS=_ROWS, num_warps=_WARPS,
        )  # fmt: skip
    return out
