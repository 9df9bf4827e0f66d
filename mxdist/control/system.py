"""All processes of a run: started, agreed on which modules are quantised, and always stopped."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from mxdist.config import Config
from mxdist.config.hf_config import model_directory
from mxdist.config.turns import broadcast_lacks
from mxdist.control import network
from mxdist.control.collect import RewardPool
from mxdist.control.groups import LearnerGroup, RolloutPool
from mxdist.control.nodes import alive_nodes, require_same_nodes
from mxdist.control.placement import LearnerPlacement
from mxdist.control.processes import LEARNER_NAME, ROLLOUT_NAME, start_learners, start_ray
from mxdist.control.roster import Roster
from mxdist.control.supervisor import Supervisor
from mxdist.control.waits import wait_for
from mxdist.control.weights import Way
from mxdist.control.workers import reward_workers, rollout_workers
from mxdist.errors import ProcessFailure, UserError
from mxdist.learner.checkpoint_folder import raise_if_unfit
from mxdist.messages import EngineReport, LearnerReport
from mxdist.model.checkpoint_contents import open_checkpoint
from mxdist.model.linear_names import linear_names
from mxdist.model.recipes import ModelRecipes, model_recipes
from mxdist.model.shape import ModelShape
from mxdist.observe.console import Console
from mxdist.observe.module_names import compact_names
from mxdist.sync.broadcast import Meetings
from mxdist.sync.parity import compare_modules
from mxdist.sync.shared import choose_transport
from mxdist.tasks.base import Task


@dataclass
class System:
    """All processes of a run, up and agreed on which modules are quantised."""

    config: Config
    shape: ModelShape
    learners: LearnerGroup
    pool: RolloutPool
    rewards: RewardPool
    supervisor: Supervisor
    placement: LearnerPlacement
    transport: Way  # of weight syncs

    def restart_learners(self, goes_on: bool) -> None:
        """Replace every learner rank; what the other processes have under way is of no interest any more.

        Args:
            goes_on: there is a checkpoint of the run to load, so that ``model.path`` is not needed.
        """
        _dismiss_learners(self.supervisor, self.placement)
        self.pool.forget_unfinished()
        self.pool.forget_weights()
        config = _for_learners(self.config, goes_on)
        self.learners, _ = _start_learners(config, self.shape, self.supervisor, self.placement)


@contextmanager
def running(
    config: Config, task: Task, run_path: Path, console: Console, learner_folder: Path | None = None
) -> Iterator[System]:
    """Start Ray and every process, and stop them all on the way out, whatever happened.

    Args:
        learner_folder: of the checkpoint of the run that the learner's weights will be those of, if any;
            ``model.path`` is then not needed.
    Raises:
        UserError: the checkpoint, or that of ``model.path``, does not fit; before anything is started.
    """
    model_recipes(config)  # refuses overrides that do not fit the model
    tokenizer = task.tokenizer
    shape = ModelShape(
        config.model,
        config.model.vocab_size or tokenizer.vocab_size,
        tokenizer.bos_token_id,
        tokenizer.stop_token_ids,
        tokenizer.pad_token_id,
    )
    goes_on = learner_folder is not None
    if learner_folder is not None:
        raise_if_unfit(learner_folder, config.learner, shape)
    elif config.model.path is not None:
        open_checkpoint(model_directory(config.model.path), shape)
    supervisor = Supervisor(config, Roster(run_path), console.note)
    console.phase("starting Ray")
    try:
        start_ray(config)
        require_same_nodes(config, run_path)
        console.phase("starting learner, rollout and reward processes")
        placement = LearnerPlacement(config, console.note)
        placement.reserve()  # before the engines take a place that ranks which belong together need
        pool = RolloutPool(rollout_workers(config, shape, run_path / "engines", supervisor.roster), supervisor)
        engines_starting = pool.start()
        rewards = RewardPool(reward_workers(config, supervisor.roster), config, task, supervisor)
        learners, learner_reports = _start_learners(_for_learners(config, goes_on), shape, supervisor, placement)
        engine_reports: list[EngineReport] = pool.wait(engines_starting, config.deadlines.start, "start")
        _agree_on_modules(config, learner_reports, engine_reports, console)
        transport = _agree_on_transport(config, learner_reports, engine_reports, learners, pool, console)
        supervisor.meetings = transport if isinstance(transport, Meetings) else None
        yield System(config, shape, learners, pool, rewards, supervisor, placement, transport)
    except ProcessFailure as failure:
        raise supervisor.stop(failure) from failure
    finally:
        ray.shutdown()


def _for_learners(config: Config, goes_on: bool) -> Config:
    """Ranks that load a checkpoint of the run do not read ``model.path`` before: it may be gone by now."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": None})}) if goes_on else config


