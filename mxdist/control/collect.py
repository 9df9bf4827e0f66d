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

    def _items(self, groups: Sequence[Group]) -> list[tuple[str, str]]:
        return [
            (self._task.answer_text(sample.tokens), group.prompt.reference)
            for group in groups
            for sample in group.samples
        ]

    @staticmethod
    def _scored(group: Group, results: Sequence[RewardResult]) -> ScoredGroup:
        parts = {name: sum(r.parts[name] for r in results) / len(results) for name in results[0].parts}
        return ScoredGroup(group, tuple(result.total for result in results), parts, tuple(results))


def _score(process: Process, doing: str, items: list[tuple[str, str]]) -> Pending:
    return process.call(doing, "score", items)


@dataclass(frozen=True)
class SavedBatch:
    """A batch sampled ahead, as a checkpoint keeps it: what it was made of, and the answers that were there."""

    step: int
    cursor: Cursor  # where its prompts were drawn from
    prompts: int
    sampling: SamplingSettings
    noise: Noise
    results: tuple[RolloutResult, ...]  # of some of its prompts


@dataclass
class _Submitted:
    step: int
    cursor: Cursor  # where its prompts were drawn from
    prompts: list[Prompt]
    places: list[str]  # of each prompt in the training order
    sampling: SamplingSettings
    noise: Noise
    calls: list[Call]
    results: tuple[RolloutResult, ...] = ()  # what a checkpoint had of it


@dataclass(frozen=True)
class Collected:
    """Everything one learner update is made of, and what it cost."""

    scored: list[ScoredGroup]
    places: list[str]  # of each of these groups in the training order, "epoch:position"
    dropped: list[str]  # places of groups that were sampled for this step and are never trained on
    entropy: EntropyStatistics
    noise: Noise
    perturbed_modules: int
    applied_sigma: float
    rollout_seconds: float
    reward_seconds: float
    usage: tuple[ProcessUsage, ...]  # of the rollout workers
    preemptions: int
    extra_batches: int
    without_signal: int  # groups kept whose rewards are all equal

    def account(self) -> tuple[list[str], list[str], list[int]]:
        """For the ledger: places trained on, places given up, and the versions that sampled the former."""
        return self.places, self.dropped, [scored.group.policy_version for scored in self.scored]


