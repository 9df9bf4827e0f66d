"""All processes of a run: started, agreed on which modules are quantised, and always stopped."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from mxdist.config import Config
from mxdist.control.collect import RewardPool
from mxdist.control.groups import LearnerGroup, RolloutPool
from mxdist.control.processes import start_learners, start_ray, start_reward_workers, start_rollout_workers
from mxdist.control.waits import wait_for
from mxdist.messages import EngineReport, LearnerReport
from mxdist.model.linear_names import linear_names
from mxdist.model.recipes import ModelRecipes, model_recipes
from mxdist.model.shape import ModelShape
from mxdist.observe.console import Console
from mxdist.observe.module_names import compact_names
from mxdist.sync.parity import compare_modules
from mxdist.tasks.base import Task


@dataclass(frozen=True)
class System:
    """All processes of a run, up and agreed on which modules are quantised."""

    shape: ModelShape
    learners: LearnerGroup
    pool: RolloutPool
    rewards: RewardPool


@contextmanager
def running(config: Config, task: Task, run_path: Path, console: Console) -> Iterator[System]:
    """Start Ray and every process, and stop them all on the way out, whatever happened."""
    model_recipes(config)  # refuses overrides that do not fit the model
    tokenizer = task.tokenizer
    shape = ModelShape(
        config.model,
        config.model.vocab_size or tokenizer.vocab_size,
        tokenizer.bos_token_id,
        tokenizer.stop_token_ids,
        tokenizer.pad_token_id,
    )
    console.phase("starting Ray")
    try:
        start_ray(config)
        console.phase("starting learner, rollout and reward processes")
        learner_processes = start_learners(config, shape)
        learners = LearnerGroup(learner_processes, config)
        building = learners.build()
        pool = RolloutPool(start_rollout_workers(config, shape, run_path / "engines"), config)
        engines_starting = pool.start()
        rewards = RewardPool(start_reward_workers(config), config, task)
        learner_reports: list[LearnerReport] = wait_for(building, config.deadlines.start, "start")
        engine_reports: list[EngineReport] = wait_for(engines_starting, config.deadlines.start, "start")
        _agree_on_modules(config, learner_reports, engine_reports, console)
        yield System(shape, learners, pool, rewards)
    finally:
        ray.shutdown()


def _agree_on_modules(
    config: Config, learners: list[LearnerReport], engines: list[EngineReport], console: Console
) -> None:
    """Print what is quantised on both sides and refuse to go on when a side has nothing or the sides differ."""
    ours = sorted({name for report in learners for name in report.quantised_modules})
    recipes = model_recipes(config)
    expected = [name for name in linear_names(config.model) if recipes.of(name).w is not None]
    for line, full in _by_recipe(ours, recipes):
        console.note(f"learner: {line}", full=full)
    for index, report in enumerate(engines):
        theirs = list(report.quantised_modules)
        for line, full in _by_recipe(theirs, recipes):
            console.note(f"rollout worker {index}: {line}", full=full)
        compare_modules(ours, theirs, quantises=bool(expected))
    memory = [f"learner rank {report.rank} {report.resident_mib:.0f} MiB" for report in learners]
    memory += [f"rollout worker {index} {report.resident_mib:.0f} MiB" for index, report in enumerate(engines)]
    console.note(f"resident memory: {', '.join(memory)}")
    console.note(f"noise goes to {len(engines[0].noise_modules)} norms: {compact_names(engines[0].noise_modules)}")


def _by_recipe(quantised: Sequence[str], recipes: ModelRecipes) -> Iterator[tuple[str, list[str]]]:
    """One line for each recipe of the quantised linears, and their full names."""
    groups: dict[str, list[str]] = {}
    for name in quantised:
        groups.setdefault(recipes.of(name).name, []).append(name)
    for recipe, names in groups.items():
        yield f"{len(names)} linears in {recipe}: {compact_names(names)}", names
    if not groups:
        yield f"0 linears quantised (recipe {recipes.policy.default})", []