def _start_learners(
    config: Config, shape: ModelShape, supervisor: Supervisor, placement: LearnerPlacement
) -> tuple[LearnerGroup, list[LearnerReport]]:
    """All learner ranks, built; once more from the start when one of them fails meanwhile."""
    while True:
        try:
            learners = LearnerGroup(start_learners(config, shape, supervisor.roster.start, placement), config)
            return learners, wait_for(learners.build(), config.deadlines.start, "start")
        except ProcessFailure as failure:
            supervisor.take(failure)
            _dismiss_learners(supervisor, placement)


def _dismiss_learners(supervisor: Supervisor, placement: LearnerPlacement) -> None:
    """End what is left of them, and find places anew: their node may be gone."""
    for process in supervisor.roster.named(LEARNER_NAME):
        supervisor.roster.dismiss(process)
    placement.reserve()


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
            console.note(f"{ROLLOUT_NAME} {index}: {line}", full=full)
        compare_modules(ours, theirs, quantises=bool(expected))
    memory = [
        f"learner rank {report.rank} {report.resident_mib:.0f} MiB ({report.parameters:,} parameters)"
        for report in learners
    ]
    memory += [
        f"{ROLLOUT_NAME} {index} {report.resident_mib:.0f} MiB ({report.bytes_per_quantised_weight:.2f} bytes per "
        "quantised weight)"
        for index, report in enumerate(engines)
    ]
    console.note(f"resident memory: {', '.join(memory)}")
    console.note(f"noise goes to {len(engines[0].noise_modules)} norms: {compact_names(engines[0].noise_modules)}")


def _agree_on_transport(
    config: Config,
    reports: list[LearnerReport],
    engines: list[EngineReport],
    learners: LearnerGroup,
    pool: RolloutPool,
    console: Console,
) -> Way:
    places = {f"learner rank {report.rank}": report.device for report in reports}
    places |= {f"{ROLLOUT_NAME} {index}": report.device for index, report in enumerate(engines)}
    broadcasts = broadcast_lacks(config) is None
    transport = choose_transport(config.sync.transport, places, len(alive_nodes()), broadcasts)
    refusal = pool.cannot_map(learners.probes(), config.deadlines.start) if transport == "ipc" else None
    if refusal and config.sync.transport == "ipc":
        raise UserError(f"sync.transport=ipc does not work here: {refusal}")
    if refusal:
        transport = "host"
        console.note(f"GPUs cannot share memory here: {refusal}")
    through = {
        "host": "Ray's object store",
        "delta": "Ray's object store, as blocks that changed since the version before",
        "ipc": "buckets on the learner's GPUs (CUDA IPC)",
        "broadcast": f"broadcasts to all engines ({'NCCL' if reports[0].device.on_gpu else 'gloo'})",
    }[transport]
    console.note(f"weights go through {through}")
    if config.sync.update == "in_flight":
        console.note(
            "weights reach engines in flight: which tokens a version draws depends on timing, so another run of this "
            "seed will differ"
        )
    return meetings(config) if transport == "broadcast" else transport


def meetings(config: Config) -> Meetings:
    """Broadcasts that are over before the wait for them is, so that those who came are told apart from who did not."""
    section, wait = config.rollout, config.deadlines.sync
    return Meetings(
        network.address(config),
        receivers=section.workers * section.tensor_parallel,
        arrival=section.max_lag * config.deadlines.rollout + wait / 2,
        transfer=wait / 4,
    )


def _by_recipe(quantised: Sequence[str], recipes: ModelRecipes) -> Iterator[tuple[str, list[str]]]:
    """One line for each recipe of the quantised linears, and their full names."""
    groups: dict[str, list[str]] = {}
    for name in quantised:
        groups.setdefault(recipes.of(name).name, []).append(name)
    for recipe, names in groups.items():
        yield f"{len(names)} linears in {recipe}: {compact_names(names)}", names
    if not groups:
        yield f"0 linears quantised (recipe {recipes.policy.default})", []
