"""The model of a run, read from Megatron's distributed checkpoint by Hugging Face name: no Megatron, no process group.

The format (torch_dist) is PyTorch's own, so `torch.distributed.checkpoint` reads it. A key holds one parameter of all
layers, [layers, ...] or [layers, experts, ...]; this module reads one layer's (one expert's) matrix at a time. Which
rows of it are which Hugging Face tensor is what `model.weights` defines on a live model, and cannot say without one:
the part needed here is `_PARAMETERS` and `_rows`, and a test holds it to the names and bits that a learner exports.

Memory: two such matrices. Reading needs the whole stored shard of a matrix, however little of it is wanted.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mxdist.decomposition.source import Read, Region, Source, StoredTensor
from mxdist.errors import UserError

CONFIG_FILE = "config.yaml"
METADATA_FILE = ".metadata"
SHAPE_FILE = "model_shape.json"
LEARNER_FOLDER = "learner"

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_LAYER = "model.layers.{}"
_PARAMETERS = {
    "decoder.layers.self_attention.linear_qkv.weight": tuple(
        f"{_LAYER}.self_attn.{name}_proj.weight" for name in ("q", "k", "v")
    ),
    "decoder.layers.self_attention.linear_proj.weight": (f"{_LAYER}.self_attn.o_proj.weight",),
    "decoder.layers.self_attention.q_layernorm.weight": (f"{_LAYER}.self_attn.q_norm.weight",),
    "decoder.layers.self_attention.k_layernorm.weight": (f"{_LAYER}.self_attn.k_norm.weight",),
    "decoder.layers.mlp.linear_fc1.weight": (f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"),
    "decoder.layers.mlp.linear_fc2.weight": (f"{_LAYER}.mlp.down_proj.weight",),
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": (
        f"{_LAYER}.mlp.experts.{{}}.gate_proj.weight",
        f"{_LAYER}.mlp.experts.{{}}.up_proj.weight",
    ),
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": (f"{_LAYER}.mlp.experts.{{}}.down_proj.weight",),
    "decoder.layers.mlp.router.weight": (f"{_LAYER}.mlp.gate.weight",),
    "decoder.layers.input_layernorm.weight": (f"{_LAYER}.input_layernorm.weight",),
    "decoder.layers.pre_mlp_layernorm.weight": (f"{_LAYER}.post_attention_layernorm.weight",),
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
"""Megatron's key -> the Hugging Face tensors in it; the gaps are the indices of the leading axes, layer and expert."""


