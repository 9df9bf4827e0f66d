"""How many trajectories a second the controller can take: the real one, with simulated workers.

    python -m tools.scale.controller_load [--workers 512] [--steps 4] [--tokens 280]

``Collector``, ``RolloutPool``, ``RewardPool``, ``Supervisor`` and ``build_batch`` are those of a run, and so is Ray's
transport. What is simulated are the workers: a few host processes answer the calls of all of them at once, with
answers of random tokens and made-up rewards. The controller's rate is then the bound of any cluster. Its processor
time is reported beside the clock's, since a busy machine stretches the latter.
"""

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray

from mxdist.aqn.controller import AqnController
from mxdist.config import Config
from mxdist.control.batch import build_batch
from mxdist.control.collect import Collector, RewardPool
from mxdist.control.groups import RolloutPool
from mxdist.control.roster import Roster
from mxdist.control.supervisor import Supervisor, Worker
from mxdist.control.waits import Pending
from mxdist.learner.losses import get_objective
from mxdist.messages import EntropyStatistics, Group, RolloutRequest, RolloutResult, Sample
from mxdist.tasks.base import Cursor, RewardResult
from mxdist.tasks.registry import make_task

HOSTS = 4  # processes that the simulated workers live in
REWARD_WORKERS = 8


class Simulated:
    """Answers for many workers at once."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        draws = np.random.default_rng(0)
        self._samples = [
            Sample(draws.integers(5, vocabulary, tokens), draws.normal(size=tokens).astype(np.float32), True)
            for _ in range(64)
        ]

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self, method)(*arguments)

    def generate(self, request: RolloutRequest) -> RolloutResult:
        count = request.sampling.samples_per_prompt
        samples = tuple(self._samples[index % len(self._samples)] for index in range(count))
        groups = tuple(Group(prompt, samples, request.step, 0.0) for prompt in request.prompts)
        tokens = sum(len(sample.tokens) for sample in samples) * len(groups)
        return RolloutResult(groups, EntropyStatistics(1.0, tokens), 0.0, 1, 0.0)

    def score(self, items: list[tuple[str, str, str]]) -> list[RewardResult]:
        return [RewardResult(float(index % 2), {"correct": float(index % 2)}, "1") for index in range(len(items))]


class SimulatedProcess:
    """What the controller sees of a worker: the calls of ``control.processes.Process``."""

    def __init__(self, name: str, host: Any) -> None:
        self.name = name
        self._host = host

    def call(self, doing: str, method: str, *arguments: Any) -> Pending:
        return Pending(self._host.call.remote(method, *arguments), self.name, doing, time.monotonic())


@dataclass(frozen=True)
class Load:
    """Rates of trajectories a second, over all steps but the first."""

    workers: int
    trajectories: int  # of a step
    per_second: float
    per_cpu_second: float  # of the controller's process, all its threads
    shares: dict[str, float]  # of the clock's time: sampling and rewards, batch, hand-over


def measure(workers: int, steps: int, tokens: int, prompts: int, samples: int) -> Load:
    """Run ``steps`` steps of ``prompts`` times ``samples`` answers of ``tokens`` tokens through the controller."""
    config = Config.model_validate(
        {
            "algorithm": {"name": "grpo", "prompts_per_step": prompts, "samples_per_prompt": samples},
            "rollout": {"max_new_tokens": tokens, "workers": workers},
            "model": {"max_position_embeddings": tokens + 64},
            "learner": {"ranks": 1, "expert_parallel": 1},
        }
    )
    task = make_task(config)
    vocabulary = task.tokenizer.vocab_size
    host_class = ray.remote(Simulated).options(num_cpus=0, max_concurrency=workers // HOSTS + REWARD_WORKERS)
    hosts = [host_class.remote(tokens, vocabulary) for _ in range(HOSTS)]
    with TemporaryDirectory() as folder:
        supervisor = Supervisor(config, Roster(Path(folder)), print)
        pool = RolloutPool([_worker(f"rollout worker {i}", hosts) for i in range(workers)], supervisor)
        scorers = [_worker(f"reward worker {i}", hosts) for i in range(REWARD_WORKERS)]
        rewards = RewardPool(scorers, config, task, supervisor)
        collector = Collector(config, task, pool, rewards, AqnController(config.aqn, steps), Cursor())
        marks = []
        for step in range(steps):
            marks.append((time.monotonic(), time.process_time(), *_step(config, collector, step)))
        marks.append((time.monotonic(), time.process_time(), 0.0, 0.0))
    clock, cpu = marks[-1][0] - marks[1][0], marks[-1][1] - marks[1][1]
    count = prompts * samples * (steps - 1)
    batch, put = (sum(mark[index] for mark in marks[1:]) / clock for index in (2, 3))
    shares = {"sampling and rewards": 1 - batch - put, "batch": batch, "hand-over": put}
    return Load(workers, prompts * samples, count / clock, count / cpu, shares)


def _worker(name: str, hosts: list[Any]) -> Worker:
    host = hosts[int(name.rsplit(" ", 1)[1]) % len(hosts)]
    return Worker(partial(SimulatedProcess, name, host))  # type: ignore[arg-type]


def _step(config: Config, collector: Collector, step: int) -> tuple[float, float]:
    """Seconds for making the batch and for handing it over."""
    collector.submit_through(step)
    collected = collector.collect(step)
    began = time.monotonic()
    objective = get_objective(config.algorithm)
    batch = build_batch(collected.scored, objective, 1, config.rollout.max_new_tokens, 0, 1.0)
    made = time.monotonic()
    ray.put(batch)
    return made - began, time.monotonic() - made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[512])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[280], help="of one answer")
    parser.add_argument("--prompts", type=int, default=1024, help="of a step")
    parser.add_argument("--samples", type=int, default=8, help="of a prompt")
    arguments = parser.parse_args()
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=1 << 30, log_to_driver=False)
    print("| workers | tokens of an answer | trajectories/s | per CPU second | sampling, rewards | batch | hand-over |")
    print("|---|---|---|---|---|---|---|")
    for workers in arguments.workers:
        for tokens in arguments.tokens:
            load = measure(workers, arguments.steps, tokens, arguments.prompts, arguments.samples)
            shares = " | ".join(f"{share:.0%}" for share in load.shares.values())
            print(
                f"| {workers} | {tokens} | {load.per_second:,.0f} | {load.per_cpu_second:,.0f} | {shares} |", flush=True
            )


if __name__ == "__main__":
    main()
