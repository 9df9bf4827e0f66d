"""Weight payloads: from tensors to what crosses a process boundary, and back.

A payload is a manifest and a few buckets of bytes (``layout``). The buckets are numpy arrays, which Ray carries through
its object store, or stay on the learner's GPU (``shared``). Dense tensors travel as float32 or as bfloat16, whichever
the sender holds. Checksums of values are taken of their float32 form, the same for both.

Tensor by tensor (``TensorEntry``) a payload is taken apart and put together where speed does not matter.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxdist.errors import ParityError
from mxdist.messages import BUCKET_DTYPES, BucketKind, Manifest, TensorEntry, WeightPayload
from mxdist.quant.checksum import checksum
from mxdist.quant.tensor import MXTensor
from mxdist.sync.checks import unit_of
from mxdist.sync.layout import VALUES, Outline, arrange, bytes_kind, in_matrix_order


class PartSums(Mapping[str, dict[str, int]]):
    """Checksums by tensor and part, of one or several manifests. A dictionary is made of them only when it is read."""

    def __init__(self, manifests: Sequence[Manifest], sums: Sequence[np.ndarray]) -> None:
        """``sums``: uint64, in the order of each manifest's ``checked``."""
        self.manifests, self.sums = tuple(manifests), tuple(sums)
        self.seconds: dict[str, float] = {}  # of an engine: what its phases took

    def __getitem__(self, name: str) -> dict[str, int]:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return sum(len(manifest.tensors) for manifest in self.manifests)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PartSums) and self.manifests == other.manifests:
            return all(map(np.array_equal, self.sums, other.sums))
        return isinstance(other, Mapping) and self._by_name == dict(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[object, ...]:
        return PartSums, (self.manifests, self.sums), {"seconds": self.seconds}

    @cached_property
    def _by_name(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for manifest, sums in zip(self.manifests, self.sums, strict=True):
            for (name, part), value in zip(manifest.checked, sums.tolist(), strict=True):
                found.setdefault(name, {})[part] = value
        return found


def part_checksum(part: str, tensor: Tensor) -> int:
    """Checksum of one part, as payloads carry it."""
    return checksum(tensor.float() if part == VALUES else tensor, unit=unit_of(part))


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
    if tuple(values.shape) != packed.shape:
        raise ValueError(f"{name}: the learner's values are {tuple(values.shape)}; the packed tensor is {packed.shape}")
    parts = packed.parts()
    checksums = {part: part_checksum(part, tensor) for part, tensor in (parts | {VALUES: values}).items()}
    return TensorEntry(name, "mx", packed.shape, {part: as_array(tensor) for part, tensor in parts.items()}, checksums)


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as a numpy array, bfloat16 as uint16. TypeError for other dtypes than are ever sent."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype not in (torch.float32, torch.uint8):
        raise TypeError(f"weights are sent as float32, bfloat16 or packed uint8, not as {tensor.dtype}")
    return tensor.numpy()


def as_tensor(array: np.ndarray) -> Tensor:
    """Inverse of ``as_array``: a tensor on the array's memory. Read it only: the array may be shared and read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


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


def gather_entries(payloads: Iterable[WeightPayload]) -> dict[str, TensorEntry]:
    """All ranks' entries by name. ParityError when two ranks send the same tensor."""
    payloads = list(payloads)
    refuse_repeats(payload.manifest for payload in payloads)
    return {entry.name: entry for payload in payloads for entry in payload.entries}


def learner_checksums(payloads: Iterable[WeightPayload]) -> PartSums:
    """Checksums of what the learner computes with, of all ranks together."""
    payloads = list(payloads)
    return PartSums([payload.manifest for payload in payloads], [payload.checksums for payload in payloads])


def refuse_repeats(manifests: Iterable[Manifest]) -> None:
    """ParityError when a tensor is sent twice."""
    seen: set[str] = set()
    for manifest in manifests:
        for tensor in manifest.tensors:
            if tensor.name in seen:
                raise ParityError(f"the learner sent {tensor.name} twice; each tensor must come from one rank")
            seen.add(tensor.name)
