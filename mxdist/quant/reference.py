"""The quantiser: what every number of every operand becomes. Plain PyTorch, any device, float32 arithmetic.

    u     = H (x - mu)                   mean removal and Hadamard, where the operand asks
    z     = f u                          macro-block scaling, f in [1, 2) per macro block; 1 without
    z1    = Q(z)                         E2M1 times a power-of-two scale per block
    z2    = Q(z - z1)                    outlier fallback, on all tiles or on flagged ones; 0 without
    x_hat = H^-1 (z1 + alpha z2) g + mu  g = 1 / f rounded to float32

`quantise` returns the codes of z1 and z2 in a packed `MXTensor`; `fake_quantise` returns x_hat without packing, and
equals `quantise(...).dequantise()` bit for bit. Q runs along the last axis. Rows never influence one another, except
within the groups of rows that square blocks share. NUMERICS.md derives each correction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mxdist.quant.fallback import tile_flags
from mxdist.quant.format import E8M0_NAN, TILE, e2m1_encode, pack_nibbles
from mxdist.quant.layout import as_rows, check_dtype, per_block, raise_nonfinite, to_blocks
from mxdist.quant.philox import RESIDUAL_ROUNDING, ROUNDING, Draw, uniform
from mxdist.quant.recipe import Operand
from mxdist.quant.rounding import SAFE_MAX, round_fast, round_plain, round_stochastic, scale_of
from mxdist.quant.scaling import block_codes, macro_bytes, macro_factors, saturates
from mxdist.quant.scratch import scratch
from mxdist.quant.tensor import MXTensor, combine, part_shapes
from mxdist.quant.transform import Frozen, enter, leave

NonFinite = Literal["error", "propagate"]

CHUNK = 1 << 18
"""Elements worked on at a time on a CPU: a few float32 temporaries of a chunk stay in the second-level cache."""


def quantise(
    x: Tensor,
    operand: Operand,
    *,
    axis: Literal[0, -1] = -1,
    seed: int | Draw | None = None,
    frozen: Frozen | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
    plain: bool = False,
) -> MXTensor:
    """Quantise x [..., K] along its last axis into packed codes and scales.

    x          any real floating dtype; computed in float32. K need not be a multiple of the block.
    axis       0: quantise x [K, ...] along its first axis instead; the result is that of the transposed [..., K].
    seed       needed when `operand.needs_seed`; a `Draw` also says where a shard lies in the whole tensor.
    frozen     the layer's mean or fallback threshold, when the operand uses them.
    name       names the tensor in errors.
    nonfinite  "error": ValueError with the position of the first NaN or Inf. "propagate": blocks that hold one get
               the E8M0 NaN code, so that all their values dequantise to NaN. Found by looking at the block maxima
               only (1/32 of the data), so there is no switch to turn the search off; "propagate" never makes the
               host wait for a device.
    plain      use the rounding written out step by step instead of the fast one: same result, for tests.

    Raises ValueError for integer, complex and 0-dimensional tensors, and for a missing seed or frozen value.
    """
    if axis == 0 and x.dim() > 1:
        x = x.movedim(0, -1)
    job = Job(x, operand, seed, frozen, name, nonfinite, plain)
    shapes = part_shapes(x.shape, operand)
    parts = {key: torch.empty(shape, dtype=torch.uint8, device=x.device) for key, shape in shapes.items()}
    flat = {key: as_rows(part) for key, part in parts.items()}
    for start, stop in job.chunks():
        for key, piece in _pack(job.run(start, stop)).items():
            flat[key][start:stop] = piece
    return MXTensor.from_parts(parts, x.shape, operand)


def fake_quantise(
    x: Tensor,
    operand: Operand,
    *,
    axis: Literal[0, -1] = -1,
    seed: int | Draw | None = None,
    frozen: Frozen | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
) -> Tensor:
    """Return x_hat, float32 of x's shape, without packing. Arguments as for `quantise`.

    Equal bit for bit to quantise(...).dequantise(...), transposed back when axis is 0.
    """
    if axis == 0 and x.dim() > 1:
        moved = fake_quantise(
            x.movedim(0, -1), operand, seed=seed, frozen=frozen, name=f"{name} (transposed)", nonfinite=nonfinite
        )
        return moved.movedim(-1, 0)
    job = Job(x, operand, seed, frozen, name, nonfinite)
    out = torch.empty(job.rows.shape, dtype=torch.float32, device=x.device)
    for start, stop in job.chunks():
        out[start:stop] = job.values(job.run(start, stop))[:, : x.shape[-1]]
    return out.view(x.shape)


@dataclass(slots=True)
class Quantised:
    """The pieces of some rows before packing: values on the grid (in units of z) and the codes of their scales.

    They live in `scratch`, so they are used up before the next rows are quantised.
    """

    primary: Tensor  # z1, float32 [rows, blocks, block]
    codes: Tensor  # int32 [rows, blocks]
    residual: Tensor | None = None  # z2, like primary
    residual_codes: Tensor | None = None  # 0 where a tile is not flagged
    macro: Tensor | None = None  # uint8 [rows, macros]
    bad: Tensor | None = None  # bool [rows, blocks]: held NaN or Inf
    absmax: Tensor | None = None  # float32 [rows, blocks]: maxima of |u|


class Job:
    """One call of `quantise` or `fake_quantise`: its arguments, checked once, and the work on a range of rows."""

    def __init__(
        self,
        x: Tensor,
        operand: Operand,
        seed: int | Draw | None,
        frozen: Frozen | None,
        name: str,
        nonfinite: NonFinite,
        plain: bool = False,
    ) -> None:
        check_dtype(x, name)
        if operand.needs_seed and seed is None:
            raise ValueError(f"quantising {name} draws random numbers: it needs a seed.")
        if operand.square and x.dim() != 2 and (x.dim() < 2 or x.shape[-2] % TILE):
            raise ValueError(f"{name} of shape {tuple(x.shape)} cannot be cut into squares: it needs [N, K].")
        (frozen or Frozen()).check(operand, x.shape[-1], name)
        self.x, self.rows, self.operand, self.name = x, as_rows(x.detach()), operand, name
        self.draw = Draw(seed) if isinstance(seed, int) else seed
        self.frozen = frozen or Frozen()
        self.nonfinite, self.plain = nonfinite, plain

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Row ranges of about CHUNK elements on a CPU, everything at once elsewhere; none for an empty tensor."""
        count, k = self.rows.shape
        if count and k:
            step = max(1, CHUNK // k) if self.rows.device.type == "cpu" else count
            if self.operand.square:
                step = TILE * math.ceil(step / TILE)  # whole squares
            yield from ((start, min(start + step, count)) for start in range(0, count, step))

    def run(self, start: int, stop: int) -> Quantised:
        """Quantise rows start..stop."""
        operand = self.operand
        rows = self.rows[start:stop]
        draw = self.draw.below(start) if self.draw is not None else None
        blocks = to_blocks(enter(rows, operand, self.frozen, draw), operand.block)
        absmax = torch.abs(blocks, out=scratch("magnitudes", blocks)).amax(-1)
        wide, bad = True, None
        if absmax.device.type == "cpu" or self.nonfinite == "error":  # else do not wait for the device
            wide = not absmax.max().item() < SAFE_MAX
        if wide:
            bad = ~torch.isfinite(absmax)
            if self.nonfinite == "error" and bad.any():
                raise_nonfinite(self.x, self.name)
            blocks, absmax = blocks.masked_fill(bad.unsqueeze(-1), 0.0), absmax.masked_fill(bad, 0.0)
        result = self._split(blocks, absmax, self._rounding(rows, draw, wide))
        result.bad, result.absmax = bad, absmax
        return result

    def _rounding(self, rows: Tensor, draw: Draw | None, wide: bool) -> Callable[[Tensor, Tensor, str], Tensor]:
        """The operand's rounding as a function of (blocks, codes, what for: "trial", "primary" or "residual")."""
        operand = self.operand

        def rounding(blocks: Tensor, codes: Tensor, purpose: str) -> Tensor:
            if operand.rounding == "stochastic" and draw is not None:
                count, k = rows.shape
                stream = RESIDUAL_ROUNDING if purpose == "residual" else ROUNDING
                noise = uniform(draw, stream, count, k, blocks.shape[1] * blocks.shape[2], blocks.device)
                return round_stochastic(blocks, codes, noise.view_as(blocks))
            if self.plain:
                return round_plain(blocks, codes)
            return round_fast(blocks, codes, saturates(operand.scale_rule), wide, scratch(purpose, blocks))

        return rounding

    def _split(self, blocks: Tensor, absmax: Tensor, rounding: Callable[[Tensor, Tensor, str], Tensor]) -> Quantised:
        """z1 and z2 of the module's docstring, on finite blocks [rows, blocks, block] with maxima [rows, blocks]."""
        operand, macro, fallback = self.operand, self.operand.macro, self.operand.fallback
        flags = tile_flags(absmax, operand, self.frozen.threshold, self.frozen.tiles)

        def trial(values: Tensor, codes: Tensor) -> Tensor:
            return rounding(values, codes, "trial")

        stored = None
        if macro is not None:
            stored = macro_bytes(blocks, absmax, operand, macro, trial)
            f = per_block(macro_factors(macro, stored)[0], macro.size, operand.block, absmax.shape[-1])
            blocks = torch.mul(blocks, f.unsqueeze(-1), out=scratch("scaled", blocks))
            absmax = absmax * f  # rounding is monotone: this is the maximum of |f u|
        codes = block_codes(blocks, absmax, operand, trial)
        primary = rounding(blocks, codes, "primary")
        if fallback is None:
            return Quantised(primary, codes, macro=stored)
        left = torch.sub(blocks, primary, out=scratch("left", blocks))  # exact in float32
        left_absmax = torch.abs(left, out=scratch("magnitudes", left)).amax(-1)
        residual_codes = block_codes(left, left_absmax, operand, trial)
        residual = rounding(left, residual_codes, "residual")
        if flags is not None:
            residual.mul_(flags.unsqueeze(-1))
            residual_codes.mul_(flags)
        return Quantised(primary, codes, residual, residual_codes, stored)

    def values(self, result: Quantised) -> Tensor:
        """x_hat [rows, padded K]; uses up `result`."""
        values = combine(result.primary, result.residual, result.macro, self.operand)
        if result.bad is not None:
            values.masked_fill_(result.bad.unsqueeze(-1), torch.nan)
        return leave(values.flatten(1), self.operand, self.frozen, self.draw)


def _pack(result: Quantised) -> dict[str, Tensor]:
    """The parts of an `MXTensor` over [rows, ...]."""
    scales = result.codes.to(torch.uint8)
    if result.bad is not None:
        scales = scales.masked_fill(result.bad, E8M0_NAN)
    parts = {"codes": _pack_values(result.primary, result.codes), "scales": scales}
    if result.macro is not None:
        parts["macro"] = result.macro
    if result.residual is not None and result.residual_codes is not None:
        parts["residual_codes"] = _pack_values(result.residual, result.residual_codes)
        parts["residual_scales"] = result.residual_codes.to(torch.uint8)
    return parts


def _pack_values(values: Tensor, codes: Tensor) -> Tensor:
    return pack_nibbles(e2m1_encode(values * scale_of(254 - codes)).flatten(1))