class RunSource(Source):
    """The newest checkpoint of a run directory, or the one whose directory (checkpoints/step_N) is given."""

    portion_elements = sys.maxsize  # a matrix is read once, whole

    def __init__(self, path: Path) -> None:
        """Read the metadata.

        Raises:
            UserError: there is no complete checkpoint, or it is damaged.
        """
        self._folder = _learner_folder(path)
        self.title = f"{path} ({self._folder.parent.name})"
        self._lock = Lock()  # one matrix is read at a time: shards are large
        try:
            self._open_reader()
            self._heads, self._groups, self._head_dim = _attention_shape(self._folder / SHAPE_FILE)
        except OSError as error:
            raise UserError(f"the checkpoint {self._folder} cannot be read: {error}; choose another") from None
        except Exception as error:  # whatever unpickling a damaged file may raise
            raise UserError(
                f"the checkpoint {self._folder} is damaged ({type(error).__name__}: {error}); choose another"
            ) from None
        self._parts: dict[str, tuple[slice, ...]] = {}  # rows of the stored matrix, by Hugging Face name
        self.tensors = [tensor for key in _PARAMETERS if key in self._stored for tensor in self._tensors_of(key)]

    @contextmanager
    def open(self, place: str) -> Iterator[Read]:
        """Read one stored matrix; yields the function that cuts Hugging Face tensors out of it."""
        matrix = self._matrix(place)

        def read(name: str, region: Region) -> Tensor:
            parts = [matrix[rows] for rows in self._parts[name]]
            return (parts[0] if len(parts) == 1 else torch.cat(parts))[region]

        yield read

    def _open_reader(self) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self._reader = FileSystemReader(self._folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        tensors = metadata.state_dict_metadata.items()
        self._stored = {key: entry for key, entry in tensors if isinstance(entry, TensorStorageMetadata)}

    def _tensors_of(self, key: str) -> Iterator[StoredTensor]:
        """The Hugging Face tensors of a key. Their place is the key and the indices of the matrix: "key 0 3"."""
        stored, templates = self._stored[key], _PARAMETERS[key]
        dtype = _DTYPES.get(stored.properties.dtype, str(stored.properties.dtype))
        leading = templates[0].count("{}")
        sizes = tuple(stored.size)
        for index in itertools.product(*map(range, sizes[:leading])):
            for template, rows in zip(templates, self._rows(len(templates), sizes[leading]), strict=True):
                name = template.format(*index)
                self._parts[name] = rows
                shape = (sum(part.stop - part.start for part in rows), *sizes[leading + 1 :])
                yield StoredTensor(name, shape, dtype, " ".join([key, *map(str, index)]))

    def _rows(self, tensors: int, rows: int) -> list[tuple[slice, ...]]:
        """Which rows of a stored matrix are which of the tensors in it, as `model.weights` has it.

        q, k and v are interleaved by group of query heads, [q.. k v] per key/value head; gate and up follow one
        another.
        """
        if tensors < 3:
            return [(slice(start, start + rows // tensors),) for start in range(0, rows, rows // tensors)]
        head = self._head_dim
        queries = self._heads // self._groups * head
        starts = range(0, rows, queries + 2 * head)
        parts = ((0, queries), (queries, head), (queries + head, head))
        return [tuple(slice(start + first, start + first + count) for start in starts) for first, count in parts]

    def _matrix(self, place: str) -> Tensor:
        """The values of one stored matrix (or vector)."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner import LoadPlan
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        key, *index = place.split()
        stored = self._stored[key]
        sizes = torch.Size([*(1 for _ in index), *stored.size[len(index) :]])
        offsets = torch.Size([*map(int, index), *(0 for _ in stored.size[len(index) :])])
        box = ChunkStorageMetadata(offsets, sizes)
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        plan = LoadPlan(create_read_items_for_chunk_list(key, stored, [box]))
        try:
            with self._lock:
                self._reader.read_data(plan, _into(target)).wait()
        except Exception as error:  # a missing or truncated file, seen by the file system, by pickle or by torch
            raise UserError(
                f"{key} in the checkpoint {self._folder} is missing or damaged ({type(error).__name__}: {error}); "
                f"choose another checkpoint"
            ) from None
        return target.view(sizes[len(index) :])


def is_run(path: Path) -> bool:
    """True for a run directory and for one checkpoint in it."""
    return any((path / part).exists() for part in (CONFIG_FILE, "checkpoints", f"{LEARNER_FOLDER}/{METADATA_FILE}"))


def _learner_folder(path: Path) -> Path:
    if (path / LEARNER_FOLDER / METADATA_FILE).is_file():
        return path / LEARNER_FOLDER
    folders = (path / "checkpoints").glob("step_*")
    steps = {int(match[1]): folder for folder in folders if (match := re.fullmatch(r"step_(\d+)", folder.name))}
    if not steps:
        raise UserError(f"the run {path} has no complete checkpoint yet; wait for one, or give another PATH")
    return steps[max(steps)] / LEARNER_FOLDER


def _attention_shape(file: Path) -> tuple[int, int, int]:
    shape = json.loads(file.read_text(encoding="utf-8"))
    return shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]


def _into(target: Tensor) -> Any:
    """A load planner whose destination is one tensor."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.planner import ReadItem

    class Planner(DefaultLoadPlanner):
        def resolve_tensor(self, read_item: ReadItem) -> Tensor:
            box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
            return target[tuple(slice(start, start + length) for start, length in box)]

        def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
            pass

    return Planner()
