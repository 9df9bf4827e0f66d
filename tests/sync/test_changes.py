"""What changed, laid over what was there, is what there is now."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxdist.errors import RunStopped, SyncInterrupted
from mxdist.messages import Bucket, ChangedBlocks, Manifest, WeightPayload
from mxdist.sync.changes import BLOCK_BYTES, KeptBuckets, changed_blocks
from mxdist.sync.outgoing import Outgoing

BLOCKS = (3, 40, 1)  # of each bucket
MANIFEST = Manifest((), tuple(Bucket("bytes", count * BLOCK_BYTES) for count in BLOCKS))


def random_buckets(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (b.nbytes,), generator=generator, dtype=torch.uint8) for b in MANIFEST.buckets]


def send(outgoing: Outgoing, buckets: list[Tensor], version: int) -> WeightPayload:
    for bucket, new in zip(outgoing.begin(MANIFEST, "delta"), buckets, strict=True):
        bucket.copy_(new)
    return outgoing.finish({}, version, np.empty(0, dtype=np.uint64))


def arrives_as(kept: KeptBuckets, payload: WeightPayload, buckets: list[Tensor]) -> bool:
    [whole] = kept.whole([payload])
    assert isinstance(whole.buckets, tuple)
    return all(np.array_equal(a, b.numpy()) for a, b in zip(whole.buckets, buckets, strict=True))


@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 639), st.integers(1, 255))))
def test_changes_laid_over_a_version_make_the_next_one(seed: int, flips: list[tuple[int, int, int]]) -> None:
    base = random_buckets(seed)
    new = [bucket.clone() for bucket in base]
    touched: set[tuple[int, int]] = set()
    for bucket, at, flip in flips:
        new[bucket][at % len(new[bucket])] ^= flip
    for number, (old, now) in enumerate(zip(base, new, strict=True)):
        differs = (old != now).view(-1, BLOCK_BYTES).any(1)
        touched |= {(number, int(block)) for block in differs.nonzero()}
    changes = changed_blocks("before", base, new)
    for number, places in enumerate(changes.places):
        if places is not None:
            assert {(number, int(place)) for place in places} == {one for one in touched if one[0] == number}
    kept = KeptBuckets()
    first = WeightPayload(1, {}, MANIFEST, np.empty(0), tuple(b.numpy() for b in base), key="before")
    assert arrives_as(kept, first, base)
    assert arrives_as(kept, replace(first, buckets=changes, key="after"), new)


def test_a_version_is_sent_whole_once_and_then_as_its_changes() -> None:
    outgoing, kept = Outgoing(torch.device("cpu"), "learner rank 0", keep=1), KeptBuckets()
    buckets = random_buckets(0)
    first = send(outgoing, buckets, 1)
    assert first.nbytes == MANIFEST.nbytes
    assert arrives_as(kept, first, buckets)
    second = send(outgoing, buckets, 2)
    assert second.nbytes == 0
    assert arrives_as(kept, second, buckets)
    buckets[1][17] ^= 1
    third = send(outgoing, buckets, 3)
    assert third.nbytes == BLOCK_BYTES + 4
    assert arrives_as(kept, third, buckets)


def test_buckets_that_changed_nearly_everywhere_are_not_sent_with_places() -> None:
    changes = changed_blocks("", random_buckets(1), random_buckets(2))
    assert changes.places == (None, None, None)
    assert changes.nbytes == sum(bucket.nbytes for bucket in MANIFEST.buckets)


def test_an_engine_without_the_version_before_says_so_and_is_given_everything() -> None:
    outgoing = Outgoing(torch.device("cpu"), "learner rank 0", keep=1)
    send(outgoing, random_buckets(0), 1)
    second = send(outgoing, random_buckets(1), 2)
    assert isinstance(second.buckets, ChangedBlocks)
    new = KeptBuckets()
    with pytest.raises(SyncInterrupted, match="weights version 2 came as what changed since weights that this engine"):
        new.whole([second])
    assert arrives_as(new, outgoing.again(2), random_buckets(1))
    assert arrives_as(new, send(outgoing, random_buckets(2), 3), random_buckets(2))


def test_after_a_roll_back_changes_are_from_what_was_sent_last() -> None:
    outgoing, kept = Outgoing(torch.device("cpu"), "learner rank 0", keep=2), KeptBuckets()
    for version, seed in ((1, 0), (2, 1), (3, 2), (2, 3), (3, 0)):
        assert arrives_as(kept, send(outgoing, random_buckets(seed), version), random_buckets(seed))
    with pytest.raises(RunStopped, match="version 1 again, which learner rank 0 no longer holds"):
        outgoing.again(1)


def test_a_set_of_payloads_that_is_missing_one_base_leaves_nothing_to_build_on() -> None:
    ranks = [Outgoing(torch.device("cpu"), f"learner rank {rank}", keep=1) for rank in range(2)]
    kept = KeptBuckets()
    kept.whole([send(rank, random_buckets(0), 1) for rank in ranks])
    restarted = Outgoing(torch.device("cpu"), "learner rank 1", keep=1)
    send(restarted, random_buckets(0), 1)
    second = [send(ranks[0], random_buckets(1), 2), send(restarted, random_buckets(1), 2)]
    for payloads in (second, second[:1]):
        with pytest.raises(SyncInterrupted):
            kept.whole(payloads)
    whole = kept.whole([ranks[0].again(2), restarted.again(2)])
    assert all(isinstance(payload.buckets, tuple) for payload in whole)


def test_what_arrives_is_kept_in_memory_of_its_own() -> None:
    outgoing, kept = Outgoing(torch.device("cpu"), "learner rank 0", keep=1), KeptBuckets()
    first = send(outgoing, random_buckets(0), 1)
    assert isinstance(first.buckets, tuple)
    for array in first.buckets:
        array.flags.writeable = False  # as Ray brings it
    kept.whole([first])
    assert arrives_as(kept, send(outgoing, random_buckets(1), 2), random_buckets(1))
