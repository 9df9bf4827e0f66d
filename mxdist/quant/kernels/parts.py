"""Contractions split over programs: the last of an output tile's programs to finish adds their sums, in one order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILES = 1 << 14
_counts: dict[torch.device, Tensor] = {}


@triton.jit
def is_last_part(sums, partial, count, part, size, to, inside, PARTS: tl.constexpr):
    """Store a part's sums; True for the program that finds all others stored.

    partial  float32 [parts, size] in memory;  to  where sums go in a part;  count  of the tile's finished programs
    """
    tl.store(partial + part * size + to, sums, mask=inside)
    tl.debug_barrier()  # all of this program's sums are stored before it says so
    return tl.atomic_add(count, 1, sem="acq_rel") == PARTS - 1


@triton.jit
def sum_of_parts(partial, count, size, to, inside, PARTS: tl.constexpr):
    """The sums of all parts, in their order; the tile's count is zero again."""
    tl.store(count, 0)
    total = tl.load(partial + to, mask=inside, other=0.0, cache_modifier=".cg")
    for other in tl.static_range(1, PARTS):
        total += tl.load(partial + other * size + to, mask=inside, other=0.0, cache_modifier=".cg")
    return total


def finished(device: torch.device, tiles: int) -> Tensor:
    """Programs that have finished, int32, for each of `tiles` output tiles; zero between products.

    One per device: products that split their contraction must not run on two streams at once.
    """
    if tiles > _TILES:
        raise ValueError(f"a product of {tiles} output tiles is not split: {_TILES} are counted at most.")
    counts = _counts.get(device)
    if counts is None:
        counts = torch.zeros(_TILES, dtype=torch.int32, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():  # a graph would keep them its own
            _counts[device] = counts
    return counts
