"""Hugging Face checkpoints: safetensors, in one file or in shards with an index. No config.json is needed.

The safetensors library judges the files and says what they hold. It would map a file of any size privately and whole,
which a machine refuses when the file is larger than its memory; so values are read through read-only maps of single
tensors, at the offsets that the header gives (8 bytes of length, then JSON).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mxdist.decomposition.source import Read, Region, Source, StoredTensor
from mxdist.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PORTION = 1 << 23
"""Elements: 16 MiB of BF16. Mapped pages count as memory of the process, so maps do not live longer than that."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {8: np.int64, 4: np.int32, 2: np.int16}  # numpy has no bfloat16: bits are read as integers of that size


class HuggingFaceSource(Source):
    """A safetensors file, or a directory of them."""

    portion_elements = PORTION

    def __init__(self, path: Path) -> None:
        """Read the headers of all files.

        Raises:
            UserError: a file is missing, truncated or no safetensors file; the message names it.
        """
        self.title = str(path)
        self._offsets: dict[str, int] = {}  # in bytes, by tensor name
        self.tensors = [tensor for file, names in _files(path) for tensor in self._header(file, names)]
        self._stored = {tensor.name: tensor for tensor in self.tensors}

    @contextmanager
    def open(self, place: str) -> Iterator[Read]:
        """Yields the function that copies a region of a tensor out of the file."""

        def read(name: str, region: Region) -> torch.Tensor:
            tensor = self._stored[name]
            integers = _INTEGERS[tensor.element_bytes]
            stored = np.memmap(place, integers, mode="r", offset=self._offsets[name], shape=tensor.shape)
            return torch.from_numpy(np.array(stored[region])).view(_DTYPES[tensor.dtype])

        yield read

    def _header(self, file: Path, expected: set[str] | None) -> list[StoredTensor]:
        """What a file holds of the expected tensors, in the order of their bytes."""
        with _checked(file) as handle:
            names = handle.offset_keys()
            if expected is not None and (lacking := sorted(expected.difference(names))):
                raise UserError(f"{file} lacks {lacking[0]}, which {INDEX_FILE} says is in it; copy both files again")
            chosen = [name for name in names if expected is None or name in expected]
            slices = ((name, handle.get_slice(name)) for name in chosen)
            tensors = [
                StoredTensor(name, tuple(part.get_shape()), part.get_dtype(), str(file)) for name, part in slices
            ]
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        self._offsets.update({name: 8 + length + header[name]["data_offsets"][0] for name in chosen})
        return tensors


def is_huggingface(path: Path) -> bool:
    """True for a .safetensors file and for a directory with an index or with such files in it."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return (path / INDEX_FILE).is_file() or any(path.glob("*.safetensors"))


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
    return [(file, None) for file in sorted(path.glob("*.safetensors"))]


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
        raise UserError(f"the shard {file} is missing; copy it again, or give another PATH") from None
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or no safetensors file ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
