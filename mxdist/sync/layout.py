"""How tensors are laid out in the buckets of a payload. No torch.

A bucket holds one part of many tensors, in one dtype, so that a check of all its bytes is one operation. Tensors that
an engine keeps in one matrix (q, k and v; gate and up; the experts of a layer) lie next to each other in the matrix's
order, so that a matrix is copied with few operations.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

from mxdist.messages import BUCKET_DTYPES, Bucket, BucketKind, Manifest, PartPlace, TensorKind, TensorPlace
from mxdist.model.linear_names import matrix_name

VALUES = "values"
"""The part of a dense tensor; in checksums also the values that a GEMM reads, in float32 form."""
BUCKET_BYTES = 256 << 20
"""Most bytes of a bucket, unless one part alone has more."""
ALIGNMENT = 16
"""Bytes: parts begin, and buckets end, at multiples of it."""
_EXPERT = re.compile(r"\.experts\.\d+\.")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_Named)


@dataclass(frozen=True)
class Outline:
    """A tensor that is to be sent: everything but its bytes."""

    name: str
    kind: TensorKind
    shape: tuple[int, ...]
    parts: dict[str, tuple[BucketKind, tuple[int, ...]]]
    checked: tuple[str, ...]  # see ``TensorPlace``


def versions_held(transport: object, keep: int) -> int:
    """Versions of its buckets that a learner rank on a GPU holds.

    Args:
        transport: a ``Transport``.
        keep: how many engines may still ask for, of a transport that leaves buckets with the learner.
    """
    return 1 if transport == "host" else max(2, keep) if transport == "delta" else keep


def bytes_kind(part: str) -> BucketKind:
    """The kind of bucket for a part of a packed tensor."""
    return "codes" if part.endswith("codes") else "scales" if part.endswith("scales") else "bytes"


def in_matrix_order(named: Iterable[Named]) -> list[Named]:
    """Tensors of one matrix next to each other, otherwise in the order given."""
    groups: dict[str, list[Named]] = {}
    for one in named:
        groups.setdefault(_matrix(one.name), []).append(one)
    return [one for group in groups.values() for one in group]


def arrange(outlines: Iterable[Outline], bucket_bytes: int = BUCKET_BYTES) -> Manifest:
    """Give every part its place, in the order given."""
    buckets: list[Bucket] = []
    latest: dict[tuple[str, BucketKind], int] = {}  # by part, so that those of one matrix stay together
    tensors = []
    for outline in outlines:
        parts = {}
        for part, (kind, shape) in outline.parts.items():
            size = prod(shape) * BUCKET_DTYPES[kind].itemsize
            number = latest.get((part, kind))
            start = 0 if number is None else buckets[number].nbytes
            if number is None or start + size > bucket_bytes:
                number, start = len(buckets), 0
                latest[part, kind] = number
                buckets.append(Bucket(kind, 0))
            buckets[number] = Bucket(kind, -(-(start + size) // ALIGNMENT) * ALIGNMENT)
            parts[part] = PartPlace(number, start, tuple(shape))
        tensors.append(TensorPlace(outline.name, outline.kind, outline.shape, parts, outline.checked))
    return Manifest(tuple(tensors), tuple(buckets))


def _matrix(name: str) -> str:
    """What the tensors that an engine keeps in one matrix have in common."""
    module, dot, leaf = name.rpartition(".")
    return _EXPERT.sub(".experts.", matrix_name(module)) + dot + leaf
