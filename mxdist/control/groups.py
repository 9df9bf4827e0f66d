"""The learner group and the rollout pool: several processes that act as one."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import ray

from mxdist.config import Config
from mxdist.config.schema import AlgorithmConfig, Supervised
from mxdist.control.processes import Process
from mxdist.control.supervisor import Call, Supervisor, Worker
from mxdist.control.waits import Pending, succeeded, wait_for
from mxdist.messages import (
    EntropyStatistics,
    Noise,
    Prompt,
    RolloutRequest,
    RolloutResult,
    SamplingSettings,
    SharedBuckets,
    TrainBatch,
    Transport,
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
        self,
        batch: TrainBatch,
        algorithm: AlgorithmConfig | Supervised,
        lr: float,
        doing: str,
        watch: bool = False,
        trace: Path | None = None,
    ) -> list[UpdateReport]:
        pending = self._all(doing, "update", ray.put(batch), algorithm, lr, watch, trace)
        return wait_for(pending, self._deadlines.update, "update")

    def export(self, version: int, transport: Transport = "host") -> list[Pending]:
        """Each rank's payload stays in Ray's object store, or on its GPU; the references go to the engines."""
        return self._all(f"export of weights version {version}", "export", version, transport)

    def export_again(self, version: int) -> list["ray.ObjectRef"]:
        """Whole payloads of a version that engines missed when it was broadcast, or do not know the one before of, for
        Ray's object store to carry.

        Raises:
            ProcessDied: a rank is gone, and with it what it held.
            RunStopped: a rank holds newer versions alone.
        """
        pending = self._all(f"export of weights version {version} once more", "export_again", version)
        wait_for(pending, self._deadlines.sync, "sync")
        return [call.ref for call in pending]

    def probes(self) -> list[SharedBuckets]:
        """Of each rank's GPU; see ``RolloutPool.cannot_map``."""
        return wait_for(self._all("probe of shared memory", "probe"), self._deadlines.start, "start")

    def save(self, directory: Path) -> None:
        wait_for(self._all("checkpoint", "save", directory), self._deadlines.checkpoint, "checkpoint")

    def save_finished(self, wait: bool) -> bool:
        """Whether what ``save`` began is written on all ranks; ``wait`` until it is."""
        pending = self._all("writing of the checkpoint", "save_finished", wait)
        return all(wait_for(pending, self._deadlines.checkpoint, "checkpoint"))

    def load(self, directory: Path) -> None:
        wait_for(self._all("loading of the checkpoint", "load", directory), self._deadlines.checkpoint, "checkpoint")

    def _all(self, doing: str, method: str, *arguments: Any) -> list[Pending]:
        return [process.call(doing, method, *arguments) for process in self._processes]


