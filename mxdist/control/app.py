"""What the commands do: prepare everything that can fail cheaply, start the processes, run, and always stop them."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from mxdist.aqn.controller import AqnController
from mxdist.config import Config, load_config
from mxdist.control.checkpoints import CheckpointStore, ControllerState
from mxdist.control.collect import Collector, RewardPool
from mxdist.control.groups import LearnerGroup, RolloutPool
from mxdist.control.loop import Trainer, greedy_accuracy, in_words
from mxdist.control.processes import start_learners, start_ray, start_reward_workers, start_rollout_workers
from mxdist.control.waits import wait_for
from mxdist.control.weights import WeightSync
from mxdist.errors import UserError
from mxdist.messages import EngineReport, LearnerReport
from mxdist.model.linear_names import linear_names
from mxdist.model.recipes import ModelRecipes, model_recipes
from mxdist.model.shape import ModelShape
from mxdist.observe.console import Console
from mxdist.observe.loggers import Loggers
from mxdist.observe.module_names import compact_names
from mxdist.observe.rollout_files import RolloutFiles
from mxdist.observe.run_directory import RunDirectory
from mxdist.sync.parity import compare_modules
from mxdist.tasks.base import Cursor, Task
from mxdist.tasks.registry import make_task

TOKENIZER = "tokenizer"  # folder of a run directory


def train(config: Config) -> None:
    """Start a new run and train it to the end."""
    model_recipes(config)
    task = make_task(config)
    with RunDirectory.create(config) as run_dir:
        task.tokenizer.save(run_dir.path / TOKENIZER)
        try:
            _train(config, task, run_dir, None)
        except UserError:
            if not CheckpointStore(run_dir.path).steps():  # nothing is lost, and the mended command can be repeated
                run_dir.discard()
            raise


def resume(run_path: Path, overrides: list[str]) -> None:
    """Go on from the newest complete checkpoint of a run, with settings changed if asked."""
    with RunDirectory.open(run_path) as run_dir:
        config = load_config(run_dir.config_path, overrides)
        _require_same_run(load_config(run_dir.config_path), config)
        state, learner_folder = CheckpointStore(run_dir.path).newest()
        if state.step >= config.run.steps:
            raise UserError(
                f"{run_path} has reached step {state.step} of run.steps={config.run.steps}; "
                f"add run.steps=N with a larger N"
            )
        _train(config, make_task(config, run_dir.path / TOKENIZER), run_dir, (state, learner_folder))


def evaluate(run_path: Path, overrides: list[str]) -> dict[str, float]:
    """Greedy accuracy of the newest checkpoint on the held-out problems, with quantised and with BF16 weights."""
    with RunDirectory.open(run_path) as run_dir:
        config = load_config(run_dir.config_path, overrides)
        state, learner_folder = CheckpointStore(run_dir.path).newest()
        task = make_task(config, run_dir.path / TOKENIZER)
        problems = len(task.eval_prompts())
        accuracies: dict[str, float] = {}
        with Console(run_dir.path) as console:
            plain = config.model_copy(update={"recipe": "bf16", "recipe_overrides": ()})
            for recipe, variant in {_recipe_in_words(config): config, "bf16": plain}.items():
                with running(variant, task, run_dir.path, console) as system:
                    system.learners.load(learner_folder)
                    sync = WeightSync(system.learners, system.pool, variant)
                    sync.push(state.step)
                    sync.check_all()
                    accuracies[recipe] = greedy_accuracy(variant, task, system.pool, system.rewards)
                console.note(f"step {state.step}, recipe {recipe}: {in_words(accuracies[recipe], problems)}")
        return accuracies


def _require_same_run(saved: Config, config: Config) -> None:
    """Refuse what would make another run of it rather than continue it."""
    for key in ("seed", "dir"):
        before, after = getattr(saved.run, key), getattr(config.run, key)
        if before != after:
            raise UserError(
                f"run.{key}={after} cannot be set on a run that goes on (it began with {before}); "
                f"leave it out, or start a new run with 'mxdist train'"
            )


def _train(config: Config, task: Task, run_dir: RunDirectory, checkpoint: tuple[ControllerState, Path] | None) -> None:
    """Train to the end, from the start or from a checkpoint."""
    state = checkpoint[0] if checkpoint else None
    first_step = state.step if state else 0
    aqn = AqnController(config.aqn, state.aqn_steps if state else config.run.steps)
    if state:
        aqn.restore(state.aqn)
    with (
        Console(run_dir.path, config.run.steps) as console,
        Loggers(run_dir.path, config, resume_step=first_step if state else None) as loggers,
        running(config, task, run_dir.path, console) as system,
    ):
        if checkpoint:
            system.learners.load(checkpoint[1])
            run_dir.save_config(config)  # only now is it known that the settings fit the checkpoint
            console.note(f"resumed from step {first_step}")
        trainer = Trainer(
            config=config,
            task=task,
            shape=system.shape,
            learners=system.learners,
            pool=system.pool,
            rewards=system.rewards,
            sync=WeightSync(system.learners, system.pool, config),
            collector=Collector(
                config,
                task,
                system.pool,
                system.rewards,
                aqn,
                Cursor.restore(state.cursor) if state else Cursor(),
                first_step,
                deque(Cursor.restore(cursor) for cursor in state.ahead) if state else deque(),
            ),
            aqn=aqn,
            checkpoints=CheckpointStore(run_dir.path),
            loggers=loggers,
            rollouts=RolloutFiles(run_dir.path, config.log.rollout_groups, task.tokenizer),
            console=console,
        )
        trainer.run(first_step, fresh=checkpoint is None)
        console.finished(run_dir.path)


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
        config.model, tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
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


def _recipe_in_words(config: Config) -> str:
    return config.recipe + (" with recipe_overrides" if config.recipe_overrides else "")
