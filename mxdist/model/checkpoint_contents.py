"""Is a directory of safetensors a checkpoint of this model? By names, shapes and types in the headers. No torch."""

from pathlib import Path

from mxdist.errors import UserError
from mxdist.model.checkpoint_files import CheckpointFiles
from mxdist.model.shape import ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("BF16", "F32", "F16")


def open_checkpoint(directory: Path, shape: ModelShape) -> CheckpointFiles:
    """The files, after comparing what they hold with what the model needs.

    A checkpoint with tied embeddings may hold the output layer as well; whether it equals the embedding is for the one
    who reads the values.

    Raises:
        UserError: tensors are missing, or there are some that the model does not have, or one is of another shape or of
            a type that is not a floating-point type; or a file is damaged.
    """
    files = CheckpointFiles(directory)
    wanted = shape.tensor_shapes()
    if shape.config.tie_word_embeddings and HEAD in files.tensors:
        wanted[HEAD] = wanted[EMBEDDING]
    if missing := [name for name in wanted if name not in files.tensors]:
        raise UserError(
            f"{directory} lacks {missing[0]} ({_count(missing)} missing) that its config.json asks for; "
            f"give a complete checkpoint"
        )
    if extra := [name for name in files.tensors if name not in wanted]:
        raise UserError(
            f"{directory} holds {extra[0]} ({_count(extra)} too many), which no model of its config.json has; "
            f"give a checkpoint of the architecture that it names"
        )
    for name, size in wanted.items():
        tensor = files.tensors[name]
        if tensor.shape != size:
            raise UserError(
                f"{name} in {tensor.file} has the shape {list(tensor.shape)}, but by config.json it is {list(size)}; "
                f"one of the two files belongs to another model"
            )
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{name} in {tensor.file} is of type {tensor.dtype}; give a checkpoint in {', '.join(FLOATS)}"
            )
    return files


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
