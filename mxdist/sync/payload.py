"""Weight payloads, as they cross a process boundary: their arrays as tensors again, and their checksums.

A payload is a manifest and a few buckets of bytes (``layout``). The buckets are numpy arrays, which Ray carries through
its object store, or stay on the learner's GPU (``shared``). Dense tensors travel as float32 or as bfloat16, whichever
the sender holds. Checksums of values are taken of their float32 form, the same for both.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mxdist.errors import ParityError
from mxdist.messages import Manifest, WeightPayload
from mxdist.quant.checksum import checksum
from mxdist.sync.checks import unit_of
from mxdist.sync.layout import VALUES


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


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the array's memory; uint16 is bfloat16. Read it only: the array may be shared and read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


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
