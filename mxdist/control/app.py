"""The commands train and resume: prepare everything that can fail cheaply, start the processes, and run."""

from dataclasses import dataclass
from pathlib import Path

from mxdist.aqn.controller import AqnController
from mxdist.config import Config, load_config
from mxdist.control.checkpoints import Checkpoint, CheckpointStore
from mxdist.control.collect import Collector, SavedBatch
from mxdist.control.guards import Guards
from mxdist.control.loop import Measurement, Trainer
from mxdist.control.records import read_records
from mxdist.control.saving import CheckpointWriter, versions
from mxdist.control.stopping import StopRequests
from mxdist.control.system import System, running
from mxdist.control.weights import WeightSync
from mxdist.errors import ProcessFailure, RollBack, UserError
from mxdist.model.recipes import model_recipes
from mxdist.observe.console import Console
from mxdist.observe.ledger import Ledger, places_after
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


@dataclass(frozen=True)
class _PassedOver:
    """After a roll-back: where new prompts are drawn from, and the groups that the run will not come to again."""

    base: int  # the step rolled back to
    cursor: Cursor
    places: list[str]


def _train(config: Config, task: Task, run_dir: RunDirectory, measurement: Measurement | None = None) -> None:
    """Train to the end, from the newest checkpoint if there is one; from there again as the supervisor decides."""
    store = CheckpointStore(run_dir.path)
    with Console(run_dir.path, config.run.steps) as console, StopRequests() as stop:
        checkpoint = store.newest(console.note)
        if checkpoint:
            _batches_ahead(checkpoint, config)  # what does not fit is refused before anything starts
        learner_folder = checkpoint.learner_folder if checkpoint else None
        with running(config, task, run_dir.path, console, learner_folder) as system:
            session = _Session(config, task, run_dir, system, console, stop, measurement)
            while True:
                try:
                    session.train(checkpoint)
                    break
                except ProcessFailure as failure:  # of a learner rank: others are replaced where they are waited for
                    system.supervisor.take(failure)
                    console.phase("restarting the learner")
                    system.restart_learners(goes_on=bool(store.steps()))
                except RollBack as reason:
                    system.supervisor.take(reason)
                    session.pass_over()
                    system.pool.forget_unfinished()
                checkpoint = store.newest(console.note)
            console.finished(run_dir.path)


@dataclass
class _Session:
    """The processes of a run, on which its loop may begin more than once."""

    config: Config
    task: Task
    run_dir: RunDirectory
    system: System
    console: Console
    stop: StopRequests
    measurement: Measurement | None = None
    _passed_over: _PassedOver | None = None

    def train(self, checkpoint: Checkpoint | None) -> None:
        """The loop, from ``checkpoint``, the newest, to the end of the run."""
        config, system, path, console = self.config, self.system, self.run_dir.path, self.console
        store = CheckpointStore(path, config.run.keep_checkpoints, config.run.keep_every)
        first_step = checkpoint.state.step if checkpoint else 0
        aqn = AqnController(config.aqn, checkpoint.state.aqn_steps if checkpoint else config.run.steps)
        self._collector = Collector(config, self.task, system.pool, system.rewards, aqn, Cursor(), first_step)
        if checkpoint:
            _restore(checkpoint, system, aqn, self._collector, console)
            self.run_dir.save_config(config)  # only now have the learners taken the checkpoint
        given_up: list[str] = []
        if self._passed_over and self._passed_over.base == first_step:
            self._collector.cursor, given_up = self._passed_over.cursor, self._passed_over.places
            self._collector.again.clear()
        resume_step = first_step if checkpoint else None
        written = system.supervisor.checkpoint_written
        with (
            Loggers(path, config, resume_step) as loggers,
            CheckpointWriter(store, system.learners, config, console.note, written) as checkpoints,
        ):
            Trainer(
                config=config,
                task=self.task,
                shape=system.shape,
                learners=system.learners,
                pool=system.pool,
                rewards=system.rewards,
                sync=WeightSync(system.learners, system.pool, system.transport, config),
                collector=self._collector,
                aqn=aqn,
                checkpoints=checkpoints,
                ledger=Ledger(path, resume_step, given_up),
                guards=Guards(config.guards, config.algorithm.prompts_per_step, console.note),
                stop=self.stop,
                loggers=loggers,
                rollouts=RolloutFiles(path, config.log.rollout_groups, self.task.tokenizer),
                console=console,
                measurement=self.measurement,
            ).run(first_step, fresh=checkpoint is None)

    def pass_over(self) -> None:
        """The loop has been left to roll back: what it has drawn since the newest checkpoint is not drawn again."""
        base = max(CheckpointStore(self.run_dir.path).steps(), default=0)
        latest, ahead = self._collector.handed_out, self._collector.places_ahead()
        places = [*places_after(self.run_dir.path, base), *(latest.places + latest.dropped if latest else []), *ahead]
        if self._passed_over and self._passed_over.base == base:  # once more
            places += self._passed_over.places
        self._passed_over = _PassedOver(base, self._collector.cursor, list(dict.fromkeys(places)))


def _restore(
    checkpoint: Checkpoint, system: System, aqn: AqnController, collector: Collector, console: Console
) -> None:
    """Put everything where it was when the checkpoint was taken."""
    state = checkpoint.state
    aqn.restore(state.aqn)
    collector.cursor = Cursor.restore(state.cursor)
    collector.again.extend(_batches_ahead(checkpoint, collector.config))
    system.learners.load(checkpoint.learner_folder)
    console.note(f"resumed from step {state.step}")
    changed = [f"{name} {old}, now {new}" for name, old, new in _differing(state.versions, versions())]
    if changed:
        console.note(f"the checkpoint was written with {', '.join(changed)}: numbers may differ in the last bits")


def _batches_ahead(checkpoint: Checkpoint, config: Config) -> list[SavedBatch]:
    """What it has sampled ahead. UserError when steps have another size now."""
    batches, wanted = read_records(checkpoint.ahead, SavedBatch), config.algorithm.prompts_per_step
    for batch in batches:
        if batch.prompts != wanted:
            raise UserError(
                f"algorithm.prompts_per_step={wanted} does not fit the batches of {batch.prompts} prompts that "
                f"{checkpoint.folder} has sampled ahead; leave it as it was"
            )
    return batches


def _differing(old: dict[str, str], new: dict[str, str]) -> list[tuple[str, str, str]]:
    names = sorted(old.keys() | new.keys())
    pairs = [(name, old.get(name, "none"), new.get(name, "none")) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]
