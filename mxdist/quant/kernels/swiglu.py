"""SwiGLU, silu(gate) up, forward and backward, each in one kernel; rows are [gate, up]."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.device import INTERPRETED

_COLS = 1024
"""Of a program's piece, one row high."""


@triton.jit
def as_bfloat16(x):
    """float32 x as bfloat16 holds it, in float32; the interpreter's own cast cuts bits off."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def swiglu(gate, up):
    """silu(gate) up as `F.silu(gate) * up` gives it in bfloat16, which rounds twice; float32 in, float32 out."""
    return as_bfloat16(as_bfloat16(gate / (1.0 + tl.exp(-gate))) * up)


@triton.jit
def swiglu_gradients(gradient, gate, up):
    """The gradients by gate and by up, float32."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    return gradient * up * (sigmoid + silu * (1.0 - sigmoid)), gradient * silu


@triton.jit
def _swiglu_kernel(h, out, half, COLS: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = c < half
    at = h + row * 2 * half + c
    gate, up = tl.load(at, mask=inside).to(tl.float32), tl.load(at + half, mask=inside).to(tl.float32)
    tl.store(out + row * half + c, swiglu(gate, up), mask=inside)


@triton.jit
def _swiglu_backward_kernel(gradient, h, out, half, COLS: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = c < half
    at = h + row * 2 * half + c
    gate, up = tl.load(at, mask=inside).to(tl.float32), tl.load(at + half, mask=inside).to(tl.float32)
    value = tl.load(gradient + row * half + c, mask=inside, other=0.0).to(tl.float32)
    by_gate, by_up = swiglu_gradients(value, gate, up)
    tl.store(out + row * 2 * half + c, as_bfloat16(by_gate), mask=inside)
    tl.store(out + row * 2 * half + half + c, as_bfloat16(by_up), mask=inside)


def swiglu_backward(gradient: Tensor, h: Tensor) -> Tensor:
    """Return the gradient by h, bfloat16 [rows, 2 K], gate before up.

    gradient  bfloat16 [rows, K], contiguous, by silu(gate) up; computed in float32 and rounded once.
    """
    out = torch.empty_like(h)
    rows, k = gradient.shape
    if rows:
        _swiglu_backward_kernel[(rows, triton.cdiv(k, _COLS))](gradient, h, out, k, COLS=_COLS)
    return out


class Swiglu(torch.autograd.Function):
    """silu(gate) up of h, bfloat16 [rows, 2 K], contiguous; gate comes before up."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        rows, k = h.shape[0], h.shape[1] // 2
        out = torch.empty(rows, k, dtype=h.dtype, device=h.device)
        if rows:
            _swiglu_kernel[(rows, triton.cdiv(k, _COLS))](h, out, k, COLS=_COLS)
        ctx.save_for_backward(h)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return swiglu_backward(grads[0].contiguous(), ctx.saved_tensors[0])
