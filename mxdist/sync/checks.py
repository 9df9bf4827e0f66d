"""What is computed of whole buckets, where they are: checksums of all their parts, and whether all is finite.

Both sides use it; nothing here waits for a GPU.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from mxdist.messages import BucketKind, Manifest
from mxdist.quant.checksum import Spans, checksums
from mxdist.quant.format import E8M0_NAN
from mxdist.sync.layout import VALUES

DTYPES: dict[BucketKind, torch.dtype] = {
    "codes": torch.uint8,
    "scales": torch.uint8,
    "bytes": torch.uint8,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class BucketSums:
    """The checksums that are taken of a bucket."""

    spans: Spans
    positions: np.ndarray  # int64: their places in ``Manifest.checked``


@lru_cache(maxsize=64)
def bucket_sums(manifest: Manifest) -> tuple[BucketSums, ...]:
    """For each bucket. Checksums of values that are not sent themselves are in none."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in manifest.buckets]
    position = 0
    for tensor in manifest.tensors:
        for part in tensor.checked:
            if place := tensor.parts.get(part):
                dtype = DTYPES[manifest.buckets[place.bucket].kind]
                width = unit_of(part) if dtype == torch.uint8 else dtype.itemsize
                count = prod(place.shape) * dtype.itemsize // width
                found[place.bucket].append((place.offset // width, count, position))
            position += 1
    tables = [np.array(rows, dtype=np.int64).reshape(-1, 3) for rows in found]
    return tuple(BucketSums(Spans(table[:, 0], table[:, 1]), table[:, 2]) for table in tables)


def unit_of(part: str) -> int:
    """Bytes of a value in the checksum of a part: words of codes and of floats; scales may be cut anywhere."""
    return 4 if part == VALUES or part.endswith("codes") else 1


def summable(part_or_kind: str, flat: Tensor) -> Tensor:
    """A flat buffer of one kind of part as ``quant.checksum.checksums`` takes it."""
    if flat.dtype != torch.uint8 or unit_of(part_or_kind) == 1:
        return flat
    return flat[: flat.numel() // 4 * 4].view(torch.int32)


def typed(kind: BucketKind, raw: Tensor) -> Tensor:
    """The bytes of a bucket as its elements."""
    return raw if DTYPES[kind] == torch.uint8 else raw.view(DTYPES[kind])


def sums_of_bucket(kind: BucketKind, raw: Tensor, wanted: BucketSums) -> Tensor:
    """The checksums, int64, on the bucket's device."""
    return checksums(summable(kind, typed(kind, raw)), wanted.spans)


def all_finite(kind: BucketKind, elements: Tensor) -> Tensor | None:
    """Whether elements of this kind hold no NaN and no Inf, on their device; None where every byte is a number."""
    if not elements.numel() or kind in ("codes", "bytes"):
        return None
    if kind == "scales":
        return elements.max() != E8M0_NAN
    low, high = torch.aminmax(elements)  # NaN goes through
    return torch.isfinite(low) & torch.isfinite(high)
