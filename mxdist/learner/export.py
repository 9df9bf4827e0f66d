"""The weights that one rank contributes to a new policy version: packed MXFP4 where quantised, plain elsewhere."""

from collections.abc import Iterator
from dataclasses import replace

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from mxdist.messages import TensorEntry, WeightPayload
from mxdist.model.recipes import ModelRecipes
from mxdist.model.shape import ModelShape
from mxdist.model.weights import HfTensor, hf_tensors
from mxdist.sync.payload import dense_entry, mx_entry


def export(model: GPTModel, shape: ModelShape, recipes: ModelRecipes, version: int) -> WeightPayload:
    """What this rank owns; the payloads of all ranks hold every Hugging Face tensor exactly once."""
    entries = tuple(_entry(tensor) for tensor in owned_tensors(model, shape))
    return WeightPayload(version, recipes.to_dict(), entries)


def owned_tensors(model: GPTModel, shape: ModelShape) -> Iterator[HfTensor]:
    """Each tensor belongs to the first of the ranks that hold it."""
    first = parallel_state.get_data_parallel_rank() == 0
    first_of_experts = parallel_state.get_expert_data_parallel_rank() == 0
    for tensor in hf_tensors(model, shape):
        if tensor.is_copy:
            continue
        if first_of_experts if tensor.is_expert else first:
            yield tensor


def _entry(tensor: HfTensor) -> TensorEntry:
    """What is sent is a copy: the next optimizer step must not change it on its way."""
    if tensor.module is None:
        return dense_entry(tensor.name, tensor.read().to("cpu", copy=True))
    packed, values = tensor.quantised()
    entry = mx_entry(tensor.name, packed, values)
    return replace(entry, parts={name: part.copy() for name, part in entry.parts.items()})
