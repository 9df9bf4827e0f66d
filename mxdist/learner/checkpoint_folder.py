"""The learner's folder of a checkpoint, whatever the backend: whether it can be written, and of which model it is."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mxdist.config.schema import LearnerConfig
from mxdist.errors import CheckpointFailed, UserError
from mxdist.learner import random_state
from mxdist.model.run_weights import SHAPE_FILE
from mxdist.model.shape import ModelShape

ZERO_FILE = "zero.json"  # of the DeepSpeed learner alone
PROBE_BYTES = 1 << 20


def write_small_files(directory: Path, shape: ModelShape, tracked: Mapping[str, Tensor] | None = None) -> None:
    """Which model the folder is of, and this rank's random state (``random_state``).

    CheckpointFailed on all ranks when any of them cannot write: alone, it would leave the others waiting.
    """
    reason = ""
    try:
        random_state.save(directory, tracked)
        if torch.distributed.get_rank() == 0:
            (directory / SHAPE_FILE).write_text(json.dumps(_description(shape), indent=2) + "\n")
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()  # not as far as the disk, for which training would stand still
    except OSError as error:
        reason = f"{error.strerror} in {directory}"
    except SafetensorError as error:
        reason = f"{error} in {directory}"
    failures = torch.tensor(int(bool(reason)), device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(failures)
    if failures:
        raise CheckpointFailed(f"the learner's checkpoint could not be written: {reason or 'see another rank'}")


def raise_if_unfit(directory: Path, section: LearnerConfig, shape: ModelShape) -> None:
    """What a learner refuses to load, found without one: UserError when the folder is of another backend, of another
    stage of ZeRO, or of another model.
    """
    raise_if_other_backend(directory, section.backend)
    if section.backend == "deepspeed":
        raise_if_other_stage(directory, section.zero_stage)
    raise_if_other_model(directory, shape)


def raise_if_other_backend(directory: Path, backend: str) -> None:
    """UserError when the folder was written with another ``learner.backend``."""
    writer = "deepspeed" if (directory / ZERO_FILE).exists() else "megatron"
    if writer != backend:
        raise UserError(
            f"the checkpoint {directory} was written with learner.backend={writer}, which {backend} cannot go on from; "
            f"set learner.backend={writer}"
        )


def raise_if_other_stage(directory: Path, stage: int) -> None:
    """UserError when DeepSpeed wrote the folder with another stage of ZeRO, which it cannot load."""
    saved = json.loads((directory / ZERO_FILE).read_text())["zero_stage"]
    if saved != stage:
        raise UserError(
            f"the checkpoint {directory} was written with learner.zero_stage={saved}, which cannot go on as "
            f"learner.zero_stage={stage}; set it to {saved}"
        )


def raise_if_other_model(directory: Path, shape: ModelShape) -> None:
    """UserError when the folder holds another model than ``shape``."""
    saved, wanted = json.loads((directory / SHAPE_FILE).read_text()), _description(shape)
    # Where weights came from or how they were drawn, and in which type they are computed with, is not a model's shape.
    other = ("path", "initializer_range", "dtype")
    keys = [key for key in wanted if key not in other and saved.get(key) != wanted[key]]
    if keys:
        differences = ", ".join(f"{key} {saved.get(key)} there and {wanted[key]} here" for key in keys)
        raise UserError(
            f"the checkpoint {directory} is of another model ({differences}); use the settings it was made with"
        )


def _description(shape: ModelShape) -> dict[str, object]:
    description = {**shape.config.model_dump(), **{k: v for k, v in asdict(shape).items() if k != "config"}}
    return json.loads(json.dumps(description))  # as it reads when it comes back: lists, not tuples
