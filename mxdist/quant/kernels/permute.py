"""Rows of experts without those that fill up tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.segments import Segments


@triton.jit
def _without_filling_kernel(filled, slots, out, columns, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    slot = tl.load(slots + row).to(tl.int64)
    tl.store(out + row * columns + c, tl.load(filled + slot * columns + c, mask=c < columns), mask=c < columns)


def without_filling(filled: Tensor, segments: Segments) -> Tensor:
    """Return the rows [R, K] that `segments` was made for, in their order, of those filled up, [rows, K]."""
    rows, k = len(segments.slots), filled.shape[1]
    out = torch.empty(rows, k, dtype=filled.dtype, device=filled.device)
    if out.numel():
        width = min(2048, triton.next_power_of_2(k))
        _without_filling_kernel[(rows, triton.cdiv(k, width))](filled, segments.slots, out, k, COLS=width)
    return out
