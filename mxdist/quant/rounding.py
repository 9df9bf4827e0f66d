"""Rounding blocks to the E2M1 grid of their scales: once in plain steps, once in four passes over the data.

Both take blocks [rows, blocks, block] float32 (finite) and codes int32 [rows, blocks] and return new float32 blocks
holding sign * E2M1 value * 2^(code - 127), ties to the even code, magnitudes above 6 scales saturating, zero as +0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxdist.quant.format import E2M1_MAX, FLOAT32_EXPONENT_MASK, FLOAT32_MANTISSA_BITS

SAFE_MAX = 2.0**100
"""Below this magnitude `round_fast` cannot overflow: its magic number is 1.5 * 2^22 times the value's power of two."""

_MAGIC = 1.5 * 2.0**22


def round_plain(blocks: Tensor, codes: Tensor) -> Tensor:
    """The definition: divide by the scale, round to the step of the binade (0.5, 1 or 2), multiply back (facts 1.1)."""
    scaled = blocks * scale_of(254 - codes)
    magnitude = scaled.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = torch.round(magnitude / step) * step
    return torch.where(rounded == 0, 0.0, rounded * scaled.sign()) * scale_of(codes)


def round_fast(blocks: Tensor, codes: Tensor, saturate: bool, wide: bool) -> Tensor:
    """Bitwise `round_plain`, without dividing by the scale.

    Adding and subtracting 1.5 * 2^22 * t makes float32 itself round to multiples of t / 2, ties to even. With t the
    power of two of max(|x|, scale) that is exactly the E2M1 grid of the scale (kernels.md 4.6, here unscaled).

    saturate  whether magnitudes may exceed 6 scales (see `scaling.saturates`).
    wide      whether they may reach `SAFE_MAX`; then the same is done in scale units.
    """
    scale = scale_of(codes)
    if wide:
        unit = torch.full_like(codes, 127)
        scaled = (blocks * scale_of(254 - codes)).clamp_(-E2M1_MAX, E2M1_MAX)
        return round_fast(scaled, unit, saturate=False, wide=False).mul_(scale)
    power = blocks.view(torch.int32).bitwise_and(FLOAT32_EXPONENT_MASK).view(torch.float32)
    torch.maximum(power, scale, out=power)
    rounded = torch.add(blocks, power, alpha=_MAGIC).sub_(power, alpha=_MAGIC)
    if saturate:
        limit = scale * E2M1_MAX
        torch.clamp(rounded, -limit, limit, out=rounded)
    return rounded


def scale_of(codes: Tensor) -> Tensor:
    """Return 2^(code - 127) as float32 [rows, blocks, 1] for int32 codes 1..254, by placing them in the exponent."""
    return (codes << FLOAT32_MANTISSA_BITS).view(torch.float32).unsqueeze(-1)
