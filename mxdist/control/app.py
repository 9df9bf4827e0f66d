"""The commands train and resume: prepare everything that can fail cheaply, start the processes, and run."""

from collections import deque
from pathlib import Path

from mxdist.aqn.controller import AqnController
from mxdist.config import Config, load_config
from mxdist.control.checkpoints import CheckpointStore
from mxdist.control.collect import Collector
from mxdist.control.loop import Measurement, Trainer
from mxdist.control.system import System, running
from mxdist.control.weights import WeightSync
from mxdist.errors import ProcessFailure, UserError
from mxdist.model.recipes import model_recipes
from mxdist.observe.console import Console
from mxdist.observe.loggers import Loggers
from mxdist.observe.rollout_files import RolloutFiles
from mxdist.observe.run_directory import TOKENIZER, RunDirectory
from mxdist.tasks.base import Cursor, Task
from mxdist.tasks.registry import make_task


def train(config: Config, measurement: Measurement | None = None) -> None:
    """Start a new run and train it to the end."""
    model_recipes(config)
    task = make_task(config)
    with RunDirectory.create(config) as run_dir:
        task.tokenizer.save(run_dir.path / TOKENIZER)
        try:
            _train(config, task, run_dir, measurement)
        except UserError:
            if not CheckpointStore(run_dir.path).steps():  # nothing is lost, and the mended command can be repeated
                run_dir.discard()
            raise


def resume(run_path: Path, overrides: list[str]) -> None:
    """Go on from the newest complete checkpoint of a run, or from its start; with settings changed if asked."""
    with RunDirectory.open(run_path) as run_dir:
        config = load_config(run_dir.config_path, overrides)
        _require_same_run(load_config(run_dir.config_path), config)
        done = max(CheckpointStore(run_dir.path).steps(), default=0)
        if done >= config.run.steps:
            raise UserError(
                f"{run_path} has reached step {done} of run.steps={config.run.steps}; add run.steps=N with a larger N"
            )
        _train(config, make_task(config, run_dir.path / TOKENIZER), run_dir)


def _require_same_run(saved: Config, config: Config) -> None:
    """Refuse what would make another run of it rather than continue it."""
    for key in ("seed", "dir"):
        before, after = getattr(saved.run, key), getattr(config.run, key)
        if before != after:
            raise UserError(
                f"run.{key}={after} cannot be set on a run that goes on (it began with {before}); "
                f"leave it out, or start a new run with 'mxdist train'"
            )


def _train(config: Config, task: Task, run_dir: RunDirectory, measurement: Measurement | None = None) -> None:
    """Train to the end, from the newest checkpoint if there is one; from there again when a learner rank fails."""
    with (
        Console(run_dir.path, config.run.steps) as console,
        running(config, task, run_dir.path, console) as system,
    ):
        while True:
            try:
                _train_from_newest(config, task, run_dir, system, console, measurement)
                break
            except ProcessFailure as failure:  # of a learner rank: the others are replaced where they are waited for
                system.supervisor.take(failure)
                console.phase("restarting the learner")
                system.restart_learners()
        console.finished(run_dir.path)


def _train_from_newest(
    config: Config,
    task: Task,
    run_dir: RunDirectory,
    system: System,
    console: Console,
    measurement: Measurement | None,
) -> None:
    checkpoints = CheckpointStore(run_dir.path)
    state, learner_folder = checkpoints.newest() if checkpoints.steps() else (None, None)
    first_step = state.step if state else 0
    aqn = AqnController(config.aqn, state.aqn_steps if state else config.run.steps)
    if state and learner_folder:
        aqn.restore(state.aqn)
        system.learners.load(learner_folder)
        run_dir.save_config(config)  # only now is it known that the settings fit the checkpoint
        console.note(f"resumed from step {first_step}")
    with Loggers(run_dir.path, config, resume_step=first_step if state else None) as loggers:
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
            checkpoints=checkpoints,
            supervisor=system.supervisor,
            loggers=loggers,
            rollouts=RolloutFiles(run_dir.path, config.log.rollout_groups, task.tokenizer),
            console=console,
            measurement=measurement,
        )
        trainer.run(first_step, fresh=state is None)
