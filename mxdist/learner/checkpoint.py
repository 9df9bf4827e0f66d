"""Model and optimizer in Megatron's distributed checkpoint format, which can be loaded on another layout of ranks."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)

from mxdist.errors import UserError
from mxdist.learner.policy import Policy
from mxdist.model.quantised_weight import forget, requantise
from mxdist.model.shape import ModelShape

SHAPE_FILE = "model_shape.json"
SHARDING = "fully_reshardable"


def save(directory: Path, policy: Policy, shape: ModelShape) -> None:
    """Write into the existing, empty ``directory``; every rank must call it."""
    state = {**_sharded_state(policy, is_loading=False), "step": policy.updates}
    strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), _data_parallel_group())
    dist_checkpointing.save(state, str(directory), strategy)
    if torch.distributed.get_rank() == 0:
        (directory / SHAPE_FILE).write_text(json.dumps(_description(shape), indent=2) + "\n")
    torch.distributed.barrier()


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
