"""Where each of the learner's tensors lives in a running vLLM model: reading, checksumming and strict loading.

vLLM fuses what Hugging Face keeps apart (q/k/v, gate/up, all experts of a layer). A `Slot` is one Hugging Face tensor
as a row range of a fused matrix. This file may write to the live weights; nothing else of the engine does, except the
noise injector for the length of a rollout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase

from mxdist.errors import ParityError
from mxdist.messages import TensorEntry, WeightPayload
from mxdist.model.linear_names import parts_of
from mxdist.model.recipes import ModelRecipes
from mxdist.quant.checksum import checksum
from mxdist.quant.format import E8M0_NAN
from mxdist.rollout.live_weight import LiveWeight
from mxdist.rollout.products import live_values
from mxdist.sync.payload import VALUES, as_tensor, gather_entries, values_checksum


@dataclass(frozen=True)
class Slot:
    """One Hugging Face tensor inside the live model. Views are taken anew on every call, never kept."""

    name: str  # Hugging Face tensor name, ends in .weight or .bias
    owner: LiveWeight | RMSNorm | LinearBase  # of a linear only the bias: its weight is a LiveWeight
    rows: slice

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def kind(self) -> str:
        return "mx" if isinstance(self.owner, LiveWeight) and self.owner.operand is not None else "dense"

    def parts(self) -> dict[str, Tensor]:
        """What a payload carries: packed bytes, or plain values."""
        if isinstance(self.owner, LiveWeight):
            return {part: tensor[self.rows] for part, tensor in self.owner.parts().items()}
        plain = self.owner.weight if isinstance(self.owner, RMSNorm) else self.owner.bias
        return {VALUES: plain.detach()[self.rows]}

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.owner, LiveWeight):
            return (self.rows.stop - self.rows.start, self.owner.shape[1])
        return tuple(self.parts()[VALUES].shape)

    def values(self) -> Tensor:
        """What the forward pass multiplies: live, or made from the bytes where they are all that is kept."""
        return live_values(self.owner, self.rows) if isinstance(self.owner, LiveWeight) else self.parts()[VALUES]

    def checksums(self) -> dict[str, int]:
        """By part, of the live buffers; "values" is what the forward pass multiplies, in float32 form."""
        packed = {part: checksum(tensor) for part, tensor in self.parts().items() if part != VALUES}
        return packed | {VALUES: values_checksum(self.values())}


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
        yield Slot(f"{path}.weight", module.live, slice(0, vocab_size))
        return
    start = 0
    for name, size in zip(parts_of(path), module.live_splits, strict=True):
        yield Slot(f"{name}.weight", module.live, slice(start, start + size))
        if module.bias is not None:
            yield Slot(f"{name}.bias", module, slice(start, start + size))
        start += size


def _expert_slots(path: str, module: RoutedExperts) -> Iterator[Slot]:
    hidden, wide = module.live_w13.shape[1], module.live_w2.shape[1]
    for expert in range(module.live_w2.shape[0] // hidden):
        place = f"{path}.{expert}"
        for offset, name in enumerate(("gate_proj", "up_proj")):
            start = (2 * expert + offset) * wide
            yield Slot(f"{place}.{name}.weight", module.live_w13, slice(start, start + wide))
        yield Slot(f"{place}.down_proj.weight", module.live_w2, slice(expert * hidden, (expert + 1) * hidden))


def bytes_per_element(slots: dict[str, Slot]) -> float:
    """Bytes that the engine holds for an element of its quantised weights; 0 when it has none."""
    owners = [slot.owner for slot in slots.values() if slot.kind == "mx"]
    weights = {id(owner): owner for owner in owners if isinstance(owner, LiveWeight)}.values()
    elements = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    return sum(part.nbytes for weight in weights for part in weight.buffers()) / elements if elements else 0.0


def write(slots: dict[str, Slot], entries: dict[str, TensorEntry]) -> None:
    """Copy a whole set of weights, as ``checked`` returned it, into the live model."""
    for name, entry in entries.items():
        for part, live in slots[name].parts().items():
            live.copy_(as_tensor(entry.parts[part]))
    for owner in {id(slot.owner): slot.owner for slot in slots.values()}.values():
        if isinstance(owner, LiveWeight):
            owner.refresh()


def checked(slots: dict[str, Slot], payloads: Sequence[WeightPayload], recipes: ModelRecipes) -> dict[str, TensorEntry]:
    """The entries of a whole set of weights by name, after every one has been held against its slot and its checksums.

    Nothing is written. On a GPU one part at a time is there for its checksum.

    Raises:
        ParityError: naming the first thing wrong (another recipe or version on one rank; a tensor that is missing,
            unknown or sent twice; wrong kind, shape, parts or dtype; a NaN or Inf; bytes that changed on their way).
    """
    if not payloads:
        raise ParityError("a weight sync came without payloads")
    for rank, payload in enumerate(payloads):
        if payload.recipes != recipes.to_dict():
            raise ParityError(
                f"payload {rank} is of {_in_words(payload.recipes)}, the engine is of "
                f"{_in_words(recipes.to_dict())}, or the two differ in what a recipe means"
            )
        if payload.version != payloads[0].version:
            raise ParityError(f"payload {rank} has version {payload.version}, payload 0 has {payloads[0].version}")
    entries = gather_entries(payloads)
    if extra := sorted(entries.keys() - slots.keys()):
        raise ParityError(f"the learner sent {extra[0]}, which the model does not have ({len(extra)} such tensors)")
    if missing := sorted(slots.keys() - entries.keys()):
        raise ParityError(f"the learner did not send {missing[0]} ({len(missing)} such tensors)")
    for name, entry in entries.items():
        _check_entry(slots[name], entry)
    return entries


def _in_words(recipes: dict[str, Any]) -> str:
    policy = recipes["policy"]
    exceptions = [f"{recipe} for {modules}" for modules, recipe in policy["overrides"]]
    exceptions += [f"bf16 for the {end} {policy[end]} layers" for end in ("first", "last") if policy[end]]
    return f"recipe {policy['default']}" + (f" ({', '.join(exceptions)})" if exceptions else "")


def _check_entry(slot: Slot, entry: TensorEntry) -> None:
    shape = slot.shape
    if entry.kind != slot.kind:
        raise ParityError(f"{entry.name} was sent as {entry.kind}; the engine holds it as {slot.kind}")
    if tuple(entry.shape) != shape:
        raise ParityError(f"{entry.name} was sent with shape {tuple(entry.shape)}; the engine's is {shape}")
    parts = slot.parts()
    if entry.parts.keys() != parts.keys():
        raise ParityError(
            f"{entry.name} was sent with the parts {sorted(entry.parts)}; the engine's are {sorted(parts)}"
        )
    for part, live in parts.items():
        sent = as_tensor(entry.parts[part])
        if sent.shape != live.shape or sent.is_floating_point() != live.is_floating_point():
            raise ParityError(
                f"{entry.name}, part {part}, was sent as {sent.dtype} {tuple(sent.shape)}; the engine's "
                f"is {live.dtype} {tuple(live.shape)}"
            )
        finite = (
            torch.isfinite(sent).all()
            if sent.is_floating_point()
            else (not part.endswith("scales") or (sent != E8M0_NAN).all())
        )
        if not finite:
            raise ParityError(f"{entry.name}, part {part}, holds a NaN or Inf")
        if not torch.equal(sent.to(live.dtype).to(sent.dtype), sent):
            raise ParityError(
                f"{entry.name}, part {part}, was sent as {sent.dtype} with values that the engine's "
                f"{live.dtype} cannot hold"
            )
        arrived = values_checksum(sent.to(live.device)) if part == VALUES else checksum(sent.to(live.device))
        if arrived != entry.checksums.get(part):
            raise ParityError(f"{entry.name}, part {part}, changed on its way: its checksum is not the learner's")
