"""Block scales and macro factors: which power of two, and which factor in [1, 2), each group of elements gets.

Values per block are float32 or int32 [rows, blocks]. Operands with square blocks share them over `block` rows, and
macro factors over `macro.size` rows; the shared value is then repeated in every row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.format import (
    E2M1_MAX,
    E8M0_MIN,
    FLOAT32_MANTISSA_BITS,
    TILE,
    TILE_SPAN,
    e8m0_from_absmax,
)
from mxdist.quant.layout import group_max, per_block, rows_max
from mxdist.quant.recipe import Macro, Operand, ScaleRule
from mxdist.quant.scratch import scratch

RoundBlocks = Callable[[Tensor, Tensor], Tensor]
"""(blocks [rows, blocks, block], codes int32 [rows, blocks]) -> the blocks rounded to E2M1 times their scales.
The result may live in `scratch`: it is used up before the next call."""

FOLDED_DECODE = (1.0, 1.25, 1.5)
"""Decode factors g = 1/f of the "folded" macro method: g times any E2M1 value is an E4M3 number (NUMERICS.md 5)."""

_SPAN = torch.tensor(TILE_SPAN, dtype=torch.int32)

MACRO_LIMIT = 2.0**126
"""A macro block whose maximum reaches this keeps f = 1, so that f * x stays finite."""


def block_codes(blocks: Tensor, absmax: Tensor, operand: Operand, rounding: RoundBlocks) -> Tensor:
    """Return the E8M0 codes int32 [rows, blocks] of blocks [rows, blocks, block] with maxima `absmax`, finite.

    The blocks themselves matter only to the rule BEST, which rounds them with both of its candidates.
    """
    codes = codes_from_maxima(absmax, operand)
    if operand.scale_rule is not ScaleRule.BEST:
        return codes
    lower = (codes - 1).clamp_(min=E8M0_MIN)
    lower = torch.maximum(lower, _tile_top(codes, operand) - TILE_SPAN)
    errors = [squared_error(blocks, rounding(blocks, choice), operand, operand.block) for choice in (codes, lower)]
    return torch.where(errors[1] < errors[0], lower, codes)


def codes_from_maxima(absmax: Tensor, operand: Operand) -> Tensor:
    """Return E8M0 codes int32 [..., rows, blocks] for block maxima, finite; BEST counts as CEIL.

    Within each tile of 128 elements codes are raised to the tile's largest minus 14, so that the whole tile is exact
    in E4M3, and blocks of zeros take the tile's largest code (any scale represents them). Source: NUMERICS.md 3.
    With square blocks the tile is 128 x 128.
    """
    if operand.square:
        absmax = rows_max(absmax, operand.block)
    count, width = absmax.shape[-1], TILE // operand.block
    if count % width:
        absmax = F.pad(absmax, (0, -count % width))
    absmax = absmax.unflatten(-1, (-1, width))  # [..., rows, tiles, blocks of a tile]
    codes = e8m0_from_absmax(absmax, operand.scale_rule)
    top = codes.amax(-1, keepdim=True)
    if operand.square:
        top = rows_max(top.squeeze(-1), TILE).unsqueeze(-1)
    codes = torch.maximum(codes, top - _SPAN)
    return torch.where(absmax.logical_not(), top, codes).flatten(-2)[..., :count]


def _tile_top(codes: Tensor, operand: Operand) -> Tensor:
    """The largest code of each block's tile, [..., rows, blocks]."""
    top = group_max(codes, TILE, operand.block)
    if operand.square:
        top = rows_max(top, TILE)
    return per_block(top, TILE, operand.block, codes.shape[-1])


