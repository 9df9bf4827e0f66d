"""What happens to an operand before its blocks are quantised and is undone after: mean removal, then Hadamard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.hadamard import POINTS, rotate, rotate_back
from mxdist.quant.philox import Draw, random_signs
from mxdist.quant.recipe import Operand


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """What a layer holds fixed between calibrations, shipped with its weights so that learner and engine agree.

    mean       float [K], the channel means that `Operand.mean` takes off (arXiv 2603.10444, with a frozen mean
               instead of the batch's: decode batches and packed training batches have different ones).
    threshold  in units of x: 128-tiles whose largest magnitude exceeds it get a residual (`Fallback.fraction`).
    tiles      int64 [n], instead of a threshold: the tiles along K that get a residual, the same in every row
               (`fallback.choose_tiles`). A GEMM then only grows by n tiles along K.
    """

    mean: Tensor | None = None
    threshold: float | None = None
    tiles: Tensor | None = None

    def check(self, operand: Operand, k: int, name: str) -> None:
        """ValueError when the operand needs a value that is missing, or a mean that does not fit K."""
        if operand.mean and (self.mean is None or self.mean.shape != (k,)):
            got = "none was given" if self.mean is None else f"it has shape {tuple(self.mean.shape)}"
            raise ValueError(f"quantising {name} takes off a frozen mean of shape ({k},), but {got}.")
        if operand.fallback is not None and operand.fallback.fraction is not None:
            if self.threshold is None and self.tiles is None:
                raise ValueError(f"quantising {name} flags tiles by a threshold or a list, but none was given.")
            if self.threshold is not None and self.tiles is not None:
                raise ValueError(f"quantising {name} flags tiles by a threshold or by a list, not by both.")


def enter(rows: Tensor, operand: Operand, frozen: Frozen, draw: Draw | None) -> Tensor:
    """Return the rows [rows, K] as they are quantised; with Hadamard K is padded to a multiple of 32."""
    if operand.mean and frozen.mean is not None:
        rows = rows.to(torch.float32) - frozen.mean.to(torch.float32)
    if operand.hadamard != "none":
        padded = F.pad(rows.to(torch.float32), (0, -rows.shape[1] % POINTS))
        rows = rotate(padded, _signs(operand, draw, padded))
    return rows


def leave(rows: Tensor, operand: Operand, frozen: Frozen, draw: Draw | None) -> Tensor:
    """Inverse of `enter` on dequantised float32 rows [rows, padded K]."""
    if operand.hadamard != "none":
        rows = rotate_back(rows, _signs(operand, draw, rows))
    if operand.mean and frozen.mean is not None:
        rows = rows[:, : frozen.mean.shape[0]] + frozen.mean.to(torch.float32)
    return rows


def _signs(operand: Operand, draw: Draw | None, rows: Tensor) -> Tensor | None:
    if operand.hadamard != "signed" or draw is None:
        return None
    return random_signs(draw, rows.shape[1], rows.device)
