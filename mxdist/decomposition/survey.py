"""Stream the linears of a checkpoint through `quant.decompose.measure`: each value is read once, for all recipes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mxdist.decomposition.pieces import Portion, portions, size_of
from mxdist.decomposition.selection import Linear
from mxdist.decomposition.source import Source, StoredTensor
from mxdist.errors import UserError
from mxdist.model.checkpoint_files import Region
from mxdist.quant.decompose import measure
from mxdist.quant.moments import Moments
from mxdist.quant.recipe import Operand

OnNonFinite = Literal["error", "propagate"]


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The first NaN or Inf of a tensor: its indices, and what it is ("nan", "inf" or "-inf")."""

    position: tuple[int, ...]
    value: str


@dataclass(slots=True)
class Measured:
    """The sums of one tensor by recipe, or where it stops being finite. Then it has no sums."""

    linear: Linear
    moments: dict[str, Moments]
    nonfinite: NonFinite | None = None


Piece = tuple[Linear, dict[str, Moments] | NonFinite]


def survey(
    source: Source,
    linears: Sequence[Linear],
    operands: Mapping[str, Operand],
    *,
    workers: int = 1,
    nonfinite: OnNonFinite = "error",
    on_read: Callable[[int], object] | None = None,
) -> list[Measured]:
    """Measure every linear with every operand (by recipe name), in `workers` threads.

    Sets torch's own threads to 1: the threads here replace them. `on_read` is told of stored bytes as they are done.

    Raises:
        UserError: a tensor holds NaN or Inf, unless `nonfinite` is "propagate".
    """
    torch.set_num_threads(1)
    results = {linear.tensor.name: Measured(linear, {name: Moments() for name in operands}) for linear in linears}

    def work(portion: Portion) -> list[Piece]:
        with source.open(portion.place) as read:
            return [
                (linear, _measure(read(linear.tensor.name, region), linear, region, operands))
                for linear, region in portion.pieces
            ]

    for portion, pieces in _in_order(work, portions(linears, source.portion_elements), workers):
        for linear, found in pieces:
            result = results[linear.tensor.name]
            if not isinstance(found, NonFinite):
                result.moments = {name: result.moments[name] + found[name] for name in operands}
            elif nonfinite == "error":
                raise UserError(
                    f"{describe(linear.tensor, found)}; mend it, leave the tensor out with --skip, or measure the "
                    f"others with --nonfinite propagate"
                )
            else:
                result.nonfinite = result.nonfinite or found
        if on_read is not None:
            on_read(sum(size_of(region) * linear.tensor.element_bytes for linear, region in portion.pieces))
    return list(results.values())


def describe(tensor: StoredTensor, found: NonFinite) -> str:
    """Say where a tensor stops being finite."""
    return (
        f"{tensor.name} of shape {list(tensor.shape)} in {tensor.place} holds {found.value} at {list(found.position)}"
    )


def _in_order(
    work: Callable[[Portion], list[Piece]], tasks: Iterable[Portion], workers: int
) -> Iterator[tuple[Portion, list[Piece]]]:
    """Do the tasks in threads, a few at a time; results come in the order of the tasks, so that errors do, too."""
    pending: deque[tuple[Portion, Future[list[Piece]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for task in tasks:
            pending.append((task, pool.submit(work, task)))
            if len(pending) > 2 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        for task, future in pending:
            yield task, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _measure(
    values: Tensor, linear: Linear, region: Region, operands: Mapping[str, Operand]
) -> dict[str, Moments] | NonFinite:
    rows = values if linear.axis == -1 else values.transpose(-1, -2)
    try:
        return {name: measure(rows, operand, name=linear.tensor.name) for name, operand in operands.items()}
    except ValueError:
        bad = ~torch.isfinite(values)
        if not bad.any():
            raise
    first = bad.nonzero()[0].tolist()
    position = tuple(index + part.start for index, part in zip(first, region, strict=True))
    return NonFinite(position, str(values[tuple(first)].item()))
