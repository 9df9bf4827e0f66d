"""The sending side of a weight sync: buckets on the learner's device, filled in few operations, and what is sent.

host        the bytes, in numpy arrays that Ray carries through its object store; from a GPU over pinned memory
delta       of those bytes the blocks that are not as in the version before (``changes``); at first all
ipc         handles of buckets that stay on the GPU (``shared``)
a meeting   its name: the buckets stay, and are broadcast from there (``broadcast``)
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mxdist.errors import RunStopped
from mxdist.messages import (
    BroadcastBuckets,
    ChangedBlocks,
    Manifest,
    Meeting,
    SharedBuckets,
    Transport,
    WeightPayload,
)
from mxdist.sync.broadcast import Sender
from mxdist.sync.changes import changed_blocks
from mxdist.sync.checks import bucket_sums, sums_of_bucket
from mxdist.sync.layout import versions_held
from mxdist.sync.shared import handle_of

_WIDE = 8  # bytes that are copied as one number where everything allows it


@dataclass
class _Buckets:
    """Buffers of one version."""

    tensors: list[Tensor]  # uint8 [bytes] each, on the device
    stamp: Tensor  # int64 [1]: the version they hold
    key: str = ""  # names what they hold, see ``WeightPayload``
    handles: tuple[bytes, ...] = ()
    stamp_handle: bytes = b""
    payload: WeightPayload | None = None  # that was made of them last


class Outgoing:
    """The buckets of one learner rank.

    Args:
        device: where they are filled.
        owner: the rank, in words.
        keep: how many versions engines may still ask for when buckets stay here, or when they are sent parts of them.
    """

    def __init__(self, device: torch.device, owner: str, keep: int) -> None:
        self.device = device
        self._owner, self._keep, self._process = owner, keep, uuid.uuid4().hex
        self._sender = Sender(device, owner)
        self._ring: list[_Buckets] = []
        self._before: _Buckets | None = None  # what a delta starts from
        self._pinned: list[Tensor] = []
        self._count = 0

    def begin(self, manifest: Manifest, transport: Transport) -> list[Tensor]:
        """Buckets to be filled: new ones on a CPU, on a GPU those that have been used the longest ago."""
        self._started = time.perf_counter()
        self._manifest, self._transport = manifest, transport
        slots = versions_held(transport, self._keep)
        if self.device.type == "cpu":
            self._buckets = self._new()
            self._ring = [] if transport in ("host", "ipc") else [*self._ring, self._buckets][-slots:]
        else:
            if len(self._ring) < slots:
                self._ring.append(self._new())
            self._buckets = self._ring[self._count % slots]
        self._count += 1
        self._buckets.key = f"{self._process}/{self._count}"
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
        buckets = self._send(found)
        seconds = time.perf_counter() - self._started
        for kept in self._ring:  # after a roll-back versions come again, with other weights
            if kept.payload is not None and kept.payload.version >= version:
                kept.payload = None
        key = found.key if self._transport == "delta" else ""
        found.payload = WeightPayload(version, recipes, self._manifest, checksums, buckets, seconds, key)
        return found.payload

    def again(self, version: int) -> WeightPayload:
        """A version that is kept here, once more, through the host. RunStopped when its buckets hold another by now."""
        for kept in self._ring:
            if kept.payload is not None and kept.payload.version == version:
                return replace(kept.payload, buckets=self._on_host(kept))
        raise RunStopped(
            f"an engine has to be given weights version {version} again, which {self._owner} no longer holds; set "
            f"sync.transport=host, which keeps every version until it is loaded"
        )

    def _send(self, found: _Buckets) -> tuple[np.ndarray, ...] | ChangedBlocks | SharedBuckets | BroadcastBuckets:
        """What a payload brings of these buckets."""
        if isinstance(self._transport, Meeting):
            if found.tensors:
                self._sender.send(self._transport, found.tensors)
            return BroadcastBuckets(self._owner, self._transport)
        if self._transport == "ipc":
            return self._shared()
        if self._transport == "host":
            return self._on_host(found)
        before, self._before = self._before, found
        return self._on_host(found) if before is None else changed_blocks(before.key, before.tensors, found.tensors)

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

    def _on_host(self, found: _Buckets) -> tuple[np.ndarray, ...]:
        if self.device.type == "cpu":
            return tuple(tensor.numpy() for tensor in found.tensors)
        if not self._pinned:
            sizes = [bucket.nbytes for bucket in self._manifest.buckets]
            self._pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
        for host, tensor in zip(self._pinned, found.tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        torch.cuda.synchronize(self.device)
        return tuple(host.numpy() for host in self._pinned)


Pairs = dict[torch.dtype, tuple[list[Tensor], list[Tensor]]]
"""Targets and sources of copies, by the dtype that both are seen as."""


class Copies:
    """Copies of bytes into buckets, always the same ones, from tensors that may move between runs.

    Pieces that lie in a row on both sides are copied as one, and all of them in few launches.

    Args:
        pieces: int64 [pieces, 5]: number of the tensor among those that a run is given, bytes from its first, bytes to
            copy, bucket, bytes from the bucket's first.
        lasting: whether the tensors live as long as this does, so that what was found out of them may be kept, for
            buckets that do so too: those on a GPU.
    """

    def __init__(self, pieces: np.ndarray, lasting: bool) -> None:
        order = np.lexsort((pieces[:, 4], pieces[:, 3]))
        self._sources, self._starts, self._sizes, self._buckets, self._offsets = pieces[order].T
        self._lasting = lasting
        self._kept: dict[tuple[int, ...], tuple[np.ndarray, Pairs]] = {}  # by addresses of the buckets

    def run(self, buckets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Copy. ``tensors`` must be contiguous."""
        if not len(self._sources):
            return
        addresses = np.fromiter((tensor.data_ptr() for tensor in tensors), np.int64, len(tensors))
        place = tuple(bucket.data_ptr() for bucket in buckets)
        known = self._kept.get(place)
        if known is not None and np.array_equal(known[0], addresses):
            pairs = known[1]
        else:
            pairs = self._pairs(buckets, tensors, addresses[self._sources] + self._starts)
            if self._lasting and buckets[0].device.type != "cpu":
                self._kept[place] = addresses, pairs
        for targets, sources in pairs.values():
            if targets:
                torch._foreach_copy_(targets, sources)

    def _pairs(self, buckets: Sequence[Tensor], tensors: Sequence[Tensor], addresses: np.ndarray) -> Pairs:
        joined = (self._buckets[1:] == self._buckets[:-1]) & (np.diff(self._offsets) == self._sizes[:-1])
        joined &= np.diff(addresses) == self._sizes[:-1]
        first = np.flatnonzero(np.concatenate(([True], ~joined)))
        sizes, ends = np.add.reduceat(self._sizes, first), np.append(first[1:], len(self._sizes))
        pairs: Pairs = {torch.int64: ([], []), torch.uint8: ([], [])}
        for begin, end, size in zip(first.tolist(), ends.tolist(), sizes.tolist(), strict=True):
            source = tensors[self._sources[begin]]
            start = source.storage_offset() * source.element_size() + int(self._starts[begin])
            if start + size <= source.untyped_storage().nbytes():
                self._append(pairs, buckets, source, begin, start, size)
                continue
            for piece in range(begin, end):  # neighbours in memory that are not of one storage
                source = tensors[self._sources[piece]]
                start = source.storage_offset() * source.element_size() + int(self._starts[piece])
                self._append(pairs, buckets, source, piece, start, int(self._sizes[piece]))
        return pairs

    def _append(
        self, pairs: Pairs, buckets: Sequence[Tensor], source: Tensor, piece: int, start: int, size: int
    ) -> None:
        bucket = buckets[self._buckets[piece]]
        target = bucket.storage_offset() + int(self._offsets[piece])
        dtype = torch.int64 if (start | target | size) % _WIDE == 0 else torch.uint8
        targets, sources = pairs[dtype]
        targets.append(_window(bucket, dtype, target, size))
        sources.append(_window(source, dtype, start, size))


def _window(tensor: Tensor, dtype: torch.dtype, start: int, nbytes: int) -> Tensor:
    """Some bytes of a tensor's storage, as numbers of ``dtype``."""
    width = dtype.itemsize
    window = torch.empty(0, dtype=dtype, device=tensor.device)
    return window.set_(tensor.untyped_storage(), start // width, (nbytes // width,), (1,))
