"""Ranges of a flattened tensor as boxes of the tensor."""

from collections.abc import Iterator
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape


def boxes(begin: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Offsets and shapes of as few boxes as make up the elements [begin, end) of a flattened tensor, in their order."""
    if begin >= end:
        return
    if len(shape) < 2:
        yield ((begin,), (end - begin,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first, last = -(-begin // row), end // row  # rows that are wholly inside
    if begin < first * row:
        yield from _of_row(first - 1, begin - (first - 1) * row, min(end - (first - 1) * row, row), shape)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if first <= last:
        yield from _of_row(last, 0, end - last * row, shape)


def _of_row(index: int, begin: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    for offset, size in boxes(begin, end, shape[1:]):
        yield (index, *offset), (1, *size)
