"""The 32-point Hadamard transform along the last axis, optionally after random signs.

It spreads an outlier over 32 values, so that the block scale follows the bulk. It is applied before quantising and
undone after dequantising, so a quantised operand approximates the original one and any two operands multiply
without knowing of each other's rotation. (A GEMM kernel that rotates both operands alike may skip the undoing.)
Sources: RHT of arXiv 2509.25149 (16 points) and 2502.20586 (64); NUMERICS.md 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

POINTS = 32


def hadamard(values: Tensor) -> Tensor:
    """Return H v for every run of 32 elements of float32 [..., 32 n]; H has entries +-1, H H = 32 I.

    Five stages of sums and differences in a fixed order, so the result is the same bits on every device.
    """
    shape = values.shape
    values = values.reshape(-1, POINTS)
    half = 1
    while half < POINTS:
        pairs = values.view(-1, POINTS // (2 * half), 2, half)
        left, right = pairs[:, :, 0], pairs[:, :, 1]
        values = torch.stack((left + right, left - right), dim=2).view(-1, POINTS)
        half *= 2
    return values.view(shape)


def rotate(values: Tensor, signs: Tensor | None) -> Tensor:
    """Return H (signs * v) / 32 per run of 32 elements; `signs` is +-1 [K] or None.

    The power-of-two factor is exact and no part of the quantisation: block scales absorb it.
    """
    if signs is not None:
        values = values * signs
    return hadamard(values * (1 / POINTS))


def rotate_back(values: Tensor, signs: Tensor | None) -> Tensor:
    """Inverse of `rotate` up to rounding: signs * (H v)."""
    values = hadamard(values)
    return values if signs is None else values.mul_(signs)
