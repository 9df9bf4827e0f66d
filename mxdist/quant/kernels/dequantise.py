"""E4M3 matrices back to bfloat16, for the GEMMs that a recipe leaves in high precision on quantised operands."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.device import INTERPRETED
from mxdist.quant.kernels.forms import Form, Fp8Matrix

_ROWS, _COLS = 32, 256


@triton.jit(do_not_specialize=["rows"])
def _dequantise_kernel(
    data, data_stride, scale, scale_row, scale_tile, out, rows, columns,
    SQUARE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    value = tl.load(data + r.to(tl.int64)[:, None] * data_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    group = r // 128 if SQUARE else r
    factor = tl.load(scale + group.to(tl.int64)[:, None] * scale_row + (c // 128)[None, :] * scale_tile, mask=inside)
    tl.store(out + r.to(tl.int64)[:, None] * columns + c[None, :], value * factor, mask=inside)


def dequantise(matrix: Fp8Matrix, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the values [rows, k] of `matrix`, computed in float32; ValueError for a rotated one."""
    if matrix.rotated:
        raise ValueError("a rotated matrix is only multiplied with another one, not read.")
    rows, k = matrix.rows, matrix.k
    # The interpreter casts to bfloat16 by cutting bits off.
    out = torch.empty(rows, k, dtype=torch.float32 if INTERPRETED.value else dtype, device=matrix.data.device)
    if out.numel():
        _dequantise_kernel[(triton.cdiv(k, _COLS), triton.cdiv(rows, _ROWS))](
            matrix.data, matrix.data.stride(0), matrix.scale, matrix.scale.stride(0),
            0 if matrix.form is Form.ROW else matrix.scale.stride(1), out, rows, k,
            SQUARE=matrix.form is Form.SQUARE, ROWS=_ROWS, COLS=_COLS, num_warps=4,
        )  # fmt: skip
    return out.to(dtype)
