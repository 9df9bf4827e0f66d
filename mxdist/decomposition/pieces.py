"""Cuts tensors into parts of bounded size that can be quantised one by one with the same result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mxdist.decomposition.selection import Linear
from mxdist.model.checkpoint_files import Region
from mxdist.quant.format import TILE


@dataclass(slots=True)
class Portion:
    """What is read with one opening of a place: pieces of one tensor, or several whole small ones."""

    place: str
    pieces: list[tuple[Linear, Region]] = field(default_factory=list)
    elements: int = 0


def portions(linears: Sequence[Linear], limit: int) -> Iterator[Portion]:
    """Group the tensors, in their order, into portions of one place and about `limit` elements."""
    current: Portion | None = None
    for linear in linears:
        for region in regions(linear.tensor.shape, linear.axis, limit):
            elements = size_of(region)
            place = linear.tensor.place
            if current is not None and (current.place != place or current.elements + elements > limit):
                yield current
                current = None
            current = current or Portion(place)
            current.pieces.append((linear, region))
            current.elements += elements
    if current is not None:
        yield current


def regions(shape: tuple[int, ...], axis: int, limit: int) -> Iterator[Region]:
    """Cut `shape` into regions of at most `limit` elements (at least 128), in the order in which they are stored.

    Rows do not influence one another, so they are cut anywhere; the contraction axis `axis` only between tiles of 128.
    The first axes are cut first: then a region is a stretch of the file, or lies within a short one.
    """
    units = [1] * len(shape)
    units[axis] = TILE
    yield from _cut(tuple(slice(0, length) for length in shape), units, limit)


def _cut(region: Region, units: list[int], limit: int) -> Iterator[Region]:
    lengths = [part.stop - part.start for part in region]
    axis = next((axis for axis, length in enumerate(lengths) if length > units[axis]), None)
    if axis is None or size_of(region) <= limit:
        yield region
        return
    unit, whole = units[axis], region[axis]
    step = max(unit, limit * lengths[axis] // size_of(region) // unit * unit)
    for first in range(whole.start, whole.stop, step):
        part = slice(first, min(first + step, whole.stop))
        yield from _cut((*region[:axis], part, *region[axis + 1 :]), units, limit)


def size_of(region: Region) -> int:
    """Number of elements."""
    return math.prod(part.stop - part.start for part in region)
