"""Outlier fallback on flagged tiles only: which tiles, and the controller that holds their share at a target.

The whole-tensor fallback of arXiv 2605.20402 doubles the bits of every element. Flagging spends them where blocks
hold outliers: a 128-tile gets a residual when its largest magnitude exceeds a threshold. The idea of a dynamic
block-level fallback is from arXiv 2503.08040; criterion and controller here are this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.layout import as_rows, group_max, per_block, rows_max, to_blocks
from mxdist.quant.recipe import Operand


def tile_maxima(x: Tensor) -> Tensor:
    """Return the largest magnitude float32 [rows, ceil(K / 128)] of every 128-tile of x [..., K]."""
    return group_max(to_blocks(as_rows(x), 32).abs().amax(-1), TILE, 32)


def choose_tiles(maxima: Tensor, fraction: float) -> Tensor:
    """Return int64 [n], ascending: the tiles along K whose largest magnitudes are largest on average over rows.

    maxima  see `tile_maxima`. n is the share `fraction` of the tiles along K, rounded, but at least one. Outliers of
    activations sit in few channels (arXiv 2503.08040), so few tiles along K hold most of them.
    """
    count = max(1, round(fraction * maxima.shape[1]))
    return maxima.mean(0).topk(count).indices.sort().values


def tile_flags(absmax: Tensor, operand: Operand, threshold: float | None, tiles: Tensor | None = None) -> Tensor | None:
    """Return int32 0/1 [rows, blocks]: does the block's tile get a residual? None when every tile does.

    absmax is the block maxima float32 [rows, blocks]; with square blocks the tile is 128 x 128. threshold, tiles: see
    `transform.Frozen`.
    """
    if operand.fallback is None or operand.fallback.fraction is None:
        return None
    blocks = absmax.shape[-1]
    if tiles is not None:
        listed = torch.zeros(-(-blocks * operand.block // TILE), dtype=torch.int32, device=absmax.device)
        listed[tiles.to(absmax.device)] = 1
        return per_block(listed.expand(absmax.shape[0], -1), TILE, operand.block, blocks)
    if threshold is None:
        return None
    tops = group_max(absmax, TILE, operand.block)
    if operand.square:
        tops = rows_max(tops, TILE)
    return per_block((tops > threshold).int(), TILE, operand.block, absmax.shape[-1])


@dataclass(slots=True)
class ThresholdController:
    """Steers a layer's threshold so that about `fraction` of its tiles exceed it. Update it between steps.

    fraction   target share of flagged tiles, in (0, 1).
    threshold  in units of x; None until the first update, which sets it to the right quantile outright.
    gain       strength of the correction: the threshold moves by exp(gain * relative excess) per update, the excess
               clipped to [-1, 1].
    """

    fraction: float
    threshold: float | None = None
    gain: float = 0.3

    def update(self, maxima: Tensor) -> float:
        """Take a step's tile maxima (see `tile_maxima`), return the flagged share under the threshold before it."""
        if maxima.numel() == 0:
            raise ValueError("the threshold controller needs at least one tile.")
        if self.threshold is None:
            rank = max(1, round(maxima.numel() * (1 - self.fraction)))
            self.threshold = maxima.flatten().kthvalue(rank).values.item()
        flagged = (maxima > self.threshold).float().mean().item()
        excess = max(-1.0, min(1.0, flagged / self.fraction - 1.0))
        self.threshold *= float(torch.tensor(self.gain * excess).exp())
        return flagged
