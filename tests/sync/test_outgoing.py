"""Buckets are filled with the bytes that lie where they are read, however those are strewn over memory."""

import numpy as np
import pytest
import torch

from mxdist.errors import RunStopped
from mxdist.messages import Manifest, Meeting
from mxdist.sync.outgoing import Copies, Outgoing


def pieces(*rows: tuple[int, int, int, int, int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


def test_neighbours_of_one_storage_are_copied_together_and_others_too() -> None:
    together = torch.arange(64, dtype=torch.uint8)
    first, second, other = together[:24], together[24:40], torch.arange(100, 124, dtype=torch.uint8)
    copies = Copies(pieces((0, 0, 24, 0, 0), (1, 0, 16, 0, 24), (2, 3, 7, 0, 40), (2, 8, 16, 1, 0)), lasting=False)
    buckets = [torch.zeros(48, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)]
    copies.run(buckets, [first, second, other])
    assert torch.equal(buckets[0], torch.cat([together[:40], other[3:10], torch.zeros(1, dtype=torch.uint8)]))
    assert torch.equal(buckets[1], other[8:24])


def test_tensors_that_have_moved_since_are_read_where_they_are() -> None:
    copies = Copies(pieces((0, 0, 16, 0, 0)), lasting=True)
    bucket = torch.zeros(16, dtype=torch.uint8)
    for start in (0, 5, 5):
        source = torch.arange(start, start + 16, dtype=torch.uint8)
        copies.run([bucket], [source])
        source += 1
        copies.run([bucket], [source])
        assert torch.equal(bucket, source)


def test_every_export_fills_its_own_buckets_and_keeps_none_of_those_before() -> None:
    copies = Copies(pieces((0, 0, 4096, 1, 0)), lasting=True)
    source = torch.zeros(4096, dtype=torch.uint8)
    held = []
    for value in range(1, 12):
        source.fill_(value)
        # The first bucket, into which nothing is copied here, may come to lie where an earlier one did.
        buckets = [torch.zeros(4096, dtype=torch.uint8) for _ in range(2)]
        copies.run(buckets, [source])
        assert buckets[1].tolist() == source.tolist()
        held.append(buckets[1])
        del buckets
    assert not copies._kept


def test_neighbours_in_memory_of_two_storages_are_not_read_past_the_end_of_the_first() -> None:
    memory = np.arange(32, dtype=np.uint8)
    first, second = torch.from_numpy(memory[:16]), torch.from_numpy(memory[16:])
    bucket = torch.zeros(32, dtype=torch.uint8)
    Copies(pieces((0, 0, 16, 0, 0), (1, 0, 16, 0, 16)), lasting=False).run([bucket], [first, second])
    assert bucket.tolist() == list(range(32))


def test_a_version_that_came_again_after_a_roll_back_is_given_as_it_is_now() -> None:
    outgoing = Outgoing(torch.device("cpu"), "learner rank 0", keep=3)
    meeting = Meeting("127.0.0.1:1", generation=0, number=0, receivers=1, arrival=1, transfer=1)
    for number, version in enumerate((5, 6, 7, 6)):
        outgoing.begin(Manifest((), ()), meeting)
        outgoing.finish({"number": number}, version, np.empty(0, dtype=np.uint64))
    assert outgoing.again(6).recipes == {"number": 3}
    with pytest.raises(RunStopped, match="version 7 again"):
        outgoing.again(7)
