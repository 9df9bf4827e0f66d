"""Rows grouped by expert, cut into tiles for `decode`: a table made on the device, so that nobody waits for counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.options import DECODE_ROWS

_TILES = 16
"""Lines of the table that a program writes."""


@triton.jit
def _table_of_groups_kernel(
    counts, table, experts, tiles, HEIGHT: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr
):
    e, tile = tl.arange(0, EXPERTS), tl.program_id(0) * TILES + tl.arange(0, TILES)
    count = tl.load(counts + e, mask=e < experts, other=0).to(tl.int32)
    own = (count + HEIGHT - 1) // HEIGHT
    end = tl.cumsum(own, 0)  # the tiles of experts 0..e
    before = end[None, :] <= tile[:, None]
    expert = tl.sum(before.to(tl.int32), 1)  # EXPERTS for tiles that nobody needs
    start = tl.sum(tl.where(before, count[None, :], 0), 1)
    first = start + (tile - tl.sum(tl.where(before, own[None, :], 0), 1)) * HEIGHT
    stop = start + tl.sum(tl.where(e[None, :] == expert[:, None], count[None, :], 0), 1)
    inside, needed, line = tile < tiles, expert < EXPERTS, table + 3 * tile
    tl.store(line, tl.where(needed, expert, 0), mask=inside)
    tl.store(line + 1, tl.where(needed, first, 0), mask=inside)
    tl.store(line + 2, tl.where(needed, stop, 0), mask=inside)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Rows grouped by expert, cut into tiles of at most `height` rows of one expert.

    experts  how many there are
    table    int32 [tiles, 3] on the device: a tile's expert, its first row, and the end of the expert's rows; tiles
             that nobody needs have no rows
    """

    experts: int
    height: int
    table: Tensor

    @classmethod
    def from_counts(cls, counts: Tensor, rows: int) -> Groups:
        """For experts of `counts` rows, int64 [experts] on the device, in their order, `rows` of them in all.

        One launch that depends on the shapes alone, so a CUDA graph can hold it. Tiles are as high as experts with
        twice their share of rows.
        """
        experts = len(counts)
        most = min(experts, rows)  # that have rows
        height = tile_height(2 * triton.cdiv(rows, most)) if rows else tile_height(1)
        tiles = most + (rows - most) // height
        table = torch.empty(tiles, 3, dtype=torch.int32, device=counts.device)
        if tiles:
            width = triton.next_power_of_2(experts)
            _table_of_groups_kernel[(triton.cdiv(tiles, _TILES),)](
                counts, table, experts, tiles, HEIGHT=height, EXPERTS=width, TILES=_TILES, num_warps=4
            )
        return cls(experts, height, table)

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> Groups:
        """For sizes that the host knows."""
        return cls.from_counts(torch.tensor(sizes, dtype=torch.int64).to(device), sum(sizes))


def tile_height(rows: int) -> int:
    """Rows of a tile for experts, or a product, of `rows` rows."""
    return max(8, min(DECODE_ROWS, triton.next_power_of_2(rows)))
