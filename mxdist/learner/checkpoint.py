"""Model and optimizer in Megatron's distributed checkpoint format, which can be loaded on another layout of ranks."""

import contextlib
import ctypes
import os
import signal
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor, LocalShardsContainer
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner

from mxdist.errors import CheckpointFailed
from mxdist.learner import random_state
from mxdist.learner.checkpoint_folder import raise_if_other_backend, raise_if_other_model, write_small_files
from mxdist.learner.megatron_policy import MegatronPolicy
from mxdist.learner.pieces import Piece, pieces
from mxdist.model.checkpoint_reader import CheckpointReader, read_common
from mxdist.model.quantised_weight import forget, requantise
from mxdist.model.shape import ModelShape

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Saver:
    """Writes the checkpoints of one learner rank while it goes on training; every method is collective.

    ``begin`` forks a process that writes: the child's memory is the state of that moment (tensors on a GPU are copied
    to the host first). From the second save on, the plan is the first's, and no rank asks another for anything but
    whether it can write.
    """

    def __init__(self, policy: MegatronPolicy, shape: ModelShape) -> None:
        self._policy = policy
        self._shape = shape
        self._strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True),
            _data_parallel_group(),
            do_cache_distribution=True,
        )
        self._writers = AsyncCallsQueue(persistent=False)
        self._pieces: list[Piece] = []
        self._begun = 0

    def begin(self, directory: Path) -> None:
        """Start to write into the existing, empty ``directory``, when what was begun before is finished.

        Raises:
            CheckpointFailed: it cannot be written, on all ranks.
        """
        if self._writers.get_num_unfinalized_calls():
            raise RuntimeError("a checkpoint is begun while another is being written")
        write_small_files(directory, self._shape, get_cuda_rng_tracker().get_states())
        self._pieces = self._pieces or list(pieces(self._policy))
        state = {str(number): piece.place for number, piece in enumerate(self._pieces)}
        request = dist_checkpointing.save(
            {**state, "step": self._policy.updates},
            str(directory),
            self._strategy,
            validate_access_integrity=self._begun == 0,
            async_sharded_save=True,
        )
        if request.async_fn is not None:
            rank, buckets, results = request.async_fn_args
            buckets = _with_values(buckets, {piece.index: piece.values() for piece in self._pieces})
            request = request._replace(
                async_fn=partial(_in_child, request.async_fn),
                async_fn_args=[rank, buckets, results],
                preload_fn=None,
            )
        self._writers.schedule_async_request(request)
        self._begun += 1

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


def _with_values(buckets: list[Any], values: dict[tuple[str, tuple[int, ...]], torch.Tensor]) -> list[Any]:
    """What Megatron's writer has planned to write, [(file, name, (objects, tensors))], with the values in the places
    of the tensors: on the host from now on, and each copied out of what it is a view of when its turn comes."""

    def on_host(item: Any) -> torch.Tensor:
        return values[item.index.fqn, tuple(item.index.offset)].to("cpu", non_blocking=True)

    staged = [
        (file, name, (objects, [(item, on_host(item)) for item, _ in planned]))
        for file, name, (objects, planned) in buckets
    ]
    torch.cuda.synchronize()
    return [
        (file, name, (objects, ((item, tensor.clone()) for item, tensor in tensors)))
        for file, name, (objects, tensors) in staged
    ]


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


def load(directory: Path, policy: MegatronPolicy, shape: ModelShape) -> None:
    """Replace the weights and the optimizer's state.

    The number of ranks and the expert parallelism may differ from those that saved. What the optimizer is told by
    the configuration (weight decay, betas, ...) stays as it is here.

    Raises:
        UserError: the checkpoint is of a model of another shape.
    """
    raise_if_other_backend(directory, "megatron")
    raise_if_other_model(directory, shape)
    step = read_common(directory)["step"]
    reader = CheckpointReader(directory)
    reader.read_metadata()  # refused by all ranks alike, before any of them waits for another
    with torch.no_grad():
        forget(policy.model)
        targets: dict[str, list[CheckpointableShardedTensor]] = defaultdict(list)
        for piece in pieces(policy):
            target = replace(piece.place, data=piece.values())
            targets[piece.place.key].append(CheckpointableShardedTensor.from_sh_ten(target))
        torch.distributed.checkpoint.load(
            {key: LocalShardsContainer(boxes) for key, boxes in targets.items()},
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )
        for group in policy.optimizer.param_groups:
            group["step"] = step
        requantise(policy.model)
    if tracked := random_state.load(directory):
        get_cuda_rng_tracker().set_states(tracked)


def _data_parallel_group() -> torch.distributed.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