@dataclass
class Collector:
    """Keeps ``rollout.max_lag`` batches sampled ahead of the learner, and hands out the oldest.

    Batch t is submitted once the weights of version t - max_lag are on their way to the engines. Engines run calls in
    order, so no token is ever staler than that; with max_lag 0 the loop is synchronous. Weights that engines take in
    flight only make tokens fresher.
    """

    config: Config
    task: Task
    pool: RolloutPool
    rewards: RewardPool
    aqn: AqnController
    cursor: Cursor
    first_step: int = 0
    again: deque[SavedBatch] = field(default_factory=deque)  # those that an earlier process had sampled ahead
    handed_out: Collected | None = None  # the latest
    _ahead: deque[_Submitted] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._next = self.first_step  # of the steps not yet submitted

    def submit_through(self, step: int) -> None:
        """Submit every batch up to that of ``step`` that is not yet submitted."""
        while self._next <= step:
            again = self.again.popleft() if self.again else None
            self._ahead.append(self._submit_again(again) if again else self._submit(self._next, 0))
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
        scored = list(zip(batch.places, self.rewards.score(results[0].groups, f"reward of step {step}"), strict=True))
        while len(results) <= extra_allowed and sum(group.has_signal for _, group in scored) < wanted:
            batch = self._submit(step, len(results))
            results.append(self._finish(batch))
            more = self.rewards.score(results[-1].groups, f"reward of step {step}")
            scored += zip(batch.places, more, strict=True)
        if len(scored) > wanted:  # those without signal fill up what the cap left open
            scored.sort(key=lambda placed: not placed[1].has_signal)
        kept, dropped = scored[:wanted], scored[wanted:]
        self.handed_out = Collected(
            scored=[group for _, group in kept],
            places=[place for place, _ in kept],
            dropped=[place for place, _ in dropped],
            entropy=sum((result.entropy for result in results), EntropyStatistics()),
            noise=batch.noise,
            perturbed_modules=min(result.perturbed_modules for result in results),
            applied_sigma=min(result.applied_sigma for result in results),
            rollout_seconds=sum(result.seconds for result in results),
            reward_seconds=self.rewards.seconds - started,
            usage=results[-1].usage,
            preemptions=sum(result.preemptions for result in results),
            extra_batches=len(results) - 1,
            without_signal=sum(not group.has_signal for _, group in kept),
        )
        return self.handed_out

    def ahead(self) -> list[SavedBatch]:
        """The batches not yet handed out with the answers that are there, for ``again`` of a resumed run."""
        return [*map(self._saved, self._ahead), *self.again]

    def places_ahead(self) -> list[str]:
        """Of the groups that were drawn and not yet handed out."""
        again = [_places(self.task.draw(batch.cursor, batch.prompts)[1], batch.prompts) for batch in self.again]
        return [place for places in (*(batch.places for batch in self._ahead), *again) for place in places]

    def _saved(self, batch: _Submitted) -> SavedBatch:
        results = (*batch.results, *self.pool.finished(batch.calls))
        return SavedBatch(batch.step, batch.cursor, len(batch.prompts), batch.sampling, batch.noise, results)

    def _submit(self, step: int, extra: int) -> _Submitted:
        config, run_seed, before = self.config, self.config.run.seed, self.cursor
        count = config.algorithm.prompts_per_step
        prompts, self.cursor = self.task.draw(before, count)
        batch = _Submitted(
            step=step,
            cursor=before,
            prompts=prompts,
            places=_places(self.cursor, count),
            sampling=self._sampling(step, extra),
            noise=self.aqn.noise(step, run_seed),
            calls=[],
        )
        self._generate(batch, prompts)
        return batch

    def _submit_again(self, saved: SavedBatch) -> _Submitted:
        """A batch of an earlier process: only what it lacks is sampled. All of it if its settings have changed."""
        prompts, after = self.task.draw(saved.cursor, saved.prompts)
        sampling = self._sampling(saved.step, 0)
        oldest = saved.step - self.config.rollout.max_lag
        fresh = all(group.policy_version >= oldest for result in saved.results for group in result.groups)
        results = saved.results if fresh and sampling == saved.sampling else ()
        places = _places(after, saved.prompts)
        batch = _Submitted(saved.step, saved.cursor, prompts, places, sampling, saved.noise, [], results)
        there = {group.prompt.key for result in results for group in result.groups}
        self._generate(batch, [prompt for prompt in prompts if prompt.key not in there])
        return batch

    def _generate(self, batch: _Submitted, prompts: list[Prompt]) -> None:
        if prompts:
            doing = f"rollout of step {batch.step}"
            batch.calls = self.pool.generate(batch.step, prompts, batch.sampling, batch.noise, doing)

    def _sampling(self, step: int, extra: int) -> SamplingSettings:
        return SamplingSettings(
            samples_per_prompt=self.config.algorithm.samples_per_prompt,
            temperature=self.config.rollout.temperature,
            max_new_tokens=self.config.rollout.max_new_tokens,
            seed=derive_seed(self.config.run.seed, "rollout", step, extra),
        )

    def _finish(self, batch: _Submitted) -> RolloutResult:
        results = self.pool.wait(batch.calls, self.config.deadlines.rollout, "rollout") if batch.calls else []
        return merge_results(batch.prompts, [*batch.results, *results])


def _places(after: Cursor, count: int) -> list[str]:
    """Of the ``count`` prompts drawn before the cursor ``after``: the epoch and the position in its order."""
    return [f"{after.epoch}:{position}" for position in range(after.position - count, after.position)]
