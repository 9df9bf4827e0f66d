"""The weights that one rank contributes to a new policy version: packed MXFP4 where quantised, plain elsewhere."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from mxdist.messages import TensorEntry, WeightPayload
from mxdist.model.recipes import ModelRecipes
from mxdist.model.shape import ModelShape
from mxdist.model.weights import HfTensor, hf_tensors
from mxdist.quant.tensor import MXTensor
from mxdist.sync.payload import dense_entry, mx_entry


def export(model: GPTModel, shape: ModelShape, recipes: ModelRecipes, version: int) -> WeightPayload:
    """What this rank owns; the payloads of all ranks hold every Hugging Face tensor exactly once, whole.

    Collective over the tensor-parallel ranks: the first of them gathers the others' slices, packed ones as bytes.
    """
    entries = (_entry(tensor) for tensor in owned_tensors(model, shape))
    return WeightPayload(version, recipes.to_dict(), tuple(entry for entry in entries if entry is not None))


def owned_tensors(model: GPTModel, shape: ModelShape) -> Iterator[HfTensor]:
    """Each slice belongs to the first of the data-parallel ranks that hold it; tensor-parallel ranks have one each."""
    first = parallel_state.get_data_parallel_rank() == 0
    first_of_experts = parallel_state.get_expert_data_parallel_rank() == 0
    for tensor in hf_tensors(model, shape):
        if tensor.is_copy:
            continue
        if first_of_experts if tensor.is_expert else first:
            yield tensor


def _entry(tensor: HfTensor) -> TensorEntry | None:
    """The whole tensor, where this rank is the one that sends it. A copy: it outlives the next optimizer step."""
    if tensor.module is None:
        whole = _whole(tensor.read(), tensor)
        return None if whole is None else dense_entry(tensor.name, whole.to("cpu", copy=True))
    packed, values = tensor.quantised()
    parts = {name: _whole(part, tensor) for name, part in packed.parts().items()}
    all_values = _whole(values, tensor)
    present = {name: part for name, part in parts.items() if part is not None}
    if all_values is None:
        return None
    # Slices end where blocks and macro-blocks end (``config.layout``), so the bytes of the whole are theirs in a row.
    entry = mx_entry(tensor.name, MXTensor.from_parts(present, tensor.whole_shape, packed.operand), all_values)
    return replace(entry, parts={name: part.copy() for name, part in entry.parts.items()})


def _whole(part: Tensor, tensor: HfTensor) -> Tensor | None:
    """The slices of all tensor-parallel ranks together, on the first of them; None on the others."""
    group = parallel_state.get_tensor_model_parallel_group()
    division = tensor.division
    is_first = group.rank() == 0
    if division.count == 1:
        return part if is_first or tensor.is_expert else None
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(division.count)] if is_first else None
    torch.distributed.gather(part, parts, group=group, group_dst=0)
    return None if parts is None else torch.cat(parts, division.dimension)
