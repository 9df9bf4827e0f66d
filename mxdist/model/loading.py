"""From a Hugging Face checkpoint into the parameters of one rank, whatever the layout: its slices alone, streamed."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mxdist.errors import UserError
from mxdist.model.checkpoint_contents import EMBEDDING, HEAD, open_checkpoint
from mxdist.model.checkpoint_files import CheckpointFiles
from mxdist.model.hf_tensors import HfTensor
from mxdist.model.shape import ModelShape

PIECE = 1 << 23
"""Elements read at a time: all the host memory that loading takes besides the parameters."""


def load_checkpoint(model: nn.Module, tensors: Sequence[HfTensor], shape: ModelShape, directory: Path) -> None:
    """Set every parameter of this rank from the safetensors of ``directory``, in the parameter's dtype.

    Raises:
        UserError: the directory is no checkpoint of ``shape`` (see ``open_checkpoint``), holds NaN or Inf, or holds an
            output layer that is not its embedding although the two are tied.
    """
    files = open_checkpoint(directory, shape)
    _check_that_all_are_set(model, tensors)
    for tensor in tensors:
        with tensor.whole(changed=True):
            _load(files, tensor, shape)


def _load(files: CheckpointFiles, tensor: HfTensor, shape: ModelShape) -> None:
    rows, *others = tensor.region
    step = max(1, PIECE // math.prod(tensor.whole_shape[1:]))  # whole rows are mapped, however few are kept
    for start in range(rows.start, rows.stop, step):
        piece = (slice(start, min(start + step, rows.stop)), *others)
        values = _finite(files, tensor.name, piece)
        if tensor.name == EMBEDDING and HEAD in files.tensors and shape.config.tie_word_embeddings:
            _require_equal(files, piece, values)
        tensor.write_rows(start - rows.start, values)


def _finite(files: CheckpointFiles, name: str, region: tuple[slice, ...]) -> Tensor:
    values = files.read(name, region)
    if values.numel() and not torch.isfinite(values.abs().amax()):  # many times as fast as asking every element
        raise UserError(f"{name} in {files.tensors[name].file} holds a NaN or Inf; fetch the file again")
    return values


def _require_equal(files: CheckpointFiles, region: tuple[slice, ...], embedding: Tensor) -> None:
    if not torch.equal(files.read(HEAD, region).to(embedding.dtype), embedding):
        raise UserError(
            f"{files.path} holds {HEAD} and a different {EMBEDDING}, but its config.json ties the two; "
            f"set tie_word_embeddings there to what was trained"
        )


def _check_that_all_are_set(model: nn.Module, tensors: Sequence[HfTensor]) -> None:
    """No parameter may stay as allocated."""
    unset = {id(tensor.parameter): tensor.parameter_size for tensor in tensors}
    for tensor in tensors:
        unset[id(tensor.parameter)] -= math.prod(tensor.shape)
    for name, parameter in model.named_parameters():
        if unset.get(id(parameter), -1) != 0:
            raise RuntimeError(f"{name} of the learner's model is not what the Hugging Face tensors make up")
