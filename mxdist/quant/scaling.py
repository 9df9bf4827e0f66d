"""Block scales and macro factors: which power of two, and which factor in [1, 2), each group of elements gets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.format import (
    E2M1_MAX,
    FLOAT32_MANTISSA_BITS,
    TILE,
    TILE_SPAN,
    e8m0_from_absmax,
)
from mxdist.quant.layout import group_max, per_block
from mxdist.quant.recipe import Macro, ScaleRule

RoundBlocks = Callable[[Tensor, Tensor], Tensor]
"""(blocks [rows, blocks, block], codes int32 [rows, blocks]) -> the blocks rounded to E2M1 times their scales."""

FOLDED_DECODE = (1.0, 1.25, 1.5)
"""Decode factors g = 1/f of the "folded" macro method: g times any E2M1 value is an E4M3 number (kernels.md 9)."""

MACRO_LIMIT = 2.0**126
"""A macro block whose maximum reaches this keeps f = 1, so that f * x stays finite."""


def block_codes(absmax: Tensor, rule: ScaleRule, block: int) -> Tensor:
    """Return the E8M0 codes int32 [rows, blocks] for block maxima float32 [rows, blocks], finite and >= 0.

    Within each tile of 128 elements codes are raised to the tile's largest minus 14, so that the whole tile is exact
    in E4M3, and blocks of zeros take the tile's largest code (any scale represents them). Source: kernels.md 0.1.
    """
    codes = e8m0_from_absmax(absmax, rule)
    top = per_block(group_max(codes, TILE, block), TILE, block, codes.shape[-1])
    codes = torch.maximum(codes, top - TILE_SPAN)
    return torch.where(absmax == 0, top, codes)


def macro_factors(macro: Macro, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the encode factor f and the decode factor g, float32, for stored macro bytes (uint8, any shape).

    x_hat = Q(f x) g. Static and searched: f = 1 + byte / 256 and g = 1 / f rounded to float32; folded: g is
    `FOLDED_DECODE[byte]` and f = 1 / g rounded to float32.
    """
    if macro.method == "folded":
        g = torch.tensor(FOLDED_DECODE, device=stored.device)[stored.to(torch.int32)]
        return g.reciprocal(), g
    f = stored.to(torch.float32).mul_(1 / 256).add_(1.0)
    return f, f.reciprocal()


def static_macro(macro_absmax: Tensor, bits: int) -> Tensor:
    """Return the macro bytes uint8 for macro-block maxima float32 [rows, macros] (arXiv 2603.08713; facts 3.2).

    The mantissa of 6 / max, truncated to `bits` bits: f * max lands just below 6 * 2^n, so the block that holds the
    maximum uses the whole grid, and truncation keeps it from overflowing under the ceil rule.
    """
    ratio = torch.full_like(macro_absmax, E2M1_MAX).div_(macro_absmax.clamp(min=1e-12))
    mantissa = (ratio.view(torch.int32) >> (FLOAT32_MANTISSA_BITS - 8)) & (0x100 - (1 << (8 - bits)))
    return torch.where(macro_absmax >= MACRO_LIMIT, 0, mantissa).to(torch.uint8)


def candidate_bytes(macro: Macro) -> range:
    """Macro bytes that the "search" and "folded" methods try, in order; the first of equals wins."""
    return range(len(FOLDED_DECODE)) if macro.method == "folded" else range(0, 256, 256 >> macro.bits)


def search_macro(blocks: Tensor, absmax: Tensor, macro: Macro, rule: ScaleRule, rounding: RoundBlocks) -> Tensor:
    """Return the macro bytes uint8 [rows, macros] of least squared error among `candidate_bytes` (facts 3.2).

    The error is taken before the outlier fallback and in units of x; macro blocks at `MACRO_LIMIT` keep byte 0.
    """
    block = blocks.shape[-1]
    macro_absmax = group_max(absmax, macro.size, block)
    best_error = torch.full_like(macro_absmax, torch.inf)
    best = torch.zeros_like(macro_absmax, dtype=torch.uint8)
    for byte in candidate_bytes(macro):
        f, g = macro_factors(macro, torch.tensor(byte, dtype=torch.uint8, device=blocks.device))
        scaled = blocks * f
        error = rounding(scaled, block_codes(absmax * f, rule, block)).sub_(scaled)
        sse = group_sum(tree_sum(error.square_()), macro.size // block).mul_(g * g)
        better = sse < best_error
        best_error = torch.where(better, sse, best_error)
        best.masked_fill_(better & (macro_absmax < MACRO_LIMIT), byte)
    return best


def tree_sum(values: Tensor) -> Tensor:
    """Sum the last axis (a power of two long) by halving: one fixed order of additions on every device and layout."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values.squeeze(-1)


def group_sum(per_block_values: Tensor, width: int) -> Tensor:
    """Sum [rows, blocks] over `width` consecutive blocks (a power of two) in a fixed order; the last may be short."""
    rows, blocks = per_block_values.shape
    if blocks % width:
        per_block_values = F.pad(per_block_values, (0, width - blocks % width))
    return tree_sum(per_block_values.reshape(rows, -1, width))


def saturates(rule: ScaleRule) -> bool:
    """True when a block maximum may exceed 6 scale units under `rule`, so that rounding has to clamp."""
    return rule is not ScaleRule.CEIL
