"""Hugging Face checkpoints as files: safetensors, one or sharded with an index. No torch until values are read.

The safetensors library judges the files and says what they hold. It would map a file of any size privately and whole,
which a machine refuses when the file is larger than its memory; so values are read through read-only maps of single
tensors, at the offsets that the header gives (8 bytes of length, then JSON). Nothing but safetensors and JSON is ever
opened: no pickle, no code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from mxdist.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

Region = tuple[slice, ...]
"""One slice with start and stop per axis of a stored tensor."""

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}
_INTEGERS = {"F64": np.int64, "F32": np.int32, "F16": np.int16, "BF16": np.int16, "U8": np.uint8}
"""Bits are read as integers of that size: numpy has no bfloat16."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Where a tensor lies. ``dtype`` is safetensors' name, such as BF16."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int  # bytes from the start of the file


class CheckpointFiles:
    """A safetensors file, or a directory of them. ``read`` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Read the headers of all files.

        Raises:
            UserError: a file is missing, truncated or no safetensors file, or there is none; the message names it.
        """
        self.path = path
        self.tensors: dict[str, FileTensor] = {}  # in the order of files and of their bytes
        for file, names in _files(path):
            for tensor in _header(file, names):
                if tensor.name in self.tensors:
                    raise UserError(
                        f"{tensor.name} is in {self.tensors[tensor.name].file} and in {file}, and no {INDEX_FILE} says "
                        f"which counts; remove one of them"
                    )
                self.tensors[tensor.name] = tensor

    def read(self, name: str, region: Region) -> Tensor:
        """A copy of a region of a tensor, in its stored dtype.

        Mapped pages count as memory of the process until this returns, so ask for some tens of megabytes at a time.
        """
        import torch

        tensor = self.tensors[name]
        integers = _INTEGERS[tensor.dtype]
        stored = np.memmap(tensor.file, integers, mode="r", offset=tensor.offset, shape=tensor.shape)
        return torch.from_numpy(np.array(stored[region])).view(getattr(torch, _TORCH_NAMES[tensor.dtype]))


def is_huggingface(path: Path) -> bool:
    """True for a .safetensors file and for a directory with an index or with such files in it."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return (path / INDEX_FILE).is_file() or any(path.glob("*.safetensors"))


def _header(file: Path, expected: set[str] | None) -> list[FileTensor]:
    """What a file holds of the expected tensors, in the order of their bytes."""
    with _checked(file) as handle:
        names = handle.offset_keys()
        if expected is not None and (lacking := sorted(expected.difference(names))):
            raise UserError(f"{file} lacks {lacking[0]}, which {INDEX_FILE} says is in it; copy both files again")
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return [
        FileTensor(
            name,
            tuple(header[name]["shape"]),
            header[name]["dtype"],
            file,
            8 + length + header[name]["data_offsets"][0],
        )
        for name in names
        if expected is None or name in expected
    ]


def _files(path: Path) -> list[tuple[Path, set[str] | None]]:
    """The files to read, each with the names to expect in it (None: whatever it holds)."""
    if path.is_file():
        return [(path, None)]
    if (path / INDEX_FILE).is_file():
        names: dict[str, set[str]] = {}
        for tensor, file in _weight_map(path / INDEX_FILE).items():
            names.setdefault(file, set()).add(tensor)
        return [(path / file, names[file]) for file in sorted(names)]
    if (path / SINGLE_FILE).is_file():
        return [(path / SINGLE_FILE, None)]
    if found := [(file, None) for file in sorted(path.glob("*.safetensors"))]:
        return list(found)
    pickled = any(path.glob("*.bin"))
    what = "only pickled weights (*.bin), which are never opened" if pickled else "no safetensors files"
    raise UserError(f"{path} holds {what}; give a directory with safetensors")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values()):
            return weight_map
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{index} is no index of safetensors shards (a JSON object with a weight_map); copy it again")


def _checked(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="np")
    except FileNotFoundError:
        raise UserError(f"the shard {file} is missing; copy it again, or give another directory") from None
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or no safetensors file ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
