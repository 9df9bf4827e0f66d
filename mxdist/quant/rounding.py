"""Rounding blocks to the E2M1 grid of their scales: once in plain steps, once in four passes over the data.

Both take blocks [rows, blocks, block] float32 (finite) and codes int32 [rows, blocks] and return new float32 blocks
holding sign * E2M1 value * 2^(code - 127), ties to the even code, magnitudes above 6 scales saturating, zero as +0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxdist.quant.format import E2M1_MAX, EXPONENT_MASK, MANTISSA_SHIFT
from mxdist.quant.scratch import scratch

SAFE_MAX = 2.0**100
"""Below this magnitude `round_fast` cannot overflow: its magic number is 1.5 * 2^22 times the value's power of two."""

_MAGIC = 1.5 * 2.0**22


def round_plain(blocks: Tensor, codes: Tensor) -> Tensor:
    """The definition: divide by the scale, round to the binade's step (0.5, 1 or 2), multiply back (NUMERICS.md 1)."""
    scaled = blocks * scale_of(254 - codes)
    magnitude = scaled.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = torch.round(magnitude / step) * step
    return torch.where(rounded == 0, 0.0, rounded * scaled.sign()) * scale_of(codes)


def round_fast(blocks: Tensor, codes: Tensor, saturate: bool, wide: bool, out: Tensor | None = None) -> Tensor:
    """Bitwise `round_plain`, without dividing by the scale.

    Adding and subtracting 1.5 * 2^22 * t makes float32 itself round to multiples of t / 2, ties to even. With t the
    power of two of max(|x|, scale) that is exactly the E2M1 grid of the scale (NUMERICS.md 1).

    saturate  whether magnitudes may exceed 6 scales (see `scaling.saturates`).
    wide      whether they may reach `SAFE_MAX`; then the same is done in scale units.
    out       where to write; a new tensor without.
    """
    scale = scale_of(codes)
    if wide:
        unit = torch.full_like(codes, 127)
        scaled = (blocks * scale_of(254 - codes)).clamp_(-E2M1_MAX, E2M1_MAX)
        return round_fast(scaled, unit, saturate=False, wide=False, out=out).mul_(scale)
    power = scratch("power", blocks)
    torch.bitwise_and(blocks.view(torch.int32), EXPONENT_MASK, out=power.view(torch.int32))
    torch.maximum(power, scale, out=power)
    rounded = torch.add(blocks, power, alpha=_MAGIC, out=out).sub_(power, alpha=_MAGIC)
    if saturate:
        limit = scale * E2M1_MAX
        torch.clamp(rounded, -limit, limit, out=rounded)
    return rounded


def round_stochastic(blocks: Tensor, codes: Tensor, noise: Tensor) -> Tensor:
    """Round to one of the two neighbouring grid points at random, so that the mean is the value (NUMERICS.md 7).

    noise is float32 (r + 1/2) / 2^16 like `blocks`, r uniform 16-bit integers: the probability of rounding up is
    that of noise exceeding one minus the fraction of a step, right to 2^-17. Values on the grid, zero included, stay.
    """
    scaled = blocks * scale_of(254 - codes)
    magnitude = scaled.abs().clamp_(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = torch.floor(magnitude / step + noise) * step
    return torch.where(rounded == 0, 0.0, rounded * scaled.sign()) * scale_of(codes)


def scale_of(codes: Tensor) -> Tensor:
    """Return 2^(code - 127) as float32 [rows, blocks, 1] for int32 codes 1..254; 0 for code 0."""
    return (codes << MANTISSA_SHIFT).view(torch.float32).unsqueeze(-1)
