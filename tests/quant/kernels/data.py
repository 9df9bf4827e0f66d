"""Inputs of the kernel tests, and where they live."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matrix(rows: int, k: int, spread: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gaussians times a factor exp(spread * Gaussian) per 32 elements, with a row and a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    factors = torch.exp(spread * torch.randn(rows, -(-k // 32), generator=generator))
    x *= factors.repeat_interleave(32, 1)[:, :k]
    x[rows // 2, : k // 2] = 0
    x[:, 32:64] = 0
    return x.to(device=DEVICE, dtype=dtype)


def kind_of(kind: str, rows: int, k: int, seed: int = 0) -> Tensor:
    """Data that GEMMs are judged on: "gaussian", "outliers" (channels and values far out), "positive"."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    if kind == "outliers":
        x[:, ::97] *= 50
        x.view(-1)[::10007] *= 300
    if kind == "positive":
        x = x.abs()
    return x.to(device=DEVICE, dtype=torch.bfloat16)
