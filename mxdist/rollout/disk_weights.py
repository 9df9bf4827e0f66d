"""Packed checkpoints as `mxdist export --form mxfp4` writes them, read from disk by vLLM's own loader.

The loader fills parameters, by the names in the files: MODULE.codes, MODULE.scales, ... where a linear is quantised,
MODULE.weight elsewhere. So a layer gets a parameter for each part of its live weight, on the same memory; what arrives
is counted, and a weight that is not complete refuses to be used. Engines whose weights come by sync have none of this.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mxdist.rollout.live_weight import LiveWeight
from mxdist.sync.payload import VALUES

Rows = Callable[..., slice]
"""From what vLLM's loader says of a tensor besides its values (which of fused linears, which expert) to its rows."""


class DiskWeight:
    """The parameters of one live weight, while they are filled.

    Args:
        layer: of vLLM, whose parameters they become, named ``prefix`` and the part.
        rows: of the live weight, that a loaded tensor goes to.
        complete: rows that make it complete; those after them are padding.
    """

    def __init__(self, layer: nn.Module, live: LiveWeight, rows: Rows, complete: int, prefix: str = "") -> None:
        self._live, self._rows, self._complete = live, rows, complete
        self._loaded: dict[str, set[tuple[int, int]]] = {}  # ranges of rows by part
        for part, tensor in live.parts().items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            parameter.weight_loader = self._loader_of(part)  # type: ignore[attr-defined]
            layer.register_parameter(prefix + ("weight" if part == VALUES else part), parameter)
            self._loaded[part] = set()

    def finish(self, name: str) -> None:
        """Make the values that GEMMs read. ValueError when something was not in the files."""
        for part, ranges in self._loaded.items():
            count = sum(stop - start for start, stop in ranges)
            if count < self._complete:
                what = "weight" if part == VALUES else part
                raise ValueError(
                    f"the checkpoint gave {count} of the {self._complete} rows of {name}, part {what}; export it again"
                )
        self._live.refresh()

    def _loader_of(self, part: str) -> Callable[..., bool]:
        def load(
            param: Tensor, loaded_weight: Tensor, *where: Any, shard_id: Any = None, expert_id: Any = None, **_: Any
        ) -> bool:
            del param  # it is on the live weight's memory
            # Linears are given the shard by position, if at all; experts the tensor's name by position or key.
            shard = shard_id if shard_id is not None or not where else where[0]
            rows = self._rows(shard, expert_id, len(loaded_weight))
            target = self._live.parts()[part][rows]
            if target.shape != loaded_weight.shape:
                raise ValueError(
                    f"part {part} is {tuple(loaded_weight.shape)} in the checkpoint, not {tuple(target.shape)}"
                )
            target.copy_(loaded_weight)
            self._loaded[part].add((rows.start, rows.stop))
            return True

        return load


def whole_rows(_shard: Any, _expert: Any, count: int) -> slice:
    """Of a tensor that fills its matrix from the top: an embedding's padding comes last."""
    return slice(0, count)


def rows_of_splits(splits: tuple[int, ...]) -> Rows:
    """Of linears that are fused in order: q, k, v or 0, 1; a single one has no shard."""
    starts = [sum(splits[:index]) for index in range(len(splits))]

    def rows(shard: Any, _expert: Any, _count: int) -> slice:
        index = 0 if shard is None else "qkv".index(shard) if isinstance(shard, str) else shard
        return slice(starts[index], starts[index] + splits[index])

    return rows


def rows_of_experts(height: int, parts: tuple[str, ...]) -> Rows:
    """Of experts one after another, each of ``parts`` in vLLM's names (w1 gate, w3 up, w2 down) of ``height`` rows."""

    def rows(shard: Any, expert: Any, _count: int) -> slice:
        start = (expert * len(parts) + parts.index(shard)) * height
        return slice(start, start + height)

    return rows
