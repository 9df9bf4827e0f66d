"""Limits and space of this machine: shared memory, open files, disk, host memory."""

from pathlib import Path

from mxdist.config.model_costs import LEAST_OBJECT_STORE, object_store_bytes
from mxdist.config.schema import Config, RunConfig
from mxdist.doctor.activations import element_bytes
from mxdist.doctor.findings import Finding, failure, ok, warning
from mxdist.doctor.memory import sync_bytes
from mxdist.doctor.model_size import engine

MIB, GIB = 2**20, 2**30
NCCL_SHARED = 64 * MIB  # what containers give unless told otherwise, and too little for NCCL
OPEN_FILES, FEWEST_OPEN_FILES = 65_536, 1024
SYNC_COPIES = 2  # of the weights on their way: the ranks' own, and Ray's


def checkpoint_bytes(config: Config) -> int:
    """Model and optimizer, as Megatron writes them."""
    element = element_bytes(config)
    return engine(config).total * (element + (12 if element < 4 else 8))


def checkpoints_at_once(run: RunConfig) -> int:
    """The most that lie on the disk: those that are kept, and the one that is being written."""
    steps = sorted({0, run.steps, *range(0, run.steps, run.checkpoint_every or run.steps)})
    if not run.keep_checkpoints:
        return len(steps)
    newest = min(run.keep_checkpoints + 1, len(steps))
    return newest + sum(run.keep_every > 0 and step % run.keep_every == 0 for step in steps[:-newest])


def existing_parent(path: Path) -> Path:
    """``path``, or the nearest folder around it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_shared_memory(free: int, config: Config | None, on_gpu: bool) -> Finding:
    """/dev/shm holds Ray's object store, hence every weight sync, and NCCL's buffers between GPUs of a machine."""
    shown = f"{free / GIB:.1f} GiB free in /dev/shm"
    if on_gpu and free <= NCCL_SHARED:
        return failure("shared memory", f"{shown}; NCCL needs more", "start the container with --shm-size=16g or more")
    joins = config is not None and config.cluster.address is not None
    store = 0 if joins else object_store_bytes(config.model) if config else LEAST_OBJECT_STORE
    if free < store:
        return warning(
            "shared memory",
            f"{shown}; Ray's object store wants {store / GIB:.1f} GiB and would use the disk instead",
            f"start the container with --shm-size={-(-store // GIB) + 1}g or more",
        )
    return ok("shared memory", shown)


def check_open_files(limit: int) -> Finding:
    if limit < FEWEST_OPEN_FILES:
        return failure("open files", f"the limit is {limit}; Ray needs thousands", f"ulimit -n {OPEN_FILES}")
    if limit < 4 * FEWEST_OPEN_FILES:
        return warning(
            "open files", f"the limit is {limit}, little for Ray with many workers", f"ulimit -n {OPEN_FILES}"
        )
    return ok("open files", f"limit {limit}")


def check_disk(free: int, writable: bool, folder: Path, config: Config | None) -> Finding:
    """Room for checkpoints where the run directory will be."""
    if not writable:
        return failure("disk", f"{folder} cannot be written", "choose another run.dir")
    shown = f"{free / GIB:.1f} GiB free in {folder}"
    if config is None:
        return ok("disk", shown)
    one, count = checkpoint_bytes(config), checkpoints_at_once(config.run)
    if free < one:
        return failure("disk", f"{shown}; a checkpoint is {one / GIB:.1f} GiB", "choose another run.dir or free space")
    if free < count * one:
        return warning(
            "disk",
            f"{shown}; {count} checkpoints are {count * one / GIB:.1f} GiB",
            "lower run.keep_checkpoints, raise run.checkpoint_every, choose another run.dir or free space",
        )
    return ok("disk", f"{shown}; {count} checkpoint{'s' if count > 1 else ''} of {one / GIB:.2f} GiB")


def check_host_memory(available: int, config: Config) -> Finding:
    """Host memory of a run on GPUs: the weights on their way to the engines, those that engines keep there, and the
    state that a checkpoint is written from while training goes on (DeepSpeed's is written at once; over several
    machines each has a part)."""
    kept = config.rollout.workers * config.rollout.tensor_parallel if config.sync.transport == "delta" else 0
    sync = (SYNC_COPIES + kept) * sync_bytes(config)
    alone = config.learner.backend == "megatron" and config.cluster.address is None
    state = checkpoint_bytes(config) if alone else 0
    shown = f"{available / GIB:.1f} GiB available; a weight sync takes {sync / GIB:.2f} GiB"
    if state:
        shown += f", a checkpoint under way {state / GIB:.2f} GiB"
    if sync + state > available:
        return failure("host memory", shown, "use a machine with more memory, or several")
    return ok("host memory", shown)
