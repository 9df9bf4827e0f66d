"""How good a policy is on the held-out problems: their answers with clean weights, and what they amount to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mxdist.config import Config
from mxdist.control.batch import ScoredGroup
from mxdist.control.collect import RewardPool
from mxdist.control.estimates import Estimate, majority, mean, pass_at_k, powers_of_two, share
from mxdist.control.groups import RolloutPool, merge_results
from mxdist.messages import Noise, SamplingSettings
from mxdist.tasks.base import Task

CLEAN = Noise(0.0, 0)
FILLINGS = 4  # a call asks for this many times what the engines decode together: they stay full, and progress shows


@dataclass(frozen=True)
class Decoding:
    """How held-out problems are answered. ``temperature`` 0 is greedy."""

    samples: int = 1
    temperature: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        if self.temperature == 0:
            return "greedy"
        plural = "s" if self.samples > 1 else ""
        return f"{self.samples} answer{plural} each at temperature {self.temperature:g}"


def answer(
    config: Config,
    task: Task,
    pool: RolloutPool,
    rewards: RewardPool,
    decoding: Decoding,
    progress: Callable[[int], None] = lambda _: None,
) -> list[ScoredGroup]:
    """The scored answers to all held-out problems, in their order. ``progress`` is told how many problems are done."""
    prompts = task.eval_prompts()
    sampling = SamplingSettings(decoding.samples, decoding.temperature, config.rollout.max_new_tokens, decoding.seed)
    together = FILLINGS * config.rollout.max_sequences * config.rollout.workers
    size = max(together // decoding.samples, 1)
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    calls = [pool.generate(-1, part, sampling, CLEAN, "evaluation") for part in parts]
    scored: list[ScoredGroup] = []
    for part, call in zip(parts, calls, strict=True):
        result = merge_results(part, pool.wait(call, config.deadlines.evaluate, "evaluate"))
        scored += rewards.score(result.groups, "reward of the evaluation")
        progress(len(scored))
    return scored


def greedy_accuracy(config: Config, task: Task, pool: RolloutPool, rewards: RewardPool) -> Estimate:
    """Share of the held-out problems whose greedy answer is right."""
    return share(is_right(answer(config, task, pool, rewards, Decoding()))[:, 0])


def is_right(scored: Sequence[ScoredGroup]) -> np.ndarray:
    """Which answers are right, bool [problems, samples]."""
    return np.array([[result.parts["accuracy"] == 1 for result in group.results] for group in scored])


def per_problem(scored: Sequence[ScoredGroup], decoding: Decoding) -> dict[str, np.ndarray]:
    """What each problem adds to each measure, float64 [problems]: "accuracy" (greedy), or "pass@k" and "maj@n".

    "pass@1" is the mean accuracy of the samples.
    """
    right = is_right(scored)
    if decoding.temperature == 0:
        return {"accuracy": right[:, 0].astype(np.float64)}
    measures = {f"pass@{k}": pass_at_k(right, k) for k in powers_of_two(decoding.samples)}
    if decoding.samples > 1:
        chosen = [majority([result.final for result in group.results]) for group in scored]
        won = [index is not None and row[index] for index, row in zip(chosen, right, strict=True)]
        measures[f"maj@{decoding.samples}"] = np.array(won, dtype=np.float64)
    return measures


def estimates(task: Task, scored: Sequence[ScoredGroup], decoding: Decoding) -> dict[str, Estimate]:
    """Each measure over all problems, then "accuracy, KIND" or "pass@1, KIND" for each class of problems the task has.

    The error of shares (greedy, maj@n) is from Wilson's interval, that of pass@k the standard error over problems.
    """
    measures = per_problem(scored, decoding)
    found = {name: _estimate(name, values) for name, values in measures.items()}
    first = next(iter(measures))
    kinds = np.array([task.kind(group.group.prompt) for group in scored])
    for kind in sorted(set(kinds.tolist()) - {""}):
        found[f"{first}, {kind}"] = _estimate(first, measures[first][kinds == kind])
    return found


def _estimate(name: str, values: np.ndarray) -> Estimate:
    return mean(values) if name.startswith("pass@") else share(values)
