"""From a Hugging Face checkpoint into the parameters of one rank, whatever the layout: its slices alone, streamed."""

import math
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from mxdist.errors import UserError
from mxdist.model.checkpoint_contents import EMBEDDING, HEAD, open_checkpoint
from mxdist.model.checkpoint_files import CheckpointFiles
from mxdist.model.shape import ModelShape
from mxdist.model.weights import HfTensor, hf_tensors

PIECE = 1 << 23
"""Elements read at a time: all the host memory that loading takes besides the parameters."""


def load_checkpoint(model: GPTModel, shape: ModelShape, directory: Path) -> None:
    """Set every parameter of this rank from the safetensors of ``directory``, in the parameter's dtype.

    Raises:
        UserError: the directory is no checkpoint of ``shape`` (see ``open_checkpoint``), holds NaN or Inf, or holds an
            output layer that is not its embedding although the two are tied.
    """
    files = open_checkpoint(directory, shape)
    tensors = list(hf_tensors(model, shape))
    _check_that_all_are_set(model, tensors)
    for tensor in tensors:
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


def _check_that_all_are_set(model: GPTModel, tensors: list[HfTensor]) -> None:
    """No parameter may stay as allocated."""
    written: dict[int, int] = {}
    for tensor in tensors:
        written[id(tensor.parameter)] = written.get(id(tensor.parameter), 0) + math.prod(tensor.shape)
    for name, parameter in model.named_parameters():
        if written.get(id(parameter), 0) != parameter.numel():
            raise RuntimeError(f"{name} of the Megatron model is not what the Hugging Face tensors make up")
