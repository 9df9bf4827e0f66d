"""The quantiser: what every number of every operand becomes. Plain PyTorch, any device, float32 arithmetic.

    z     = f x                        macro-block scaling, f in [1, 2) per macro block      (facts 3; f = 1 without)
    z1    = Q(z)                       E2M1 times a power-of-two scale per block             (facts 1)
    z2    = Q(z - z1)                  outlier fallback                                      (facts 4; absent without)
    x_hat = (z1 + alpha z2) g          g = 1 / f rounded to float32

`quantise` returns the codes of z1 and z2 in a packed `MXTensor`; `fake_quantise` returns x_hat without packing, and
equals `quantise(...).dequantise()` bit for bit. Q runs along the last axis, and rows never influence one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mxdist.quant.format import E8M0_NAN, e2m1_encode, pack_nibbles
from mxdist.quant.layout import as_rows, check_dtype, per_block, raise_nonfinite, to_blocks
from mxdist.quant.recipe import Operand, ScaleRule
from mxdist.quant.rounding import SAFE_MAX, round_fast, round_plain, scale_of
from mxdist.quant.scaling import (
    RoundBlocks,
    block_codes,
    group_max,
    macro_factors,
    saturates,
    search_macro,
    static_macro,
)
from mxdist.quant.tensor import MXTensor, combine, part_shapes

NonFinite = Literal["error", "propagate"]

CHUNK = 1 << 17
"""Elements worked on at a time on a CPU: a few float32 temporaries of a chunk stay in the second-level cache."""


@dataclass(slots=True)
class Quantised:
    """The pieces of some rows before packing: values on the grid (in units of z) and the codes of their scales."""

    primary: Tensor  # z1, float32 [rows, blocks, block]
    codes: Tensor  # int32 [rows, blocks]
    residual: Tensor | None  # z2, like primary
    residual_codes: Tensor | None
    macro: Tensor | None  # uint8 [rows, macros]
    bad: Tensor | None  # bool [rows, blocks]: held NaN or Inf


def quantise(
    x: Tensor,
    operand: Operand,
    *,
    seed: int | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
    plain: bool = False,
) -> MXTensor:
    """Quantise x [..., K] along its last axis into packed codes and scales.

    x          any real floating dtype; computed in float32. K need not be a multiple of the block.
    seed       needed when `operand.needs_seed`.
    name       names the tensor in errors.
    nonfinite  "error": ValueError with the position of the first NaN or Inf. "propagate": blocks that hold one get
               the E8M0 NaN code, so that all their values dequantise to NaN. Found by looking at the block maxima
               only (1/32 of the data), so there is no switch to turn the search off.
    plain      use the rounding written out step by step instead of the fast one: same result, for tests.

    Raises ValueError for integer, complex and 0-dimensional tensors, and for a missing seed.
    """
    _check(x, operand, seed, name)
    if x.numel() == 0:
        empty = {k: x.new_zeros(s, dtype=torch.uint8) for k, s in part_shapes(x.shape, operand).items()}
        return MXTensor.from_parts(empty, x.shape, operand)
    rows = as_rows(x)
    pieces = [
        _pack(_quantise_rows(rows[start:stop], operand, nonfinite, lambda: raise_nonfinite(x, name), plain))
        for start, stop in _chunks(rows)
    ]
    parts = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
    leading = x.shape[:-1]
    return MXTensor.from_parts({k: v.view(*leading, v.shape[-1]) for k, v in parts.items()}, tuple(x.shape), operand)


def fake_quantise(
    x: Tensor,
    operand: Operand,
    *,
    seed: int | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
) -> Tensor:
    """Return quantise(x, ...).dequantise() as float32, bit for bit, without packing. Arguments as for `quantise`."""
    _check(x, operand, seed, name)
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=torch.float32)
    rows = as_rows(x)
    pieces = [
        _values(_quantise_rows(rows[start:stop], operand, nonfinite, lambda: raise_nonfinite(x, name)), operand)
        for start, stop in _chunks(rows)
    ]
    values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return values[:, : x.shape[-1]].reshape(x.shape)


def _check(x: Tensor, operand: Operand, seed: int | None, name: str) -> None:
    check_dtype(x, name)
    if operand.needs_seed and seed is None:
        raise ValueError(f"quantising {name} draws random numbers: it needs a seed.")
    unfinished = {
        "square": operand.square,
        "scale_rule best": operand.scale_rule is ScaleRule.BEST,
        "stochastic rounding": operand.rounding != "nearest",
        "hadamard": operand.hadamard != "none",
        "mean": operand.mean,
        "fallback fraction": operand.fallback is not None and operand.fallback.fraction is not None,
    }
    if any(unfinished.values()):
        modes = ", ".join(mode for mode, asked in unfinished.items() if asked)
        raise ValueError(f"quantising {name}: not available yet: {modes}.")


def _chunks(rows: Tensor) -> list[tuple[int, int]]:
    """Row ranges of about CHUNK elements on a CPU, everything at once elsewhere."""
    count, k = rows.shape
    step = max(1, CHUNK // k) if rows.device.type == "cpu" else count
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _quantise_rows(
    rows: Tensor, operand: Operand, nonfinite: NonFinite, complain: Callable[[], None], plain: bool = False
) -> Quantised:
    """Quantise [rows, K]; `complain` is called when a NaN or Inf is met and is an error."""
    blocks = to_blocks(rows, operand.block)
    absmax = blocks.abs().amax(-1)
    wide, bad = True, None
    if absmax.device.type == "cpu" or nonfinite == "error":  # else leave the device alone: reading a flag would wait
        top = absmax.max().item()
        wide = not top < SAFE_MAX
    if wide:
        bad = ~torch.isfinite(absmax)
        if nonfinite == "error" and bad.any():
            complain()
        blocks = blocks.masked_fill(bad.unsqueeze(-1), 0.0)
        absmax = absmax.masked_fill(bad, 0.0)

    def rounding(values: Tensor, codes: Tensor) -> Tensor:
        if plain:
            return round_plain(values, codes)
        return round_fast(values, codes, saturates(operand.scale_rule), wide)

    result = _split(blocks, absmax, operand, rounding)
    result.bad = bad
    return result


def _split(blocks: Tensor, absmax: Tensor, operand: Operand, rounding: RoundBlocks) -> Quantised:
    """The formulas of the module's docstring, on finite blocks [rows, blocks, block] with maxima [rows, blocks]."""
    block, rule = operand.block, operand.scale_rule
    macro_bytes = None
    if operand.macro is not None:
        macro = operand.macro
        if macro.method == "static":
            macro_bytes = static_macro(group_max(absmax, macro.size, block), macro.bits)
        else:
            macro_bytes = search_macro(blocks, absmax, macro, rule, rounding)
        f = per_block(macro_factors(macro, macro_bytes)[0], macro.size, block, absmax.shape[-1])
        blocks = blocks * f.unsqueeze(-1)
        absmax = absmax * f  # rounding is monotone: this is the maximum of |f x|
    codes = block_codes(absmax, rule, block)
    primary = rounding(blocks, codes)
    if operand.fallback is None:
        return Quantised(primary, codes, None, None, macro_bytes, None)
    left = blocks - primary  # exact in float32
    residual_codes = block_codes(left.abs().amax(-1), rule, block)
    return Quantised(primary, codes, rounding(left, residual_codes), residual_codes, macro_bytes, None)


def _values(result: Quantised, operand: Operand) -> Tensor:
    """x_hat [rows, padded K] from unpacked pieces."""
    values = combine(result.primary, result.residual, result.macro, operand)
    if result.bad is not None:
        values.masked_fill_(result.bad.unsqueeze(-1), torch.nan)
    return values.flatten(1)


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
