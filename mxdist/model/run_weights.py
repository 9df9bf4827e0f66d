"""The model in a run's checkpoint, read from Megatron's distributed format by Hugging Face name: no Megatron, no ranks.

The format (torch_dist) is PyTorch's own, so `torch.distributed.checkpoint` reads it. A key holds one parameter of all
layers, [layers, ...] or [layers, experts, ...], whatever layout of ranks saved it; this module reads one layer's (one
expert's) matrix at a time. Which rows of it are which Hugging Face tensor is what `model.weights` defines on a live
model, and cannot say without one: the part needed here is `_PARAMETERS` and `_rows`, and a test holds it to the names
and bits that a learner exports.

Memory: two such matrices. Reading needs the whole stored shard of a matrix, however little of it is wanted.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mxdist.config.schema import ModelConfig
from mxdist.errors import UserError
from mxdist.model.shape import ModelShape

SHAPE_FILE = "model_shape.json"

_LAYER = "model.layers.{}"
_QKV = tuple(f"{_LAYER}.self_attn.{name}_proj" for name in ("q", "k", "v"))
_PARAMETERS = {
    "decoder.layers.self_attention.linear_qkv.weight": tuple(f"{name}.weight" for name in _QKV),
    "decoder.layers.self_attention.linear_qkv.bias": tuple(f"{name}.bias" for name in _QKV),
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


@dataclass(frozen=True)
class StoredMatrixPart:
    """A Hugging Face tensor: some rows of a stored matrix (or vector)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    matrix: str  # the key and the indices of its leading axes: "key 0 3"
    rows: tuple[slice, ...]


class RunWeights:
    """The model in the learner's folder of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            UserError: the checkpoint is damaged.
        """
        self.folder = folder
        self._lock = Lock()  # one matrix is read at a time: shards are large
        try:
            self._open_reader()
            self.shape = _shape(folder / SHAPE_FILE)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"the checkpoint {folder} cannot be read: {error}; choose another") from None
        except Exception as error:  # whatever unpickling a damaged file may raise
            raise UserError(
                f"the checkpoint {folder} is damaged ({type(error).__name__}: {error}); choose another"
            ) from None
        self.tensors = self._find_tensors()  # by Hugging Face name

    def cut(self, matrix: Tensor, name: str) -> Tensor:
        """A tensor's values out of those of its stored matrix, as a copy or a view."""
        parts = [matrix[rows] for rows in self.tensors[name].rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def matrix(self, place: str) -> Tensor:
        """The values of one stored matrix (or vector), in their stored dtype."""
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
                f"{key} in the checkpoint {self.folder} is missing or damaged ({type(error).__name__}: {error}); "
                f"choose another checkpoint"
            ) from None
        return target.view(sizes[len(index) :])

    def _open_reader(self) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        from mxdist.model.checkpoint_reader import CheckpointReader

        self._reader = CheckpointReader(self.folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        tensors = metadata.state_dict_metadata.items()
        self._stored = {key: entry for key, entry in tensors if isinstance(entry, TensorStorageMetadata)}

    def _find_tensors(self) -> dict[str, StoredMatrixPart]:
        return {part.name: part for key in _PARAMETERS if key in self._stored for part in self._parts_of(key)}

    def _parts_of(self, key: str) -> Iterator[StoredMatrixPart]:
        """The Hugging Face tensors of a key."""
        stored, templates = self._stored[key], _PARAMETERS[key]
        leading = templates[0].count("{}")
        sizes = tuple(stored.size)
        for index in itertools.product(*map(range, sizes[:leading])):
            for template, rows in zip(templates, self._rows(len(templates), sizes[leading]), strict=True):
                shape = (sum(part.stop - part.start for part in rows), *sizes[leading + 1 :])
                place = " ".join([key, *map(str, index)])
                yield StoredMatrixPart(template.format(*index), shape, stored.properties.dtype, place, rows)

    def _rows(self, tensors: int, rows: int) -> list[tuple[slice, ...]]:
        """Which rows of a stored matrix are which of the tensors in it, as `model.weights` has it.

        q, k and v are interleaved by group of query heads, [q.. k v] per key/value head; gate and up follow one
        another.
        """
        if tensors < 3:
            return [(slice(start, start + rows // tensors),) for start in range(0, rows, rows // tensors)]
        config = self.shape.config
        head = config.head_dim
        queries = config.num_attention_heads // config.num_key_value_heads * head
        starts = range(0, rows, queries + 2 * head)
        parts = ((0, queries), (queries, head), (queries + head, head))
        return [tuple(slice(start + first, start + first + count) for start in starts) for first, count in parts]


def _shape(file: Path) -> ModelShape:
    found = json.loads(file.read_text(encoding="utf-8"))
    config = ModelConfig(**{key: value for key, value in found.items() if key in ModelConfig.model_fields})
    stops = tuple(found["stop_token_ids"])
    return ModelShape(config, found["vocab_size"], found["bos_token_id"], stops, found["pad_token_id"])


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