class RolloutPool:
    """All rollout workers. Calls of one worker run in the order they were made, so what is sampled after a sync is
    sampled with its weights. A worker that fails is replaced while its results are waited for."""

    def __init__(self, workers: Sequence[Worker], supervisor: Supervisor) -> None:
        self._workers = list(workers)
        self._supervisor = supervisor
        self._tickets = count()

    def start(self) -> list[Call]:
        return [worker.call(lambda process: process.call("start", "start"), "engine") for worker in self._workers]

    def load_weights(
        self,
        payloads: Sequence["ray.ObjectRef"],
        version: int,
        again: Callable[[], Sequence["ray.ObjectRef"]] | None = None,
    ) -> list[Call]:
        """Each worker holds on to the payloads of the weights it has, to give them to a process that replaces its.

        Args:
            again: finds those that serve when the weights have to be given once more, where ``payloads`` serve once.
        """
        return self._load(payloads, again, f"sync of weights version {version}", "load_weights")

    def load_weights_in_flight(
        self,
        payloads: Sequence["ray.ObjectRef"],
        version: int,
        again: Callable[[], Sequence["ray.ObjectRef"]] | None = None,
    ) -> list[Call]:
        """As ``load_weights``, but a worker that is sampling when they come goes on with them.

        They are offered at once, and in their turn loaded by a worker that has not taken them: so what is sampled
        after a sync is sampled with its weights or later ones. A process that takes the place of one that died is not
        offered them, and loads them in their turn.
        """
        ticket = next(self._tickets)
        for worker in self._workers:
            worker.aside(lambda process: process.call_aside("offer_weights", payloads, ticket))
        return self._load(payloads, again, f"sync of weights version {version}", "load_offered", ticket)

    def _load(
        self,
        payloads: Sequence["ray.ObjectRef"],
        again: Callable[[], Sequence["ray.ObjectRef"]] | None,
        doing: str,
        method: str,
        *arguments: int,
    ) -> list[Call]:
        calls = []
        for worker in self._workers:
            found = itertools.chain([lambda: payloads], itertools.repeat(again or (lambda: payloads)))
            send = partial(_load_weights, doing=doing, found=found, method=method, arguments=arguments)
            calls.append(worker.call(send, "weights"))
        return calls

    def generate(
        self, step: int, prompts: Sequence[Prompt], sampling: SamplingSettings, noise: Noise, doing: str
    ) -> list[Call]:
        """Share the prompts among the workers: worker i takes every i-th."""
        count = len(self._workers)
        requests = [RolloutRequest(step, tuple(prompts[index::count]), sampling, noise) for index in range(count)]
        return [
            worker.call(partial(_generate, doing=doing, request=request))
            for worker, request in zip(self._workers, requests, strict=True)
            if request.prompts
        ]

    def wait(self, calls: Sequence[Call], deadline: float, deadline_key: str) -> list[Any]:
        """Results of calls of this pool, in order; see ``Supervisor.results``."""
        return self._supervisor.results(calls, deadline, deadline_key)

    @staticmethod
    def finished(calls: Sequence[Call]) -> list[Any]:
        """Results of those calls that have one by now."""
        return [ray.get(call.pending.ref) for call in calls if succeeded(call.pending)]

    def forget_unfinished(self) -> None:
        """Nobody waits for the calls under way any more: the run goes on from a checkpoint."""
        for worker in self._workers:
            worker.forget_unfinished()

    def forget_weights(self) -> None:
        """The learner that the engines' weights came from is no more, and the next will send its own."""
        for worker in self._workers:
            worker.forget("weights")
            worker.aside(lambda process: process.send("release"))

    def cannot_map(self, probes: list[SharedBuckets], deadline: float) -> str | None:
        """Why an engine cannot read what learner ranks share of their GPUs; None when all can."""
        calls = [
            worker.call(lambda process: process.call("probe of shared memory", "cannot_map", probes))
            for worker in self._workers
        ]
        return next(filter(None, self.wait(calls, deadline, "start")), None)


def _load_weights(
    process: Process,
    doing: str,
    found: Iterator[Callable[[], Sequence["ray.ObjectRef"]]],
    method: str,
    arguments: tuple[int, ...],
) -> Pending:
    return process.call_with_list(doing, method, next(found)(), *arguments)


def _generate(process: Process, doing: str, request: RolloutRequest) -> Pending:
    return process.call(doing, "generate", request)


def merge_results(prompts: Sequence[Prompt], results: Sequence[RolloutResult]) -> RolloutResult:
    """One result for the shares that ``RolloutPool.generate`` gave out, its groups in the order of the prompts."""
    groups = {group.prompt.key: group for result in results for group in result.groups}
    return RolloutResult(
        groups=tuple(groups[prompt.key] for prompt in prompts),
        entropy=sum((result.entropy for result in results), EntropyStatistics()),
        seconds=max(result.seconds for result in results),
        perturbed_modules=min(result.perturbed_modules for result in results),
        applied_sigma=min(result.applied_sigma for result in results),
        usage=tuple(usage for result in results for usage in result.usage),
        preemptions=sum(result.preemptions for result in results),
    )
