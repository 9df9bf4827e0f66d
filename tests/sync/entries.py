"""Payloads put together tensor by tensor, where the learner fills buckets (``mxdist.learner.export``)."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxdist.messages import BUCKET_DTYPES, BucketKind, TensorEntry, WeightPayload
from mxdist.quant.tensor import MXTensor
from mxdist.sync.layout import VALUES, Outline, arrange, bytes_kind, in_matrix_order
from mxdist.sync.payload import part_checksum


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as a numpy array, bfloat16 as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def dense_entry(name: str, tensor: Tensor) -> TensorEntry:
    """Entry of a tensor that stays in high precision (float32 or bfloat16, any shape), as the learner holds it."""
    return TensorEntry(
        name, "dense", tuple(tensor.shape), {VALUES: as_array(tensor)}, {VALUES: part_checksum(VALUES, tensor)}
    )


def mx_entry(name: str, packed: MXTensor, values: Tensor) -> TensorEntry:
    """Entry of a quantised tensor.

    Args:
        packed: the bytes that are sent.
        values: of packed.shape and the model's dtype: what the learner's GEMM multiplies. Only its checksum is sent;
            the engine dequantises the bytes and must arrive at the same.
    """
    parts = packed.parts()
    checksums = {part: part_checksum(part, tensor) for part, tensor in (parts | {VALUES: values}).items()}
    return TensorEntry(name, "mx", packed.shape, {part: as_array(tensor) for part, tensor in parts.items()}, checksums)


def payload_of(version: int, recipes: dict[str, object], entries: Iterable[TensorEntry]) -> WeightPayload:
    """Put a payload together from arrays, as it stands: nothing is checked, checksums are those of the entries."""
    entries = in_matrix_order(entries)
    manifest = arrange(map(_outline, entries))
    buckets = tuple(np.zeros(bucket.nbytes, np.uint8) for bucket in manifest.buckets)
    for tensor, entry in zip(manifest.tensors, entries, strict=True):
        for part, place in tensor.parts.items():
            data = np.ascontiguousarray(entry.parts[part]).reshape(-1).view(np.uint8)
            buckets[place.bucket][place.offset : place.offset + len(data)] = data
    sums = [value for entry in entries for value in entry.checksums.values()]
    return WeightPayload(version, recipes, manifest, np.array(sums, dtype=np.uint64), buckets)


def _outline(entry: TensorEntry) -> Outline:
    by_dtype: dict[np.dtype[Any], BucketKind] = {dtype: kind for kind, dtype in BUCKET_DTYPES.items()}
    parts = {
        part: (bytes_kind(part) if array.dtype == np.uint8 else by_dtype[array.dtype], array.shape)
        for part, array in entry.parts.items()
    }
    return Outline(entry.name, entry.kind, entry.shape, parts, tuple(entry.checksums))
