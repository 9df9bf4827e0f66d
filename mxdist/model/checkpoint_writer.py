"""Writes safetensors files tensor by tensor: what is in memory is one tensor, not a shard.

The format (huggingface.co/docs/safetensors): 8 bytes with the header's length, little-endian; the header, JSON padded
with spaces to a multiple of 8; the tensors' bytes. Its sizes are known beforehand, so nothing has to wait for values.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mxdist.model.checkpoint_files import INDEX_FILE, SINGLE_FILE

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(folder: Path, plan: list[Planned], value: Callable[[str], Tensor], shard_bytes: int) -> list[Path]:
    """Write the planned tensors, and the index when there are several files.

    Args:
        value: a tensor's values by name, of the planned shape and dtype; asked once each, in the order of the files.
        shard_bytes: of a file, unless a single tensor is larger.
    Returns:
        The safetensors files, on disk.
    """
    shards = _shards(plan, shard_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    files = [folder / name for name in names] if len(shards) > 1 else [folder / SINGLE_FILE]
    for file, shard in zip(files, shards, strict=True):
        _write_file(file, shard, value)
    if len(shards) > 1:
        weight_map = {tensor.name: file.name for file, shard in zip(files, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in plan)
        index: Mapping[str, object] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
    return files


def _shards(plan: list[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in plan:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    # Larger types first, as the safetensors library does it: every tensor is then aligned.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _write_file(file: Path, shard: list[Planned], value: Callable[[str], Tensor]) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, **dict(_entries(shard))}).encode()
    header += b" " * (-len(header) % 8)
    with open(file, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for planned in shard:
            tensor = value(planned.name)
            if (tuple(tensor.shape), tensor.dtype) != (planned.shape, planned.dtype):
                raise ValueError(f"{planned.name} is {tensor.dtype} {tuple(tensor.shape)}, planned as {planned}")
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def _entries(shard: list[Planned]) -> Iterator[tuple[str, dict[str, object]]]:
    start = 0
    for tensor in shard:
        stop = start + tensor.nbytes
        yield tensor.name, {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
