"""The weights that one rank contributes to a new policy version: packed MXFP4 where quantised, float32 elsewhere."""

from collections.abc import Iterator

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from mxdist.messages import TensorEntry, WeightPayload
from mxdist.model.shape import ModelShape
from mxdist.model.weights import HfTensor, hf_tensors
from mxdist.quant.checksum import checksum
from mxdist.quant.recipe import Recipe


def export(model: GPTModel, shape: ModelShape, recipe: Recipe, version: int) -> WeightPayload:
    """What this rank owns; the payloads of all ranks hold every Hugging Face tensor exactly once."""
    entries = tuple(_entry(tensor) for tensor in _owned(model, shape))
    return WeightPayload(version, recipe.to_dict(), entries)


def _owned(model: GPTModel, shape: ModelShape) -> Iterator[HfTensor]:
    """Each tensor belongs to the first of the ranks that hold it."""
    first = parallel_state.get_data_parallel_rank() == 0
    first_of_experts = parallel_state.get_expert_data_parallel_rank() == 0
    for tensor in hf_tensors(model, shape):
        if first_of_experts if tensor.is_expert else first:
            yield tensor


def _entry(tensor: HfTensor) -> TensorEntry:
    if tensor.module is None:
        values = tensor.read().float().cpu()
        return TensorEntry(tensor.name, "dense", tensor.shape, {"values": _array(values)}, {"values": checksum(values)})
    quantised = tensor.quantised()
    parts = {name: part.cpu() for name, part in quantised.parts().items()}
    checksums = {name: checksum(part) for name, part in parts.items()}
    checksums["values"] = checksum(quantised.dequantise(torch.float32))
    return TensorEntry(tensor.name, "mx", tensor.shape, {name: _array(part) for name, part in parts.items()}, checksums)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A copy: the next optimizer step must not change what was sent."""
    return np.array(tensor.numpy(), copy=True)
