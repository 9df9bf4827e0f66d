"""What ``scoring`` needs, as ``scoring_pieces`` says, in a kernel each: a program reads a row of logits once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLS, _WARPS = 4096, 8


@triton.jit(do_not_specialize=["temperature"])
def _sums_kernel(logits, places, tokens, out, stride, width, count, temperature, COLS: tl.constexpr):
    row = tl.program_id(0)
    start = logits + tl.load(places + row).to(tl.int64) * stride
    largest = float("-inf")
    total, weighted = 0.0, 0.0  # sum of e^(z - m), and of (z - m) e^(z - m), m the largest so far
    for first in range(0, width, COLS):
        c = first + tl.arange(0, COLS)
        z = tl.load(start + c, mask=c < width, other=float("-inf")).to(tl.float32) / temperature
        now = tl.maximum(largest, tl.max(z, 0))
        fall = tl.where(largest == float("-inf"), 0.0, largest - now)
        shrink = tl.where(largest == float("-inf"), 0.0, tl.exp(fall))
        below = tl.where(c < width, z - now, 0.0)
        exponential = tl.where(c < width, tl.exp(below), 0.0)
        weighted = (weighted + fall * total) * shrink + tl.sum(below * exponential, 0)
        total = total * shrink + tl.sum(exponential, 0)
        largest = now
    token = tl.load(tokens + row)
    here = (token >= 0) & (token < width)
    chosen = tl.load(start + token, mask=here, other=0.0).to(tl.float32) / temperature
    tl.store(out + row, largest)
    tl.store(out + count + row, total)
    tl.store(out + 2 * count + row, weighted)
    tl.store(out + 3 * count + row, tl.where(here, chosen, 0.0))


@triton.jit(do_not_specialize=["temperature"])
def _gradient_kernel(
    logits, places, tokens, shift, scale, gradient, stride, width, temperature, COLS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    place, token = tl.load(places + row).to(tl.int64), tl.load(tokens + row)
    m, factor = tl.load(shift + row), tl.load(scale + row) / temperature
    for first in range(0, width, COLS):
        c = first + tl.arange(0, COLS)
        z = tl.load(logits + place * stride + c, mask=c < width, other=0.0).to(tl.float32) / temperature
        value = factor * (tl.where(c == token, 1.0, 0.0) - tl.exp(z - m))
        tl.store(gradient + place * width + c, value.to(gradient.dtype.element_ty), mask=c < width)


def row_sums(logits: Tensor, places: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """As ``scoring_pieces.row_sums``."""
    out = torch.empty(4, len(places), dtype=torch.float32, device=logits.device)
    if len(places):
        _sums_kernel[(len(places),)](
            logits, places, tokens, out, logits.stride(0), logits.shape[1], len(places), temperature,
            COLS=_COLS, num_warps=_WARPS,
        )  # fmt: skip
    return out


def write_gradient(
    gradient: Tensor, logits: Tensor, places: Tensor, tokens: Tensor, shift: Tensor, scale: Tensor, temperature: float
) -> None:
    """As ``scoring_pieces.write_gradient``."""
    if len(places):
        _gradient_kernel[(len(places),)](
            logits, places, tokens, shift, scale, gradient, logits.stride(0), logits.shape[1], temperature,
            COLS=_COLS, num_warps=_WARPS,
        )  # fmt: skip
