"""One process of an engine, which holds the engine's model or, with rollout.tensor_parallel, a share of it.

vLLM mixes `RankExtension` into its worker class in each process; `Engine.each` calls a method of `Rank` in all of them.
Reading and writing the live weights is done here and in what is called from here, nowhere else.
"""

import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm

from mxdist.aqn.injector import Applied, NoiseInjector, select_norms
from mxdist.errors import ParityError, RunStopped, UserError
from mxdist.messages import DevicePlace, Noise, ProcessUsage, SharedBuckets, WeightPayload
from mxdist.model.recipes import ModelRecipes
from mxdist.observe.usage import process_usage
from mxdist.rollout import slots
from mxdist.rollout.loading import Arrived, WeightLoader
from mxdist.rollout.sampler import SeededSampler
from mxdist.sync.payload import PartSums
from mxdist.sync.shared import device_place


@dataclass(frozen=True)
class Held:
    """What one process holds of the model."""

    quantised_modules: tuple[str, ...]  # Hugging Face names, sorted
    noise_modules: tuple[str, ...]
    divided: frozenset[str]  # tensors of which it holds a slice
    bytes_per_quantised_weight: float
    device: DevicePlace


@dataclass(frozen=True)
class Refusal:
    """An error on its way out of the process: vLLM would turn it into one of its own, and where other processes have
    answered as well, take their answers for those to the next call."""

    error: Exception

    def __reduce__(self) -> tuple[object, ...]:
        if isinstance(self.error, UserError | RunStopped):
            return Refusal, (self.error,)
        said = "".join(traceback.format_exception(self.error)).rstrip()  # which would not survive the way
        return Refusal, (RuntimeError(f"{self.error}\n\nIn a process of the engine:\n{said}"),)


class Rank:
    """The live weights of one process. Every method is called in all processes of an engine."""

    def __init__(self, model: nn.Module, sampler: SeededSampler, vocab_size: int, recipes: ModelRecipes) -> None:
        self._sampler = sampler
        self.slots = slots.find_slots(model, vocab_size)
        self._loader = WeightLoader(self.slots, recipes, next(iter(self.slots.values())).device)
        self._arrived: Arrived | None = None
        self._noise = ExitStack()
        routed = slots.routed_layers(model)
        norms = [
            (name.removesuffix(".weight"), slot.owner.weight)
            for name, slot in self.slots.items()
            if isinstance(slot.owner, RMSNorm)
        ]
        self.injector = NoiseInjector(select_norms(norms, routed), routed)

    def held(self) -> Held:
        return Held(
            tuple(sorted(slot.module for slot in self.slots.values() if slot.kind == "mx")),
            self.injector.names,
            frozenset(name for name, slot in self.slots.items() if slot.division.count > 1),
            slots.bytes_per_element(self.slots),
            device_place(),
        )

    def check(self, payloads: Sequence[WeightPayload]) -> None:
        """Hold payloads against the live weights, for `write`. Raises as ``WeightLoader.checked``."""
        self._arrived = None  # of a push that another process of the engine missed
        self._arrived = self._loader.checked(payloads)

    def write(self) -> PartSums:
        """Write what was checked; checksums of what lies there then, of divided tensors the slice's share."""
        arrived, self._arrived = self._arrived, None
        assert arrived is not None
        return self._loader.take(arrived)

    def cannot_map(self, probes: Sequence[SharedBuckets]) -> str | None:
        return self._loader.cannot_map(probes)

    def release(self) -> None:
        self._loader.release()

    def perturb(self, noise: Noise) -> Applied:
        """Put noise on the norms, until `restore`. Raises as ``NoiseInjector.perturbed``."""
        return self._noise.enter_context(self.injector.perturbed(noise))

    def restore(self) -> None:
        self._noise.close()

    def logprobs(self, requests: Sequence[str]) -> np.ndarray:
        """See `SeededSampler.take`; the same in every process."""
        return self._sampler.take(requests)

    def usage(self) -> ProcessUsage:
        return process_usage()


class RankExtension:
    """vLLM's worker, with a `Rank` beside its model and a sampler of ours."""

    def rank_open(self: Any, vocab_size: int, recipes: ModelRecipes) -> None:
        self.model_runner.sampler = SeededSampler(self.model_runner)
        self._mxdist_rank = Rank(self.get_model(), self.model_runner.sampler, vocab_size, recipes)

    # Not vLLM's own sleep and wake_up: those fail when another process of the GPU takes memory meanwhile.

    def rank_sleep(self: Any) -> None:
        """Free the memory of the KV cache, and that of the weights after a copy to the host's."""
        from vllm.device_allocator import get_mem_allocator_instance

        torch.cuda.synchronize()
        get_mem_allocator_instance().sleep(("weights",))

    def rank_wake(self: Any, tags: list[str]) -> None:
        """Bring back "weights", or "kv_cache" with zeros: what is beyond a sequence's end must be finite."""
        from vllm.device_allocator import get_mem_allocator_instance

        get_mem_allocator_instance().wake_up(tags)
        if "kv_cache" in tags:
            for cache in self.model_runner.kv_caches:
                cache.zero_()

    def rank_call(self: Any, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._mxdist_rank, method)(*arguments)
        except Exception as error:
            return Refusal(error)


def combined(found: Sequence[PartSums], divided: frozenset[str]) -> PartSums:
    """Checksums of the whole model, out of those of an engine's processes: every byte of each counts.

    Raises:
        ParityError: processes differ in a tensor that each holds all of.
    """
    if len(found) == 1:
        return found[0]
    manifests, sums = found[0].manifests, []
    for number, manifest in enumerate(manifests):
        shares = np.stack([each.sums[number] for each in found])  # [processes, checksums]
        cut = np.array([name in divided for name, _ in manifest.checked])
        right = cut | (shares == shares[0]).all(0)
        if not right.all():
            name, part = manifest.checked[int(right.argmin())]
            raise ParityError(f"the processes of one rollout engine hold different bytes of {name}, part {part}")
        sums.append(np.where(cut, shares.sum(0, dtype=np.uint64), shares[0]))
    whole = PartSums(manifests, sums)
    whole.seconds |= {phase: max(each.seconds[phase] for each in found) for phase in found[0].seconds}
    return whole
