"""The processes of a run: Ray, and one actor for each learner rank, rollout engine and reward worker.

Workers are plain classes elsewhere in the package; ``WorkerProcess`` hosts one of them, named by its import path, so
that the controller never imports Megatron-core or vLLM.
"""

import contextlib
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import ray

from mxdist.config import Config
from mxdist.config.model_costs import object_store_bytes
from mxdist.control import network, stacks
from mxdist.control.memory import explained
from mxdist.control.placement import LearnerPlacement, Where
from mxdist.control.stopping import ASKED
from mxdist.control.waits import Pending, wait_for
from mxdist.errors import Preempted, UserError
from mxdist.interrupts import put_off
from mxdist.model.shape import ModelShape

START_ATTEMPTS = 2
LEARNER_NAME = "learner rank"
ROLLOUT_NAME = "rollout worker"
ASIDE = "aside"
LEARNER = "mxdist.learner.worker:LearnerWorker"
ROLLOUT = "mxdist.rollout.worker:RolloutWorker"
REWARD = "mxdist.tasks.reward_worker:RewardWorker"

# Set before the workers import anything.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # ranks and engines share the cores; one thread each is fastest
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "NCCL_NVLS_ENABLE": "0",
    "PYTHONWARNINGS": "ignore",
}
REWARD_WORKER_CPUS = 0.25
CONNECT_SECONDS = 5.0


class WorkerProcess:
    """Runs one worker object in a process of its own."""

    def __init__(self, stacks_file: Path) -> None:
        logging.disable(logging.WARNING)  # third-party chatter; errors still reach Ray's worker logs
        stacks.register(stacks_file)
        if not ray.get_gpu_ids():  # Ray leaves every GPU in sight of a process that has asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._worker: Any = None
        self._failure: Exception | None = None

    def construct(self, path: str, *arguments: Any) -> None:
        """Make the worker. ``path`` is "module:Class", imported here and nowhere else. Later calls repeat a failure."""
        module, name = path.split(":")
        try:
            network.settle_interface()
            self._worker = getattr(import_module(module), name)(*arguments)
        except Exception as error:
            self._failure = error
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        if self._failure is not None:
            raise self._failure
        with explained(self._worker, method):
            return getattr(self._worker, method)(*arguments)

    def call_with_list(self, method: str, leading: tuple[Any, ...], *items: Any) -> Any:
        """Call ``method`` with ``leading`` and one list. Ray resolves references only when they are arguments of
        their own."""
        return self.call(method, *leading, list(items))

    def rendezvous(self, wanted_port: int) -> str | None:
        """See ``control.network.rendezvous``."""
        network.settle_interface()
        return network.rendezvous(wanted_port)


class Process:
    """The controller's side of one ``WorkerProcess``. Its calls carry its name, for messages."""

    def __init__(
        self, name: str, cpus: float, gpus: float, stacks_file: Path, where: Where = "DEFAULT", aside: bool = False
    ) -> None:
        """Ask Ray for it.

        Args:
            stacks_file: where it writes its Python stacks when it is asked to.
            aside: it takes ``call_aside``.
        """
        self.name = name
        self.stacks = stacks_file
        stacks_file.unlink(missing_ok=True)  # of an earlier process of this name
        # With such a group Ray runs all other calls in one thread of its own, no longer in the main one.
        kind = ray.remote(concurrency_groups={ASIDE: 1})(WorkerProcess) if aside else ray.remote(WorkerProcess)
        self._actor = kind.options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy=where).remote(
            stacks_file
        )

    def construct(self, path: str, *arguments: Any) -> Pending:
        return self._pending("start", self._actor.construct.remote(path, *arguments))

    def rendezvous(self, wanted_port: int) -> Pending:
        return self._pending("start", self._actor.rendezvous.remote(wanted_port))

    def call(self, doing: str, method: str, *arguments: Any) -> Pending:
        return self._pending(doing, self._actor.call.remote(method, *arguments))

    def call_with_list(self, doing: str, method: str, items: Iterable[Any], *leading: Any) -> Pending:
        return self._pending(doing, self._actor.call_with_list.remote(method, leading, *items))

    def send(self, method: str, *arguments: Any) -> None:
        """As ``call``, but nobody waits for it."""
        self._actor.call.remote(method, *arguments)

    def call_aside(self, method: str, items: Iterable[Any], *leading: Any) -> None:
        """As ``call_with_list``, but not behind the calls made before: in a thread of its own. Nobody waits for it."""
        self._actor.call_with_list.options(concurrency_group=ASIDE).remote(method, leading, *items)

    def kill(self) -> None:
        """End it and the processes that it started, as an engine's does, even if it is stopped (SIGSTOP): then it would
        never read Ray's request, but SIGKILL ends it."""
        there = stacks.place(self.stacks)
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it may be dying
            if there and (process := there.process):
                family = [*process.children(recursive=True), process]
        ray.kill(self._actor)
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    def _pending(self, doing: str, ref: "ray.ObjectRef") -> Pending:
        return Pending(ref, self.name, doing, time.monotonic())


