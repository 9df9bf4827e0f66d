"""What the commands do: prepare everything that can fail cheaply, start the processes, run, and always stop them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from mxdist.aqn.controller import AqnController
from mxdist.config import Config, load_config
from mxdist.control.checkpoints import CheckpointStore
from mxdist.control.collect import Collector, RewardPool
from mxdist.control.groups import LearnerGroup, RolloutPool
from mxdist.control.loop import Trainer, greedy_accuracy, in_words
from mxdist.control.processes import start_learners, start_ray, start_reward_workers, start_rollout_workers
from mxdist.control.waits import wait_for
from mxdist.control.weights import WeightSync
from mxdist.errors import UserError
from mxdist.messages import EngineReport, LearnerReport
from mxdist.model.shape import ModelShape
from mxdist.observe.console import Console
from mxdist.observe.loggers import Loggers
from mxdist.observe.module_names import compact_names
from mxdist.observe.run_directory import RunDirectory
from mxdist.quant.recipe import get_recipe
from mxdist.sync.parity import compare_modules
from mxdist.tasks.base import Cursor, Task
from mxdist.tasks.registry import make_task

TOKENIZER = "tokenizer"  # folder of a run directory


def train(config: Config) -> None:
    """Start a new run and train it to the end."""
    task = make_task(config)
    with RunDirectory.create(config) as run_dir:
        task.tokenizer.save(run_dir.path / TOKENIZER)
        _train(config, task, run_dir, fresh=True)


def resume(run_path: Path, overrides: list[str]) -> None:
    """Go on from the newest complete checkpoint of a run, with settings changed if asked."""
    with RunDirectory.open(run_path) as run_dir:
        config = load_config(run_dir.config_path, overrides)
        task = make_task(config, run_dir.path / TOKENIZER)
        step = CheckpointStore(run_dir.path).newest()[0].step
        if step >= config.run.steps:
            raise UserError(
                f"{run_path} has reached step {step} of run.steps={config.run.steps}; add run.steps=N with a larger N"
            )
        _train(config, task, run_dir, fresh=False)


def evaluate(run_path: Path, overrides: list[str]) -> dict[str, float]:
    """Greedy accuracy of the newest checkpoint on the held-out problems, with quantised and with BF16 weights."""
    with RunDirectory.open(run_path) as run_dir:
        config = load_config(run_dir.config_path, overrides)
        task = make_task(config, run_dir.path / TOKENIZER)
        state, learner_folder = CheckpointStore(run_dir.path).newest()
        problems = len(task.eval_prompts())
        accuracies: dict[str, float] = {}
        with Console(run_dir.path) as console:
            for recipe in dict.fromkeys([config.recipe, "bf16"]):
                variant = config.model_copy(update={"recipe": recipe})
                with running(variant, task, run_dir.path, console) as system:
                    system.learners.load(learner_folder)
                    sync = WeightSync(system.learners, system.pool, variant)
                    sync.push(state.step)
                    sync.check()
                    accuracies[recipe] = greedy_accuracy(variant, task, system.pool, system.rewards)
                console.note(f"step {state.step}, recipe {recipe}: {in_words(accuracies[recipe], problems)}")
        return accuracies


def _train(config: Config, task: Task, run_dir: RunDirectory, fresh: bool) -> None:
    aqn = AqnController(config.aqn, config.run.steps)
    store = CheckpointStore(run_dir.path)
    first_step, cursor = 0, Cursor()
    if not fresh:
        state, learner_folder = store.newest()
        first_step, cursor = state.step, Cursor.restore(state.cursor)
        aqn.restore(state.aqn)
    with (
        Console(run_dir.path, config.run.steps) as console,
        Loggers(run_dir.path, config, resume_step=None if fresh else first_step) as loggers,
        running(config, task, run_dir.path, console) as system,
    ):
        if not fresh:
            system.learners.load(learner_folder)
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
            collector=Collector(config, task, system.pool, system.rewards, aqn, cursor, first_step),
            aqn=aqn,
            checkpoints=store,
            loggers=loggers,
            console=console,
        )
        trainer.run(first_step, fresh)
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
        pool = RolloutPool(start_rollout_workers(config, shape, config.recipe, run_path / "engines"), config)
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
    quantises = get_recipe(config.recipe).quantises
    console.note(f"learner: {len(ours)} linears in {config.recipe}: {compact_names(ours)}", full=ours)
    for index, report in enumerate(engines):
        theirs = list(report.quantised_modules)
        console.note(
            f"rollout worker {index}: {len(theirs)} linears in {config.recipe}: {compact_names(theirs)}", full=theirs
        )
        compare_modules(ours, theirs, quantises)
    console.note(f"noise goes to {len(engines[0].noise_modules)} norms: {compact_names(engines[0].noise_modules)}")
