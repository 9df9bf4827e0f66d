"""What Triton does with MXFP4 on its own: tl.dot_scaled on packed E2M1, which Hopper emulates in bfloat16."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(a, a_scale, b, b_scale, c, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    packed, groups = tl.arange(0, BK // 2), tl.arange(0, BK // 32)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, k, BK):
        left = tl.load(a + rows[:, None] * (k // 2) + (first // 2 + packed)[None, :])
        right = tl.load(b + columns[None, :] * (k // 2) + (first // 2 + packed)[:, None])
        left_scale = tl.load(a_scale + rows[:, None] * (k // 32) + (first // 32 + groups)[None, :])
        right_scale = tl.load(b_scale + columns[:, None] * (k // 32) + (first // 32 + groups)[None, :])
        total = tl.dot_scaled(left, left_scale, "e2m1", right, right_scale, "e2m1", acc=total)
    tl.store(c + rows[:, None] * n + columns[None, :], total.to(tl.bfloat16))


def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Return a b^T bfloat16 [M, N] of packed a [M, K / 2], b [N, K / 2] and their E8M0 codes [M or N, K / 32].

    M, N and K are multiples of 128.
    """
    m, n, k = a.shape[0], b.shape[0], 2 * a.shape[1]
    out = torch.empty(m, n, dtype=torch.bfloat16, device=a.device)
    grid = (m // 128, n // 128)
    _kernel[grid](a, a_scale, b, b_scale, out, n, k, BM=128, BN=128, BK=128, num_warps=8, num_stages=3)
    return out
