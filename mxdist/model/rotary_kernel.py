"""The kernel of ``rotary``: all heads of a token in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn_kernel(
    x, cos, sin, out, token_stride, head_stride, heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h, c = tl.arange(0, HEADS), tl.arange(0, HALF)
    inside = (h < heads)[:, None] & (c < half)[None, :]
    angle = token * half + c
    cosine = tl.load(cos + angle, mask=c < half, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + angle, mask=c < half, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sine = -sine
    left = x + token * token_stride + h[:, None] * head_stride + c[None, :]
    a = tl.load(left, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(left + half, mask=inside, other=0.0).to(tl.float32)
    to = out + (token * heads + h[:, None]) * 2 * half + c[None, :]
    tl.store(to, (a * cosine - b * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (b * cosine + a * sine).to(out.dtype.element_ty), mask=inside)


def turn(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Return x [tokens, heads, head] turned by cosines and sines [tokens, head / 2], or turned back; contiguous."""
    if x.stride(2) != 1:
        x = x.contiguous()
    tokens, heads, head = x.shape
    out = torch.empty(tokens, heads, head, dtype=x.dtype, device=x.device)
    if tokens:
        _turn_kernel[(tokens,)](
            x, cos, sin, out, x.stride(0), x.stride(1), heads, head // 2,
            HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(head // 2), BACK=back,
        )  # fmt: skip
    return out
