"""Checkpoints of the DeepSpeed learner: DeepSpeed's own files, and the weights as safetensors beside them.

    learner/
        deepspeed/          what DeepSpeed's ``save_checkpoint`` writes: weights and optimizer state, by rank (pickles)
        weights/            the weights by Hugging Face name, for whoever has no DeepSpeed
        zero.json           how many ranks wrote it, and the ZeRO stage
        model_shape.json    which model it is
        random_N.*          the random state of rank N

As many ranks as wrote them load DeepSpeed's files as they are. Others load its universal form, which is made for the
time of the loading. Another stage is refused: DeepSpeed cannot load what stages 1 and 2 wrote, all tensors in a row, as
stage 3, which divides each.
"""

import argparse
import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal

from mxdist.errors import CheckpointFailed
from mxdist.learner import random_state
from mxdist.learner.checkpoint_folder import (
    ZERO_FILE,
    raise_if_other_backend,
    raise_if_other_model,
    raise_if_other_stage,
    write_small_files,
)
from mxdist.learner.zero_policy import ZeroPolicy
from mxdist.model.checkpoint_writer import Planned, write_checkpoint
from mxdist.model.hf_tensors import HfTensor
from mxdist.model.quantised_weight import forget, requantise
from mxdist.model.run_safetensors import WEIGHTS
from mxdist.model.shape import ModelShape

TAG = "deepspeed"
SHARD_BYTES = 4 << 30


def save(directory: Path, policy: ZeroPolicy, tensors: Sequence[HfTensor], shape: ModelShape) -> None:
    """Write into the existing, empty ``directory``; returns when everything is written.

    Raises:
        CheckpointFailed: it cannot be written.
    """
    write_small_files(directory, shape)
    try:
        policy.engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
        _write_weights(directory / WEIGHTS, tensors)
        if torch.distributed.get_rank() == 0:
            (directory / ZERO_FILE).write_text(json.dumps(_layout(policy)) + "\n")
    except OSError as error:
        raise CheckpointFailed(f"the learner's checkpoint could not be written: {error}") from None


def load(directory: Path, policy: ZeroPolicy, shape: ModelShape) -> None:
    """Replace the weights and the optimizer's state; its settings stay those of the configuration.

    Raises:
        UserError: the checkpoint is of a model of another shape, of another backend, or of a stage that this cannot
            load.
    """
    raise_if_other_backend(directory, "deepspeed")
    raise_if_other_model(directory, shape)
    saved, here = json.loads((directory / ZERO_FILE).read_text()), _layout(policy)
    raise_if_other_stage(directory, here["zero_stage"])
    settings = [{**group, "params": None} for group in policy.engine.optimizer.param_groups]
    forget(policy.model)
    if saved == here:
        policy.engine.load_checkpoint(str(directory), tag=TAG)
    else:
        _load_universal(directory, policy)
    for group, own in zip(policy.engine.optimizer.param_groups, settings, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})
    requantise(policy.model)
    random_state.load(directory)


def _load_universal(directory: Path, policy: ZeroPolicy) -> None:
    """Through DeepSpeed's universal form, which is made beside ``directory`` and removed again."""
    engine, form = policy.engine, directory.with_name(f"{directory.name}.universal")
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(form, ignore_errors=True)
        arguments = argparse.Namespace(
            input_folder=str(directory / TAG),
            output_folder=str(form / TAG),
            num_extract_workers=1,  # more would be processes, of a process that holds a model
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it shows bars
            ds_to_universal.main(arguments)
    torch.distributed.barrier()
    engine._config.load_universal_checkpoint = True  # the key checkpoint.load_universal, for this one loading
    try:
        engine.load_checkpoint(str(form), tag=TAG)
    finally:
        engine._config.load_universal_checkpoint = False
    for state in engine.basic_optimizer.state.values():
        # Stage 3 of DeepSpeed 0.19.8 gives all of them one tensor, and each would count on in it.
        state["step"] = state["step"].clone()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(form, ignore_errors=True)


def _write_weights(folder: Path, tensors: Sequence[HfTensor]) -> None:
    """Rank 0 writes, tensor by tensor; the others take part in putting each together, in the same order."""
    if torch.distributed.get_rank() != 0:
        for tensor in tensors:
            with tensor.whole():
                pass
        return
    folder.mkdir()
    by_name = {tensor.name: tensor for tensor in tensors}

    def value(name: str) -> torch.Tensor:
        with by_name[name].whole():
            return by_name[name].read().to("cpu", copy=True)

    plan = [Planned(tensor.name, tensor.whole_shape, tensor.parameter.dtype) for tensor in tensors]
    write_checkpoint(folder, plan, value, SHARD_BYTES)


def _layout(policy: ZeroPolicy) -> dict[str, int]:
    return {"ranks": torch.distributed.get_world_size(), "zero_stage": policy.engine.zero_optimization_stage()}
