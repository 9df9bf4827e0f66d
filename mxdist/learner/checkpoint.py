"""Model and optimizer in Megatron's distributed checkpoint format, which can be loaded on another layout of ranks."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor, LocalShardsContainer
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner

from mxdist.errors import CheckpointFailed
from mxdist.learner import random_state
from mxdist.learner.checkpoint_folder import raise_if_other_backend, raise_if_other_model, write_small_files
from mxdist.learner.checkpoint_writers import ForkedWriter, ThreadWriter
from mxdist.learner.megatron_policy import MegatronPolicy
from mxdist.learner.pieces import Piece, pieces
from mxdist.model.checkpoint_reader import CheckpointReader, read_common
from mxdist.model.quantised_weight import forget, requantise
from mxdist.model.shape import ModelShape


class Saver:
    """Writes the checkpoints of one learner rank while it goes on training; every method is collective.

    From the second save on, the plan is the first's, and no rank asks another for anything but whether it can write.
    """

    def __init__(self, policy: MegatronPolicy, shape: ModelShape, forks: bool | None = None) -> None:
        """
        Args:
            forks: whether a forked process writes, or a thread; None: as ``checkpoint_writers`` says of the device.
        """
        self._policy = policy
        self._shape = shape
        self._strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True),
            _data_parallel_group(),
            do_cache_distribution=True,
        )
        forks = not torch.cuda.is_available() if forks is None else forks
        self._writer = ForkedWriter() if forks else ThreadWriter()
        self._pieces: list[Piece] = []
        self._begun = 0

    def begin(self, directory: Path) -> None:
        """Start to write into the existing, empty ``directory``, when what was begun before is finished.

        Raises:
            CheckpointFailed: it cannot be written, on all ranks.
        """
        if self._writer.calls.get_num_unfinalized_calls():
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
            request = self._writer.take(request, {piece.index: piece.values() for piece in self._pieces})
        self._writer.calls.schedule_async_request(request)
        self._begun += 1

    def finished(self, wait: bool) -> bool:
        """Whether all ranks have written what they began. ``wait`` until they have.

        Raises:
            CheckpointFailed: a rank could not write, on all ranks.
        """
        try:
            self._writer.calls.maybe_finalize_async_calls(blocking=wait)
        except CheckpointException as error:
            # Megatron raises on all ranks, and tells rank 0 alone why.
            own = next((str(failure[0]) for failure in error.failures.values()), "")
            reasons: list[str] = [""] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(reasons, own)
            raise CheckpointFailed(f"the learner's checkpoint could not be written: {max(reasons)}") from None
        return not self._writer.calls.get_num_unfinalized_calls()


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
