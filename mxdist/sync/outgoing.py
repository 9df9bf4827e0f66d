"""The sending side of a weight sync: buckets on the learner's device, filled in few operations, and what is sent.

host    the bytes, in numpy arrays that Ray carries through its object store; from a GPU over pinned memory
ipc     handles of buckets that stay on the GPU (``shared``)
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mxdist.messages import Manifest, SharedBuckets, Transport, WeightPayload
from mxdist.sync.checks import bucket_sums, sums_of_bucket
from mxdist.sync.shared import handle_of

_WIDE = 8  # bytes that are copied as one number where everything allows it


@dataclass
class _Buckets:
    """Buffers of one version."""

    tensors: list[Tensor]  # uint8 [bytes] each, on the device
    stamp: Tensor  # int64 [1]: the version they hold
    handles: tuple[bytes, ...] = ()
    stamp_handle: bytes = b""


class Outgoing:
    """The buckets of one learner rank.

    Args:
        device: where they are filled.
        owner: the rank, in words.
        keep: how many versions engines may still ask for when they are shared.
    """

    def __init__(self, device: torch.device, owner: str, keep: int) -> None:
        self.device = device
        self._owner, self._keep, self._process = owner, keep, uuid.uuid4().hex
        self._ring: list[_Buckets] = []
        self._pinned: list[Tensor] = []
        self._count = 0

    def begin(self, manifest: Manifest, transport: Transport) -> list[Tensor]:
        """Buckets to be filled: new ones on a CPU, on a GPU those that have been used the longest ago."""
        self._started = time.perf_counter()
        self._manifest, self._transport = manifest, transport
        if self.device.type == "cpu":
            self._buckets = self._new()
        else:
            slots = self._keep if transport == "ipc" else 1
            if len(self._ring) < slots:
                self._ring.append(self._new())
            self._buckets = self._ring[self._count % slots]
            self._count += 1
        self._buckets.stamp.fill_(-1)
        return self._buckets.tensors

    def finish(self, recipes: dict[str, object], version: int, values: np.ndarray) -> WeightPayload:
        """The payload of the buckets as they are now. ``values``: the checksums that are not of their bytes, uint64."""
        found, wanted = self._buckets, bucket_sums(self._manifest)
        sums = [
            sums_of_bucket(bucket.kind, raw, of_bucket)
            for bucket, raw, of_bucket in zip(self._manifest.buckets, found.tensors, wanted, strict=True)
        ]
        found.stamp.fill_(version)
        checksums = values.copy()
        if sums:
            positions = np.concatenate([of_bucket.positions for of_bucket in wanted])
            checksums[positions] = torch.cat(sums).cpu().numpy().view(np.uint64)  # waits for all that went before
        buckets = self._shared() if self._transport == "ipc" else self._on_host()
        seconds = time.perf_counter() - self._started
        return WeightPayload(version, recipes, self._manifest, checksums, buckets, seconds)

    def _new(self) -> _Buckets:
        tensors = [
            torch.zeros(bucket.nbytes, dtype=torch.uint8, device=self.device) for bucket in self._manifest.buckets
        ]
        return _Buckets(tensors, torch.zeros(1, dtype=torch.int64, device=self.device))

    def _shared(self) -> SharedBuckets:
        found = self._buckets
        if not found.stamp_handle:
            found.handles = tuple(handle_of(tensor) for tensor in found.tensors)
            found.stamp_handle = handle_of(found.stamp)
        torch.cuda.synchronize(self.device)
        return SharedBuckets(self._owner, self._process, found.handles, found.stamp_handle)

    def _on_host(self) -> tuple[np.ndarray, ...]:
        if self.device.type == "cpu":
            return tuple(tensor.numpy() for tensor in self._buckets.tensors)
        if not self._pinned:
            sizes = [bucket.nbytes for bucket in self._manifest.buckets]
            self._pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
        for host, tensor in zip(self._pinned, self._buckets.tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        torch.cuda.synchronize(self.device)
        return tuple(host.numpy() for host in self._pinned)


@dataclass
class Copies:
    """Copies of bytes into buckets, always the same ones, from tensors that may move between runs.

    Pieces that lie in a row on both sides are copied as one.
    """

    sources: np.ndarray  # int64 [pieces]: which of the tensors a run is given
    starts: np.ndarray  # int64 [pieces]: bytes from the tensor's first
    sizes: np.ndarray  # int64 [pieces]: bytes
    buckets: np.ndarray  # int64 [pieces]
    offsets: np.ndarray  # int64 [pieces]: bytes from the bucket's first

    def __post_init__(self) -> None:
        order = np.lexsort((self.offsets, self.buckets))
        for name in ("sources", "starts", "sizes", "buckets", "offsets"):
            setattr(self, name, getattr(self, name)[order])

    def run(self, buckets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Copy. ``tensors`` must be contiguous."""
        if not len(self.sources):
            return
        addresses = np.fromiter((tensor.data_ptr() for tensor in tensors), np.int64, len(tensors))[self.sources]
        addresses += self.starts
        joined = (self.buckets[1:] == self.buckets[:-1]) & (np.diff(self.offsets) == self.sizes[:-1])
        joined &= np.diff(addresses) == self.sizes[:-1]
        first = np.flatnonzero(np.concatenate(([True], ~joined)))
        sizes = np.add.reduceat(self.sizes, first)
        pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {torch.int64: ([], []), torch.uint8: ([], [])}
        ends = np.append(first[1:], len(self.sizes))
        for begin, end, size in zip(first.tolist(), ends.tolist(), sizes.tolist(), strict=True):
            source = tensors[self.sources[begin]]
            start = source.storage_offset() * source.element_size() + int(self.starts[begin])
            inside = start + size <= source.untyped_storage().nbytes()
            # Neighbours in memory that are not of one storage are copied one by one.
            for piece in [slice(begin, end)] if inside else [slice(i, i + 1) for i in range(begin, end)]:
                self._append(pairs, buckets, tensors, piece.start, int(self.sizes[piece].sum()))
        for targets, origins in pairs.values():
            if targets:
                torch._foreach_copy_(targets, origins)

    def _append(
        self,
        pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]],
        buckets: Sequence[Tensor],
        tensors: Sequence[Tensor],
        piece: int,
        size: int,
    ) -> None:
        source, bucket = tensors[self.sources[piece]], buckets[self.buckets[piece]]
        start = source.storage_offset() * source.element_size() + int(self.starts[piece])
        target = bucket.storage_offset() + int(self.offsets[piece])
        wide = (start | target | size) % _WIDE == 0
        dtype = torch.int64 if wide else torch.uint8
        targets, origins = pairs[dtype]
        targets.append(_window(bucket, dtype, target, size))
        origins.append(_window(source, dtype, start, size))


def _window(tensor: Tensor, dtype: torch.dtype, start: int, nbytes: int) -> Tensor:
    """Some bytes of a tensor's storage, as numbers of ``dtype``."""
    width = dtype.itemsize
    window = torch.empty(0, dtype=dtype, device=tensor.device)
    return window.set_(tensor.untyped_storage(), start // width, (nbytes // width,), (1,))
