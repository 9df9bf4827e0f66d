"""Where a quantisation error comes from: e = e_scale + e_deadzone + e_grid, exactly (arXiv 2605.20402; NUMERICS.md 4).

Per block of x with maximum m: ideal scale s* = m / 6, a real number; Q*(x) = s* E2M1(x / s*), rounded to float32.

    e_scale     Q(x) - Q*(x)            the scale is a power of two, and whatever corrections Q has
    e_deadzone  -x  where Q*(x) = 0     too small for the grid even with the ideal scale
    e_grid      Q*(x) - x  elsewhere    the grid is coarse

The sum telescopes to e = Q(x) - x for every rule and correction. Supports of deadzone and grid are disjoint. Under the
ceil rule Q is zero wherever Q* is, so the only cross term of ||e||^2 is 2 <e_scale, e_grid>; for other rules and
corrections <e_scale, e_deadzone> is not zero and is reported beside it. NUMERICS.md derives this.

`components` gives the three errors element by element in float64; `measure` streams over a large tensor in float32
and returns sums (`Moments`) that add over chunks, tensors and ranks.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.format import E2M1_MAX, E8M0_BIAS
from mxdist.quant.layout import as_rows, per_block, to_blocks
from mxdist.quant.moments import DELTA_BINS, DELTA_RANGE, Moments
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import Job, Quantised, fake_quantise
from mxdist.quant.rounding import round_fast, round_plain, scale_of
from mxdist.quant.scaling import macro_factors
from mxdist.quant.scratch import scratch

_TAME = (2.0**-40, 2.0**40)
"""Maxima between these have squares that float32 sums without underflow or overflow."""

_NEGLIGIBLE = 2.0**-120
"""Blocks with a smaller ideal scale, next to a `_TAME` maximum, count as dead: their reciprocal would overflow."""


@dataclass(frozen=True, slots=True)
class Components:
    """The error of a quantised tensor and its three parts, float64 of the tensor's shape."""

    error: Tensor
    scale: Tensor
    deadzone: Tensor
    grid: Tensor

    def block_norms(self, block: int) -> dict[str, Tensor]:
        """Return the Euclidean norm of each part per block, float64 [rows, ceil(K / block)] by name."""
        norms = {}
        for name in ("error", "scale", "deadzone", "grid"):
            rows = as_rows(getattr(self, name))
            blocks = F.pad(rows, (0, -rows.shape[1] % block)).unflatten(1, (-1, block))
            norms[name] = torch.linalg.vector_norm(blocks, dim=-1)
        return norms


def components(x: Tensor, operand: Operand, **arguments: Any) -> Components:
    """Return the error of quantising x [..., K] and its parts; x is first rounded to float32, as the quantiser does.

    scale + deadzone + grid equals error bit for bit: Q, Q* and x are float32 numbers close enough together for their
    differences to be exact in float64, or Q* is zero. `arguments` are those of `reference.fake_quantise`.
    """
    values = fake_quantise(x, operand, **arguments).double()
    original = x.detach().to(torch.float32)
    ideal = ideal_values(original, operand.block).double()
    original = original.double()
    dead = ideal == 0
    return Components(
        error=values - original,
        scale=values - ideal,
        deadzone=torch.where(dead, -original, 0.0),
        grid=torch.where(dead, 0.0, ideal - original),
    )


def ideal_values(x: Tensor, block: int) -> Tensor:
    """Return Q*(x), float32 of x's shape: E2M1 with the real-valued scale max / 6 per block of the last axis."""
    rows = as_rows(x)
    blocks = to_blocks(rows, block).double()
    unit = blocks.abs().amax(-1, keepdim=True) / E2M1_MAX
    scaled = torch.where(unit > 0, blocks / unit, 0.0)
    values = round_plain(scaled, torch.full(scaled.shape[:2], 127, dtype=torch.int32, device=x.device)) * unit
    return values.to(torch.float32).flatten(1)[:, : rows.shape[1]].reshape(x.shape)


def measure(x: Tensor, operand: Operand, *, workers: int = 1, name: str = "tensor", **arguments: Any) -> Moments:
    """Return the decomposition's sums over x [..., K], chunk by chunk in float32 (right to about 1e-5).

    Tensors of magnitudes below 2^-120 are measured as if float32 had no subnormal numbers there: their sums may differ
    from those of `components` by a few per cent.

    workers    threads that share the chunks; with more than one, set torch's own threads to 1.
    arguments  seed, frozen as for `reference.fake_quantise`. NaN and Inf are errors that name `name`.
    """
    job = Job(x, operand, arguments.pop("seed", None), arguments.pop("frozen", None), name, "error")
    if arguments:
        raise TypeError(f"measure() got unexpected arguments {sorted(arguments)}.")
    chunks = list(job.chunks())
    if workers <= 1 or len(chunks) == 1:
        return sum((_measure_rows(job, *chunk) for chunk in chunks), start=Moments())
    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(lambda chunk: _measure_rows(job, *chunk), chunks), start=Moments())


