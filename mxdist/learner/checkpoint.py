"""Model and optimizer in Megatron's distributed checkpoint format, which can be loaded on another layout of ranks."""

import contextlib
import ctypes
import json
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from mxdist.errors import CheckpointFailed, UserError
from mxdist.learner import random_state
from mxdist.learner.policy import Policy
from mxdist.model.quantised_weight import forget, requantise
from mxdist.model.shape import ModelShape

SHAPE_FILE = "model_shape.json"
SHARDING = "fully_reshardable"
PROBE_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Saver:
    """Writes the checkpoints of one learner rank while it goes on training; every method is collective.

    ``begin`` takes what the checkpoint is to hold and forks a process that writes it: the child's memory is the state
    of that moment (of tensors on a GPU it is given copies). What is planned for the first is kept for the others.
    """

    def __init__(self, policy: Policy, shape: ModelShape) -> None:
        self._policy = policy
        self._shape = shape
        self._strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True),
            _data_parallel_group(),
            do_cache_distribution=True,
        )
        self._writers = AsyncCallsQueue(persistent=False)
        self._begun = 0

    def begin(self, directory: Path) -> None:
        """Start to write into the existing, empty ``directory``.

        Raises:
            CheckpointFailed: it cannot be written, on all ranks.
        """
        _raise_unless_writable(directory)
        state = {**_sharded_state(self._policy, is_loading=False), "step": self._policy.updates}
        request = dist_checkpointing.save(
            state,
            str(directory),
            self._strategy,
            validate_access_integrity=self._begun == 0,
            async_sharded_save=True,
        )
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(_in_child, request.async_fn))
        self._writers.schedule_async_request(request)
        self._begun += 1
        random_state.save(directory)
        if torch.distributed.get_rank() == 0:
            (directory / SHAPE_FILE).write_text(json.dumps(_description(self._shape), indent=2) + "\n")

    def finished(self, wait: bool) -> bool:
        """Whether all ranks have written what they began. ``wait`` until they have.

        Raises:
            CheckpointFailed: a rank could not write, on all ranks.
        """
        try:
            self._writers.maybe_finalize_async_calls(blocking=wait)
        except CheckpointException as error:
            # Megatron raises on all ranks, and tells rank 0 alone why.
            own = next((str(failure[0]) for failure in error.failures.values()), "")
            reasons: list[str] = [""] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(reasons, own)
            raise CheckpointFailed(f"the learner's checkpoint could not be written: {max(reasons)}") from None
        return not self._writers.get_num_unfinalized_calls()


def _in_child(write: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Write in the forked process, which must not outlive or impersonate its parent.

    It closes the sockets it has inherited: while it held them, nobody would learn of the parent's death.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                os.close(int(entry))
    write(*arguments, **options)


def _raise_unless_writable(directory: Path) -> None:
    """CheckpointFailed on all ranks when any of them cannot write: alone, it would leave the others waiting."""
    reason = ""
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        reason = f"{error.strerror} in {directory}"
    failures = torch.tensor(int(bool(reason)), device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(failures)
    if failures:
        raise CheckpointFailed(f"the learner's checkpoint could not be written: {reason or 'see another rank'}")


def load(directory: Path, policy: Policy, shape: ModelShape) -> None:
    """Replace the weights and the optimizer's state.

    The number of ranks and the expert parallelism may differ from those that saved. What the optimizer is told by
    the configuration (weight decay, betas, ...) stays as it is here.

    Raises:
        UserError: the checkpoint is of a model of another shape.
    """
    _raise_if_other_model(directory, shape)
    with torch.no_grad():
        forget(policy.model)
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(directory)), _data_parallel_group()
        )
        state = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(directory), strategy)
        policy.model.load_state_dict(state["model"])
        for index, part in enumerate(policy.optimizer.chained_optimizers):
            settings = part.state_dict()["optimizer"]
            for group in settings["param_groups"]:
                group["step"] = state["step"]
            part.load_state_dict(
                {"optimizer": settings, "param_state": state["optimizer"][index], "param_state_sharding_type": SHARDING}
            )
        requantise(policy.model)
    random_state.load(directory)


def _sharded_state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    """The tensors, as Megatron divides them.

    Of the optimizer only its tensors: with expert parallelism Megatron chains two optimizers, without it there is
    one, and the rest of their state would tie a checkpoint to the one or the other.
    """
    metadata = {
        "distrib_optim_sharding_type": SHARDING,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "dp_cp_group": _data_parallel_group(),
    }
    model = policy.model.sharded_state_dict(metadata=metadata)
    parts = policy.optimizer.chained_optimizers
    return {
        "model": model,
        "optimizer": {
            index: part.sharded_state_dict(model, is_loading, metadata=metadata)["param_state"]
            for index, part in enumerate(parts)
        },
    }


def _data_parallel_group() -> torch.distributed.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _description(shape: ModelShape) -> dict[str, object]:
    description = {**shape.config.model_dump(), **{k: v for k, v in asdict(shape).items() if k != "config"}}
    return json.loads(json.dumps(description))  # as it reads when it comes back: lists, not tuples


def _raise_if_other_model(directory: Path, shape: ModelShape) -> None:
    saved, wanted = json.loads((directory / SHAPE_FILE).read_text()), json.loads(json.dumps(_description(shape)))
    # How weights were first drawn, and in which type they are computed with, is not part of a model's shape.
    keys = [key for key in wanted if key not in ("initializer_range", "dtype") and saved.get(key) != wanted[key]]
    if keys:
        differences = ", ".join(f"{key} {saved.get(key)} there and {wanted[key]} here" for key in keys)
        raise UserError(
            f"the checkpoint {directory} is of another model ({differences}); use the settings it was made with"
        )
