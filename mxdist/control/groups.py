"""The learner group and the rollout pool: several processes that act as one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from mxdist.config import Config
from mxdist.config.schema import AlgorithmConfig, Supervised
from mxdist.control.processes import Process
from mxdist.control.waits import Pending, wait_for
from mxdist.messages import (
    EntropyStatistics,
    Group,
    Noise,
    Prompt,
    RolloutRequest,
    RolloutResult,
    SamplingSettings,
    TrainBatch,
    UpdateReport,
)


class LearnerGroup:
    """All learner ranks. Every method is collective: each rank takes part."""

    def __init__(self, processes: Sequence[Process], config: Config) -> None:
        self._processes = list(processes)
        self._deadlines = config.deadlines

    def build(self) -> list[Pending]:
        return self._all("start", "build")

    def update(
        self, batch: TrainBatch, algorithm: AlgorithmConfig | Supervised, lr: float, doing: str, watch: bool = False
    ) -> list[UpdateReport]:
        pending = self._all(doing, "update", ray.put(batch), algorithm, lr, watch)
        return wait_for(pending, self._deadlines.update, "update")

    def export(self, version: int) -> list[Pending]:
        """Each rank's payload stays in Ray's object store; the references go to the engines."""
        return self._all(f"export of weights version {version}", "export", version)

    def save(self, directory: Path) -> None:
        wait_for(self._all("checkpoint", "save", directory), self._deadlines.checkpoint, "checkpoint")

    def load(self, directory: Path) -> None:
        wait_for(self._all("loading of the checkpoint", "load", directory), self._deadlines.checkpoint, "checkpoint")

    def _all(self, doing: str, method: str, *arguments: Any) -> list[Pending]:
        return [process.call(doing, method, *arguments) for process in self._processes]


class RolloutPool:
    """All rollout workers. Calls of one worker run in the order they were made, so what is sampled after a sync is
    sampled with its weights."""

    def __init__(self, processes: Sequence[Process], config: Config) -> None:
        self._processes = list(processes)
        self._deadlines = config.deadlines

    def start(self) -> list[Pending]:
        return [process.call("start", "start") for process in self._processes]

    def load_weights(self, payloads: Sequence["ray.ObjectRef"], version: int) -> list[Pending]:
        doing = f"sync of weights version {version}"
        return [process.call_with_list(doing, "load_weights", payloads) for process in self._processes]

    def generate(
        self, step: int, prompts: Sequence[Prompt], sampling: SamplingSettings, noise: Noise, doing: str
    ) -> list[Pending]:
        """Share the prompts among the workers: worker i takes every i-th."""
        count = len(self._processes)
        shares = [tuple(prompts[index::count]) for index in range(count)]
        return [
            process.call(doing, "generate", RolloutRequest(step, share, sampling, noise))
            for process, share in zip(self._processes, shares, strict=True)
            if share
        ]


def merge_results(results: Sequence[RolloutResult]) -> RolloutResult:
    """One result for the shares that ``RolloutPool.generate`` gave out, its groups in the order of the prompts."""
    groups: list[Group | None] = [None] * sum(len(result.groups) for result in results)
    entropy = EntropyStatistics()
    for index, result in enumerate(results):
        groups[index :: len(results)] = result.groups
        entropy = entropy + result.entropy
    return RolloutResult(
        groups=tuple(group for group in groups if group is not None),
        entropy=entropy,
        seconds=max(result.seconds for result in results),
        perturbed_modules=min(result.perturbed_modules for result in results),
        applied_sigma=min(result.applied_sigma for result in results),
    )