@torch.no_grad()
def _measure_rows(job: Job, start: int, stop: int) -> Moments:
    """The sums over rows start..stop."""
    block, k = job.operand.block, job.rows.shape[1]
    x = to_blocks(job.rows[start:stop], block)
    result = job.run(start, stop)
    moments = _block_statistics(result, job.operand)
    moments.elements = (stop - start) * k
    values = job.values(result)[:, :k]
    if x.shape[1] * block != k:
        values = F.pad(values, (0, x.shape[1] * block - k))
    values = values.reshape(x.shape)
    absmax = torch.abs(x, out=scratch("magnitudes", x)).amax(-1, keepdim=True)
    top = absmax.max().item()
    if top == 0:
        return moments
    zero, moments.zeroed = _count_zeros(x, values)
    moments.dead = -zero  # what follows counts zeros as dead
    if _TAME[0] < top < _TAME[1]:
        return moments + _element_statistics(x, values, absmax, 1.0)
    shrink = 2.0 ** max(-100, min(100, -math.frexp(top)[1]))  # kept within float32; squares are then near 1
    return moments + _element_statistics(x * shrink, values * shrink, absmax * shrink, shrink**-2)


def _element_statistics(x: Tensor, values: Tensor, absmax: Tensor, energy_unit: float) -> Moments:
    """Sums over elements, for blocks x and Q(x) [rows, blocks, block] with maxima [rows, blocks, 1].

    Energies come out multiplied by `energy_unit`. Overwrites nothing that is passed in.
    """
    unit = absmax / E2M1_MAX
    inverse = torch.where(unit > _NEGLIGIBLE, unit.reciprocal(), 0.0)
    scaled = torch.mul(x, inverse, out=scratch("scaled", x))
    ones = torch.full(scaled.shape[:2], E8M0_BIAS, dtype=torch.int32, device=x.device)
    ideal = round_fast(scaled, ones, saturate=False, wide=False, out=scratch("trial", x)).mul_(unit)
    dead = torch.eq(ideal, 0, out=scratch("power", x))  # 0.0 or 1.0: much faster than making a bool
    error = torch.sub(values, x, out=scratch("left", x))
    scale = torch.sub(values, ideal, out=scaled)
    deadzone = torch.mul(x, dead, out=scratch("residual", x)).neg_()
    grid = ideal.sub_(x).sub_(deadzone)  # exactly zero in the deadzone

    def dot(a: Tensor, b: Tensor) -> float:
        return torch.dot(a.flatten(), b.flatten()).item() * energy_unit

    return Moments(
        dead=int(dead.sum().item()),
        energy=dot(x, x),
        product=dot(x, values),
        error=dot(error, error),
        scale=dot(scale, scale),
        deadzone=dot(deadzone, deadzone),
        grid=dot(grid, grid),
        scale_grid=dot(scale, grid),
        scale_deadzone=dot(scale, deadzone),
    )


def _count_zeros(x: Tensor, values: Tensor) -> tuple[int, int]:
    """Return how many elements of x are zero, and how many others are zero in `values`."""
    zero = torch.eq(x, 0, out=scratch("power", x))
    lost = torch.eq(values, 0, out=scratch("left", x))
    both = torch.dot(lost.flatten(), zero.flatten()).item()
    return int(zero.sum().item()), int(lost.sum().item() - both)


def _block_statistics(result: Quantised, operand: Operand) -> Moments:
    """Sums over the blocks that are not all zero: gamma, delta and saturation, of what the scales were chosen for."""
    assert result.absmax is not None
    step, absmax = scale_of(result.codes).squeeze(-1), result.absmax
    if result.macro is not None and operand.macro is not None:
        g = macro_factors(operand.macro, result.macro)[1]
        step = step * per_block(g, operand.macro.size, operand.block, step.shape[-1])
    alive = absmax > 0
    if not alive.all():
        step, absmax = step[alive], absmax[alive]
    gamma = (step.double() * E2M1_MAX).div_(absmax)
    delta = gamma.log2()
    low, high = DELTA_RANGE
    histogram = torch.histc(delta.clamp(low, high), DELTA_BINS, low, high)
    return Moments(
        blocks=gamma.numel(),
        saturated=int((gamma < 1 - 1e-6).sum()),
        gamma=gamma.sum().item(),
        delta=delta.sum().item(),
        delta2=delta.square().sum().item(),
        histogram=[int(count) for count in histogram.tolist()],
    )
