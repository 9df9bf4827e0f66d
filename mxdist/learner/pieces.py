"""What a learner rank holds of model and optimizer, as the boxes of whole tensors that a checkpoint is made of.

Megatron's own way to a checkpoint that any layout can load gathers the optimizer's state on every rank first, with
training stopped. Nothing has to be gathered: a rank owns a range of each flattened parameter, a range is at most a few
boxes of the whole tensor, and a distributed checkpoint is written, and read, in boxes of any size. Names and shapes of
the whole tensors are Megatron's (its "fully_reshardable" form).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mxdist.learner.boxes import boxes
from mxdist.learner.megatron_policy import MegatronPolicy


@dataclass(frozen=True)
class Piece:
    """A box of a tensor of the checkpoint."""

    place: ShardedTensor  # without values: its tensor is on the device "meta"
    source: Callable[[], Tensor]  # one axis; asked for anew at every save, as it may be replaced
    start: int  # of the box in the source

    @property
    def index(self) -> tuple[str, tuple[int, ...]]:
        """Key and offset, which no other piece of this rank has."""
        return self.place.key, self.place.global_offset

    def values(self) -> Tensor:
        """The box as it is now, a view."""
        shape = self.place.local_shape
        return self.source()[self.start : self.start + prod(shape)].view(shape)


def pieces(policy: MegatronPolicy) -> Iterator[Piece]:
    """All of this rank, those included that other ranks hold as well (``ShardedTensor.replica_id``)."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    model = policy.model.sharded_state_dict(metadata={"singleton_local_shards": False, "dp_cp_group": group})
    tensors, _ = extract_sharded_tensors_and_factories(model)  # the rest: extra states of layers, which are empty
    described = {entry.data: entry for entry in nested_values(tensors)}
    for parameter, entry in described.items():
        yield from _pieces(entry, entry.key, _flat(parameter), 0)
    for part in policy.optimizer.chained_optimizers:
        for parameter, (buffer, dtype, bucket) in part.model_param_gbuf_map.items():
            start = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"].start
            entry = described[parameter]
            # A range has no copies on other data-parallel ranks, which the last number would count.
            entry = replace(entry, replica_id=(*entry.replica_id[:2], 0))
            for name in ("param", *part.optimizer.state[_master(part, parameter)]):
                yield from _pieces(entry, f"optimizer.state.{name}.{entry.key}", _state(part, parameter, name), start)


def _flat(parameter: Tensor) -> Callable[[], Tensor]:
    return lambda: parameter.detach().view(-1)


def _state(part: DistributedOptimizer, parameter: Tensor, name: str) -> Callable[[], Tensor]:
    """This rank's range of the weights that the optimizer keeps ("param"), or of one of its moments."""

    def source() -> Tensor:
        master = _master(part, parameter)
        return master.detach() if name == "param" else part.optimizer.state[master][name]

    return source


def _master(part: DistributedOptimizer, parameter: Tensor) -> Tensor:
    group, order = part.model_param_group_index_map[parameter]
    return part.optimizer.param_groups[group]["params"][order]


def _pieces(
    entry: ShardedTensor | ShardedTensorFactory, key: str, source: Callable[[], Tensor], start: int
) -> Iterator[Piece]:
    """Those of ``source``, which holds the elements from ``start`` on of the flattened parameter of ``entry``."""
    held = source()
    whole = torch.empty(entry.data.shape, dtype=held.dtype, device="meta")
    for part in _parts(entry, key, whole):
        # Some rows of the parameter, such as the gate's of gate and up.
        first, shape = part.data.storage_offset(), tuple(part.local_shape)
        if not part.data.is_contiguous():
            raise ValueError(f"{key} is not divided by rows")
        prepended = part.prepend_axis_num
        begin, end = max(start, first), min(start + len(held), first + prod(shape))
        for offset, size in boxes(begin - first, end - first, shape):
            within = sum(index * prod(shape[axis + 1 :]) for axis, index in enumerate(offset))
            size = (*[1] * prepended, *size)
            corner = zip(part.global_offset, (*[0] * prepended, *offset), strict=True)
            place = ShardedTensor(
                key=part.key,
                data=torch.empty(size, dtype=held.dtype, device="meta"),
                dtype=held.dtype,
                local_shape=size,
                global_shape=part.global_shape,
                global_offset=tuple(own + inner for own, inner in corner),
                axis_fragmentations=None,  # no regular grid
                replica_id=part.replica_id,
            )
            yield Piece(place, source, first + within - start)


def _parts(entry: ShardedTensor | ShardedTensorFactory, key: str, whole: Tensor) -> list[ShardedTensor]:
    if isinstance(entry, ShardedTensorFactory):
        return list(nested_values(replace(entry, key=key, data=whole).build()))
    return [replace(entry, key=key, data=whole, dtype=whole.dtype)]
