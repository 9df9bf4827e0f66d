"""Where each of the learner's tensors lives in a running vLLM model.

vLLM fuses what Hugging Face keeps apart (q/k/v, gate/up, all experts of a layer). A `Slot` is one Hugging Face tensor
as a row range of a fused matrix; ``loading`` writes them.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from mxdist.model.division import Division
from mxdist.model.linear_names import parts_of
from mxdist.rollout.live_weight import LiveWeight
from mxdist.rollout.slot import UNDIVIDED, Slot


def find_slots(model: nn.Module, vocab_size: int) -> dict[str, Slot]:
    """Every tensor of the live model by its Hugging Face name, sorted by name.

    Raises:
        RuntimeError: a parameter of the model is in no slot, so that a sync would leave it behind.
    """
    slots = sorted(_slots(model, vocab_size), key=lambda slot: slot.name)
    held = {id(tensor) for slot in slots for tensor in slot.owner.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in held:
            raise RuntimeError(f"vLLM's parameter {name} has no method of mxdist's and no place in a weight sync")
    return {slot.name: slot for slot in slots}


def routed_layers(model: nn.Module) -> frozenset[int]:
    """Numbers of the layers whose feed-forward part is a mixture of experts."""
    paths = (name.split(".") for name, module in model.named_modules() if isinstance(module, RoutedExperts))
    return frozenset(int(path[path.index("layers") + 1]) for path in paths)


def _slots(model: nn.Module, vocab_size: int) -> Iterator[Slot]:
    for path, module in model.named_modules():
        if isinstance(module, RMSNorm):
            yield Slot(f"{path}.weight", module, slice(0, module.weight.shape[0]))
        elif isinstance(module, RoutedExperts):
            yield from _expert_slots(path.removesuffix(".routed_experts"), module)
        elif isinstance(getattr(module, "live", None), LiveWeight):
            yield from _linear_slots(path, module, vocab_size)


def _linear_slots(path: str, module: Any, vocab_size: int) -> Iterator[Slot]:
    if not hasattr(module, "live_splits"):  # embedding and head: vLLM pads the vocabulary
        division = _division(0)
        yield Slot(f"{path}.weight", module.live, slice(0, vocab_size // division.count), division=division)
        return
    by_row = _division(0) if isinstance(module, ColumnParallelLinear) else UNDIVIDED
    weights = _division(1) if isinstance(module, RowParallelLinear) else by_row
    start = 0
    for name, size in zip(parts_of(path), module.live_splits, strict=True):
        yield Slot(f"{name}.weight", module.live, slice(start, start + size), division=weights)
        if module.bias is not None:
            yield Slot(f"{name}.bias", module, slice(start, start + size), "bias", by_row)
        start += size


def _division(dimension: int) -> Division:
    """Of a tensor that vLLM divides along a dimension over the processes of an engine."""
    return Division(dimension, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())


def _expert_slots(path: str, module: RoutedExperts) -> Iterator[Slot]:
    hidden, wide = module.live_w13.shape[1], module.live_w2.shape[1]
    by_row, by_column = _division(0), _division(1)
    for expert in range(module.live_w2.shape[0] // hidden):
        place = f"{path}.{expert}"
        for offset, name in enumerate(("gate_proj", "up_proj")):
            start = (2 * expert + offset) * wide
            yield Slot(f"{place}.{name}.weight", module.live_w13, slice(start, start + wide), division=by_row)
        rows = slice(expert * hidden, (expert + 1) * hidden)
        yield Slot(f"{place}.down_proj.weight", module.live_w2, rows, division=by_column)


def bytes_per_element(slots: dict[str, Slot]) -> float:
    """Bytes that the engine holds for an element of its quantised weights; 0 when it has none."""
    owners = [slot.owner for slot in slots.values() if slot.kind == "mx"]
    weights = {id(owner): owner for owner in owners if isinstance(owner, LiveWeight)}.values()
    elements = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    return sum(part.nbytes for weight in weights for part in weight.buffers()) / elements if elements else 0.0
