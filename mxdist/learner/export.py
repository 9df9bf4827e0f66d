"""The weights that one rank contributes to a new policy version: packed MXFP4 where quantised, plain elsewhere."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mxdist.messages import TensorEntry, WeightPayload
from mxdist.model.hf_tensors import HfTensor
from mxdist.model.recipes import ModelRecipes
from mxdist.quant.tensor import MXTensor
from mxdist.sync.payload import dense_entry, mx_entry


def export(
    owned: Iterable[HfTensor], recipes: ModelRecipes, version: int, tensor_parallel: ProcessGroup | None = None
) -> WeightPayload:
    """The payload of this rank's tensors.

    Collective over the tensor-parallel ranks: the first of them gathers the others' slices, packed ones as bytes.
    """
    entries = (_entry(tensor, tensor_parallel) for tensor in owned)
    return WeightPayload(version, recipes.to_dict(), tuple(entry for entry in entries if entry is not None))


def _entry(tensor: HfTensor, group: ProcessGroup | None) -> TensorEntry | None:
    """The whole tensor, where this rank is the one that sends it. A copy: it outlives the next optimizer step."""
    if tensor.module is None:
        whole = _whole(tensor.read(), tensor, group)
        return None if whole is None else dense_entry(tensor.name, whole.to("cpu", copy=True))
    packed, values = tensor.quantised()
    parts = {name: _whole(part, tensor, group) for name, part in packed.parts().items()}
    all_values = _whole(values, tensor, group)
    present = {name: part for name, part in parts.items() if part is not None}
    if all_values is None:
        return None
    # Slices end where blocks and macro-blocks end (``config.layout``), so the bytes of the whole are theirs in a row.
    entry = mx_entry(tensor.name, MXTensor.from_parts(present, tensor.whole_shape, packed.operand), all_values)
    return replace(entry, parts={name: part.copy() for name, part in entry.parts.items()})


def _whole(part: Tensor, tensor: HfTensor, group: ProcessGroup | None) -> Tensor | None:
    """The slices of all tensor-parallel ranks together, on the first of them; None on the others."""
    division = tensor.division
    is_first = group is None or group.rank() == 0
    if division.count == 1:
        return part if is_first or tensor.is_expert else None
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(division.count)] if is_first else None
    torch.distributed.gather(part, parts, group=group, group_dst=0)
    return None if parts is None else torch.cat(parts, division.dimension)