Starter = Callable[[str, float, float, Where], Process]
"""Starts a process, given its name, CPUs, GPUs and where; see ``control.roster``."""


def cpus_wanted(config: Config) -> float:
    learner, rollout = config.learner, config.rollout
    return (
        learner.ranks * learner.cpus_per_rank
        + rollout.workers * rollout.cpus_per_worker
        + config.reward.workers * REWARD_WORKER_CPUS
    )


def gpus_wanted(config: Config) -> float:
    learner, rollout = config.learner, config.rollout
    return learner.ranks * learner.gpus_per_rank + rollout.workers * rollout.gpus_per_worker


def start_ray(config: Config) -> None:
    """Start Ray on this machine, or join the cluster of ``cluster.address``, and check that the run fits.

    Raises:
        UserError: Ray does not start here; the cluster cannot be reached, or has fewer CPUs or GPUs than the layout
            asks for; or two learner ranks may come to share a GPU.
        Preempted: SIGTERM came while Ray started.
        KeyboardInterrupt: Ctrl-C did. Ray has started then.
    """
    # Calls that nobody waits for any more, since their process is being replaced, would show their tracebacks.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    learner = config.learner
    if learner.ranks > 1 and 0 < learner.gpus_per_rank <= 0.5:
        raise UserError(
            f"learner.gpus_per_rank={learner.gpus_per_rank:g} may put two learner ranks on one GPU, where they cannot "
            f"communicate; use more than 0.5, or learner.ranks=1"
        )
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": WORKER_ENVIRONMENT | network.worker_variables(config)},
    }
    try:
        with put_off():
            if config.cluster.address is None:
                _start_here(config, common)
            else:
                _join_cluster(config.cluster.address, common)
    except SystemExit as error:  # what ray.init makes of SIGTERM
        raise Preempted(ASKED) from error
    signal.signal(signal.SIGTERM, on_sigterm)  # ray.init has set its own
    have = ray.available_resources()
    for kind, wanted in (("CPU", cpus_wanted(config)), ("GPU", gpus_wanted(config))):
        if wanted > have.get(kind, 0) + 1e-6:
            ray.shutdown()
            raise UserError(
                f"the layout asks for {wanted:g} {kind}s but Ray has {have.get(kind, 0):g} free; lower "
                f"learner.{kind.lower()}s_per_rank, rollout.{kind.lower()}s_per_worker or the number of processes, or "
                f"add nodes"
            )


def _start_here(config: Config, common: dict[str, Any]) -> None:
    """Once more when Ray gives up, as it does after 30 seconds, which a busy machine can take."""
    # Ray puts the interpreter's path unquoted into a shell command: a checkout path with a space would hang.
    common["runtime_env"]["py_executable"] = shlex.quote(sys.executable)
    for _ in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",  # else it would join any cluster that it finds running here
                _node_ip_address=network.LOOPBACK,
                # Logical CPUs: the actors share whatever cores there are.
                num_cpus=max(int(cpus_wanted(config)) + 1, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=object_store_bytes(config.model),
                **common,
            )
            return
        except Exception as error:  # Ray has no narrower type for it
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    raise UserError(
        f"Ray did not start here within its 30 s, {START_ATTEMPTS} times over (load {os.getloadavg()[0]:.0f} on "
        f"{os.cpu_count()} cores); start the run when the machine is less busy"
    )


def _join_cluster(address: str, arguments: dict[str, Any]) -> None:
    """Join the cluster at "auto" or "host:port"."""
    complaint = UserError(
        f"no Ray cluster answers at cluster.address={address}; start one with 'ray start --head', or set "
        f"cluster.address=null to use this machine alone"
    )
    host, _, port = address.rpartition(":")
    if host and port.isdigit():  # Ray itself would try for minutes before it gives up
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError:
            raise complaint from None
    try:
        ray.init(address=address, **arguments)
    except ConnectionError:
        raise complaint from None


def start_learners(config: Config, shape: ModelShape, start: Starter, placement: LearnerPlacement) -> list[Process]:
    """One process a rank where it was placed, constructed but not built; rank 0's node holds the rendezvous.

    Raises:
        UserError: ``learner.port`` is taken on that node.
    """
    section, deadline = config.learner, config.deadlines.start
    ranks = [
        start(f"{LEARNER_NAME} {rank}", section.cpus_per_rank, section.gpus_per_rank, where)
        for rank, where in enumerate(placement.places)
    ]
    [rendezvous] = wait_for([ranks[0].rendezvous(section.port)], deadline, "start")
    if rendezvous is None:
        raise UserError(
            f"learner.port={section.port} is taken on node {placement.nodes[0]}; choose another, or 0 for any free"
        )
    wait_for(
        [
            process.construct(LEARNER, config, shape, rank, section.ranks, rendezvous)
            for rank, process in enumerate(ranks)
        ],
        deadline,
        "start",
    )
    return ranks
