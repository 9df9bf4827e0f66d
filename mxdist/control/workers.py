"""The workers that can be replaced one by one: rollout engines and reward workers."""

from functools import partial
from pathlib import Path

from mxdist.config import Config
from mxdist.control.processes import REWARD, REWARD_WORKER_CPUS, ROLLOUT, ROLLOUT_NAME
from mxdist.control.roster import Roster
from mxdist.control.supervisor import Worker
from mxdist.model.shape import ModelShape


def rollout_workers(config: Config, shape: ModelShape, model_dirs: Path, roster: Roster) -> list[Worker]:
    """One engine a process, being constructed but not started. ``model_dirs`` gets one model directory for each."""
    section = config.rollout
    workers = []
    for index in range(section.workers):
        name = f"{ROLLOUT_NAME} {index}"
        start = partial(roster.start, name, section.cpus_per_worker, section.gpus_per_worker)
        worker = Worker(partial(start, aside=config.sync.update == "in_flight"))
        worker.construct(ROLLOUT, config, shape, model_dirs / f"engine_{index}")
        workers.append(worker)
    return workers


def reward_workers(config: Config, roster: Roster) -> list[Worker]:
    """Reward workers, being constructed."""
    workers = []
    for index in range(config.reward.workers):
        worker = Worker(partial(roster.start, f"reward worker {index}", REWARD_WORKER_CPUS, 0))
        worker.construct(REWARD, config)
        workers.append(worker)
    return workers