def macro_factors(macro: Macro, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the encode factor f and the decode factor g, float32, for stored macro bytes (uint8, any shape).

    x_hat = Q(f x) g. Static and searched: f = 1 + byte / 256 and g = 1 / f rounded to float32; folded: g is
    `FOLDED_DECODE[byte]` and f = 1 / g rounded to float32.
    """
    if macro.method == "folded":
        g = stored.to(torch.float32).mul_(0.25).add_(1.0)
        return g.reciprocal(), g
    f = stored.to(torch.float32).mul_(1 / 256).add_(1.0)
    return f, f.reciprocal()


def macro_bytes(blocks: Tensor, absmax: Tensor, operand: Operand, macro: Macro, rounding: RoundBlocks) -> Tensor:
    """Return the macro bytes uint8 [rows, macros] that `macro.method` chooses; blocks are finite, `absmax` theirs."""
    macro_absmax = group_max(absmax, macro.size, operand.block)
    if operand.square:
        macro_absmax = rows_max(macro_absmax, macro.size)
    if macro.method == "static":
        chosen = static_macro(macro_absmax, macro.bits)
    else:
        chosen = _search_macro(blocks, absmax, operand, macro, rounding)
    return chosen.masked_fill_(macro_absmax >= MACRO_LIMIT, 0)


def static_macro(macro_absmax: Tensor, bits: int) -> Tensor:
    """Return the macro bytes uint8 for macro-block maxima float32 (arXiv 2603.08713; NUMERICS.md 5).

    The mantissa of 6 / max, truncated to `bits` bits: f * max lands just below 6 * 2^n, so the block that holds the
    maximum uses the whole grid, and truncation keeps it from overflowing under the ceil rule.
    """
    ratio = torch.full_like(macro_absmax, E2M1_MAX).div_(macro_absmax.clamp(min=1e-12))
    mantissa = ratio.view(torch.int32) >> (FLOAT32_MANTISSA_BITS - 8)
    return mantissa.bitwise_and_(0x100 - (1 << (8 - bits))).to(torch.uint8)


def candidate_bytes(macro: Macro) -> range:
    """Macro bytes that the "search" and "folded" methods try, in order; the first of equals wins."""
    return range(len(FOLDED_DECODE)) if macro.method == "folded" else range(0, 256, 256 >> macro.bits)


def _search_macro(blocks: Tensor, absmax: Tensor, operand: Operand, macro: Macro, rounding: RoundBlocks) -> Tensor:
    """The bytes of least squared error among `candidate_bytes` (NUMERICS.md 5), before any outlier fallback."""
    candidates = torch.tensor(candidate_bytes(macro), dtype=torch.uint8)
    f, g = macro_factors(macro, candidates.to(blocks.device))
    codes = codes_from_maxima(absmax * f.view(-1, 1, 1), operand)  # [candidates, rows, blocks]
    scaled = scratch("scaled candidate", blocks)
    best_error = best = None
    for index, byte in enumerate(candidates.tolist()):
        torch.mul(blocks, f[index], out=scaled)
        error = squared_error(scaled, rounding(scaled, codes[index]), operand, macro.size).mul_(g[index].square())
        if best is None or best_error is None:
            best, best_error = torch.full_like(error, byte, dtype=torch.uint8), error
            continue
        best.masked_fill_(error < best_error, byte)
        best_error = torch.minimum(best_error, error)
    assert best is not None
    return best


def squared_error(blocks: Tensor, values: Tensor, operand: Operand, group: int) -> Tensor:
    """Return the squared error [rows, ceil(K / group)], shared over `group` rows for square blocks; uses up `values`.

    Additions are in one fixed order (by halving), so every device and layout makes the same choices.
    """
    sums = tree_sum(values.sub_(blocks).square_()).clone()
    width = group // operand.block
    if width > 1:
        sums = tree_sum(F.pad(sums, (0, -sums.shape[1] % width)).unflatten(-1, (-1, width)))
    if operand.square:
        rows = sums.shape[0]
        groups = F.pad(sums, (0, 0, 0, -rows % group)).unflatten(0, (-1, group)).transpose(1, 2)
        sums = tree_sum(groups).repeat_interleave(group, dim=0)[:rows]
    return sums


def tree_sum(values: Tensor) -> Tensor:
    """Sum the last axis (a power of two long) in place by halving; returns a view of its first column."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half].add_(values[..., half:])
    return values.squeeze(-1)


def saturates(rule: ScaleRule) -> bool:
    """True when a block maximum may exceed 6 scale units under `rule`, so that rounding has to clamp."""
    return rule is not ScaleRule.CEIL
