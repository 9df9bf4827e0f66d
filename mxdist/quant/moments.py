"""`Moments`: the sums from which every figure about a quantisation error follows; they add over chunks and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

DELTA_RANGE = (-1.0, 1.0)
DELTA_BINS = 32
"""The histogram of delta = log2(gamma); values beyond the range count in the end bins."""


@dataclass(slots=True)
class Moments:
    """Sums over elements and blocks. Energies are sums of squares, in units of x squared.

    elements, zeroed, dead    elements; those that are not zero but become zero; those in the deadzone and not zero
    energy, product, error    <x, x>, <x, Q>, <e, e>
    scale, deadzone, grid     energies of the three components
    scale_grid, scale_deadzone    their inner products (<deadzone, grid> is zero by construction)
    blocks                    blocks that are not all zero
    saturated                 of those, how many have a largest magnitude beyond 6 scales
    gamma, delta, delta2      sums over those of gamma = s / s*, delta = log2 gamma, delta squared; s is the step that
                              the macro factor leaves
    histogram                 of delta, `DELTA_BINS` equal bins over `DELTA_RANGE`
    """

    elements: int = 0
    zeroed: int = 0
    dead: int = 0
    energy: float = 0.0
    product: float = 0.0
    error: float = 0.0
    scale: float = 0.0
    deadzone: float = 0.0
    grid: float = 0.0
    scale_grid: float = 0.0
    scale_deadzone: float = 0.0
    blocks: int = 0
    saturated: int = 0
    gamma: float = 0.0
    delta: float = 0.0
    delta2: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * DELTA_BINS)

    def __add__(self, other: Moments) -> Moments:
        sums: dict[str, Any] = {}
        for item in fields(self):
            ours, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name == "histogram":
                sums[item.name] = [a + b for a, b in zip(ours, theirs, strict=True)]
            else:
                sums[item.name] = ours + theirs
        return Moments(**sums)

    def to_dict(self) -> dict[str, Any]:
        """Return the sums as a plain JSON-serialisable dict; `Moments(**d)` is the inverse."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def report(self) -> dict[str, float]:
        """Return the figures of a table row; NaN where a denominator is zero.

        nmse                ||e||^2 / ||x||^2
        scale, deadzone, grid   share of ||e||^2 (they add to 1 only together with the cross terms)
        cross_scale_grid, cross_scale_deadzone   2 <., .> / ||e||^2; the second is 0 under the plain ceil rule
        closure             scale + deadzone + grid + both cross terms: 1 up to rounding
        cos_scale_grid      cosine between e_scale and e_grid
        gain                <x, Q> / <x, x>
        zeroed, dead        fractions of all elements
        saturated           fraction of non-zero blocks
        gamma               mean s / s*
        delta, delta_std    mean and standard deviation of log2 gamma
        """
        scale_deadzone, scale_grid = (_ratio(2 * c, self.error) for c in (self.scale_deadzone, self.scale_grid))
        shares = [_ratio(part, self.error) for part in (self.scale, self.deadzone, self.grid)]
        delta = _ratio(self.delta, self.blocks)
        variance = max(0.0, _ratio(self.delta2, self.blocks) - delta * delta) if self.blocks else math.nan
        return {
            "nmse": _ratio(self.error, self.energy),
            "scale": shares[0],
            "deadzone": shares[1],
            "grid": shares[2],
            "cross_scale_grid": scale_grid,
            "cross_scale_deadzone": scale_deadzone,
            "closure": sum(shares) + scale_grid + scale_deadzone,
            "cos_scale_grid": _ratio(self.scale_grid, math.sqrt(self.scale * self.grid)),
            "gain": _ratio(self.product, self.energy),
            "zeroed": _ratio(self.zeroed, self.elements),
            "dead": _ratio(self.dead, self.elements),
            "saturated": _ratio(self.saturated, self.blocks),
            "gamma": _ratio(self.gamma, self.blocks),
            "delta": delta,
            "delta_std": math.sqrt(variance),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
