"""Finished, scored groups for the learner: what is sampled ahead, how it is scored, which groups are kept."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from mxdist.aqn.controller import AqnController
from mxdist.config import Config
from mxdist.config.schema import Dapo
from mxdist.control.batch import ScoredGroup
from mxdist.control.groups import RolloutPool, merge_results
from mxdist.control.processes import Process
from mxdist.control.supervisor import Call, Supervisor, Worker
from mxdist.control.waits import Pending
from mxdist.messages import EntropyStatistics, Group, Noise, ProcessUsage, Prompt, RolloutResult, SamplingSettings
from mxdist.seeds import derive_seed
from mxdist.tasks.base import Cursor, RewardResult, Task


class RewardPool:
    """Reward workers; groups are shared among them. One that fails is replaced."""

    def __init__(self, workers: Sequence[Worker], config: Config, task: Task, supervisor: Supervisor) -> None:
        self._workers = list(workers)
        self._deadline = config.deadlines.reward
        self._task = task
        self.seconds = 0.0  # that scoring has taken so far
        self._supervisor = supervisor

    def score(self, groups: Sequence[Group], doing: str) -> list[ScoredGroup]:
        started = time.monotonic()
        scored = self._scores(groups, doing)
        self.seconds += time.monotonic() - started
        return scored

    def _scores(self, groups: Sequence[Group], doing: str) -> list[ScoredGroup]:
        count = len(self._workers)
        calls = [
            worker.call(partial(_score, doing=doing, items=self._items(groups[index::count])))
            for index, worker in enumerate(self._workers)
        ]
        scored: list[ScoredGroup | None] = [None] * len(groups)
        for index, results in enumerate(self._supervisor.results(calls, self._deadline, "reward")):
            share, results = groups[index::count], iter(results)
            scored[index::count] = [self._scored(group, [next(results) for _ in group.samples]) for group in share]
        return [group for group in scored if group is not None]

    def _items(self, groups: Sequence[Group]) -> list[tuple[str, str, str]]:
        return [
            (group.prompt.key, self._task.answer_text(sample.tokens), group.prompt.reference)
            for group in groups
            for sample in group.samples
        ]

    @staticmethod
    def _scored(group: Group, results: Sequence[RewardResult]) -> ScoredGroup:
        parts = {name: sum(r.parts[name] for r in results) / len(results) for name in results[0].parts}
        return ScoredGroup(group, tuple(result.total for result in results), parts, tuple(results))


def _score(process: Process, doing: str, items: list[tuple[str, str, str]]) -> Pending:
    return process.call(doing, "score", items)


@dataclass
class _Submitted:
    step: int
    cursor_before: Cursor
    prompts: list[Prompt]
    noise: Noise
    calls: list[Call]


@dataclass(frozen=True)
class Collected:
    """Everything one learner update is made of, and what it cost."""

    scored: list[ScoredGroup]
    entropy: EntropyStatistics
    noise: Noise
    perturbed_modules: int
    applied_sigma: float
    rollout_seconds: float
    reward_seconds: float
    usage: tuple[ProcessUsage, ...]  # of the rollout workers
    extra_batches: int
    without_signal: int  # groups kept whose rewards are all equal


@dataclass
class Collector:
    """Keeps ``rollout.max_lag`` batches sampled ahead of the learner, and hands out the oldest.

    Batch t is submitted once the weights of version t - max_lag are on their way to the engines. Engines run calls in
    order, so no answer is ever staler than that; with max_lag 0 the loop is synchronous.
    """

    config: Config
    task: Task
    pool: RolloutPool
    rewards: RewardPool
    aqn: AqnController
    cursor: Cursor
    first_step: int = 0
    again: deque[Cursor] = field(default_factory=deque)  # of batches that an earlier process had sampled ahead
    _ahead: deque[_Submitted] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._next = self.first_step  # of the steps not yet submitted

    def submit_through(self, step: int) -> None:
        """Submit every batch up to that of ``step`` that is not yet submitted."""
        while self._next <= step:
            self._ahead.append(self._submit(self._next, 0))
            self._next += 1

    def collect(self, step: int) -> Collected:
        """Wait for the batch of ``step``, score it and, for DAPO, sample more until enough groups have signal."""
        batch = self._ahead.popleft()
        assert batch.step == step, f"expected the batch of step {step}, got that of {batch.step}"
        algorithm = self.config.algorithm
        wanted = algorithm.prompts_per_step
        extra_allowed = algorithm.max_extra_batches if isinstance(algorithm, Dapo) else 0
        results = [self._finish(batch)]
        started = self.rewards.seconds
        scored = self.rewards.score(results[0].groups, f"reward of step {step}")
        while len(results) <= extra_allowed and sum(group.has_signal for group in scored) < wanted:
            batch = self._submit(step, len(results))
            results.append(self._finish(batch))
            scored += self.rewards.score(results[-1].groups, f"reward of step {step}")
        if len(scored) > wanted:  # those without signal fill up what the cap left open
            scored = sorted(scored, key=lambda group: not group.has_signal)[:wanted]
        return Collected(
            scored=scored,
            entropy=sum((result.entropy for result in results), EntropyStatistics()),
            noise=batch.noise,
            perturbed_modules=min(result.perturbed_modules for result in results),
            applied_sigma=min(result.applied_sigma for result in results),
            rollout_seconds=sum(result.seconds for result in results),
            reward_seconds=self.rewards.seconds - started,
            usage=results[-1].usage,
            extra_batches=len(results) - 1,
            without_signal=sum(not group.has_signal for group in scored),
        )

    def cursors_ahead(self) -> list[Cursor]:
        """Where the prompts of the batches not yet handed out were drawn from, for ``again`` of a resumed run."""
        return [*(batch.cursor_before for batch in self._ahead), *self.again]

    def _submit(self, step: int, extra: int) -> _Submitted:
        config, run_seed = self.config, self.config.run.seed
        before = self.again.popleft() if self.again and not extra else self.cursor
        prompts, after = self.task.draw(before, config.algorithm.prompts_per_step)
        if before is self.cursor:
            self.cursor = after
        noise = self.aqn.noise(step, run_seed)
        sampling = SamplingSettings(
            samples_per_prompt=config.algorithm.samples_per_prompt,
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=derive_seed(run_seed, "rollout", step, extra),
        )
        calls = self.pool.generate(step, prompts, sampling, noise, f"rollout of step {step}")
        return _Submitted(step, before, prompts, noise, calls)

    def _finish(self, batch: _Submitted) -> RolloutResult:
        return merge_results(self.pool.wait(batch.calls, self.config.deadlines.rollout, "rollout"))
