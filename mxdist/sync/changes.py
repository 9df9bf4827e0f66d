"""Of the buckets of a new version, only what differs from the version before: the transport "delta".

A block is 16 bytes: the codes of one MX block of 32. What did not change from one version to the next is not sent, and
engines keep a copy of all bytes to lay the rest over. Afterwards everything is as with whole buckets: checksums are of
all bytes, so a block that went missing is found like one that was damaged.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mxdist.errors import SyncInterrupted
from mxdist.messages import ChangedBlocks, WeightPayload
from mxdist.sync.layout import ALIGNMENT

BLOCK_BYTES = ALIGNMENT
_PLACE_BYTES = 4


def changed_blocks(key: str, base: Sequence[Tensor], new: Sequence[Tensor]) -> ChangedBlocks:
    """What turns the buckets ``base`` into ``new``: uint8 [bytes] each, whole blocks, on any device.

    Args:
        key: of ``base``, see ``WeightPayload.key``.
    """
    places, blocks = zip(*map(_difference, base, new), strict=True) if new else ((), ())
    return ChangedBlocks(key, places, blocks)


def _difference(base: Tensor, new: Tensor) -> tuple[np.ndarray | None, np.ndarray]:
    old, now = base.view(torch.int64), new.view(torch.int64)
    differs = (old != now).view(-1, BLOCK_BYTES // 8)
    found = (differs[:, 0] | differs[:, 1]).nonzero().squeeze(1)
    blocks = new.view(-1, BLOCK_BYTES)
    if len(found) * (BLOCK_BYTES + _PLACE_BYTES) >= new.numel():
        return None, blocks.cpu().numpy()
    return found.to(torch.int32).cpu().numpy(), blocks[found].cpu().numpy()


class KeptBuckets:
    """An engine's copies of what came last from each learner rank."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[np.ndarray, ...]] = {}  # by the key of the version that they are

    def whole(self, payloads: Sequence[WeightPayload]) -> list[WeightPayload]:
        """A set of payloads with whole buckets, to be read until the next call of this. Others are left as they are.

        Raises:
            SyncInterrupted: a payload says what changed since a version that was not the last one here.
        """
        before, self._kept = self._kept, {}  # after an error nothing is left of any version
        found = {payload.key: _whole(payload, before) for payload in payloads if payload.key}
        self._kept = found
        return [replace(payload, buckets=found[payload.key]) if payload.key else payload for payload in payloads]


def _whole(payload: WeightPayload, kept: dict[str, tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    changes = payload.buckets
    if isinstance(changes, tuple):
        return tuple(map(np.array, changes))  # what Ray brings is read-only, and is not held for long
    assert isinstance(changes, ChangedBlocks)
    buckets = kept.get(changes.base)
    if buckets is None:
        raise SyncInterrupted(
            f"weights version {payload.version} came as what changed since weights that this engine does not have"
        )
    for bucket, places, blocks in zip(buckets, changes.places, changes.blocks, strict=True):
        bucket.reshape(-1, BLOCK_BYTES)[slice(None) if places is None else places] = blocks
    return buckets
