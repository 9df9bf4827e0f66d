"""The backward pass of p silu(gate) up, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def swiglu_gradients(gradient, gate, up, probability):
    """The gradients by gate and by up, and every element's share of that by p, float32."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    share = gradient * silu * up
    gradient = gradient * probability
    return gradient * up * (sigmoid + silu * (1.0 - sigmoid)), gradient * silu, share


@triton.jit
def _kernel(gradient, h, p, out, dp, half, COLS: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, COLS)
    inside = c < half
    at = h + row * 2 * half + c
    gate, up = tl.load(at, mask=inside).to(tl.float32), tl.load(at + half, mask=inside).to(tl.float32)
    value = tl.load(gradient + row * half + c, mask=inside, other=0.0).to(tl.float32)
    by_gate, by_up, share = swiglu_gradients(value, gate, up, tl.load(p + row))
    tl.store(out + row * 2 * half + c, by_gate, mask=inside)
    tl.store(out + row * 2 * half + half + c, by_up, mask=inside)
    tl.store(dp + row, tl.sum(tl.where(inside, share, 0.0)))


def swiglu_backward(gradient: Tensor, h: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by h [rows, 2 K], gate before up, of h's dtype, and by the probabilities, float32 [rows].

    gradient  [rows, K], contiguous, by p silu(gate) up; computed in float32 and rounded once.
    """
    out, dp = torch.empty_like(h), torch.empty_like(probabilities)
    rows, k = gradient.shape
    if rows:
        _kernel[(rows,)](gradient, h, probabilities, out, dp, k, COLS=triton.next_power_of_2(k))
    return out, dp
