"""Broadcasts between real process groups: everything arrives in order, or nothing is used and nobody waits for long.

Parties are threads here where it does not matter; one that dies is a process.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxdist.config import Config
from mxdist.errors import SyncInterrupted
from mxdist.messages import BroadcastBuckets, Bucket, Manifest, Meeting
from mxdist.rollout.loading import WeightLoader
from mxdist.sync.broadcast import Meetings, Receiver, Sender, _Failed, _Party
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import learner_checksums
from tests.sync.entries import as_array
from tools.bench.sync import SHAPES
from tools.bench.sync_sides import EngineSide, LearnerSide

CPU = torch.device("cpu")
LOCAL = "127.0.0.1"
SOON = 10.0  # seconds, of a broadcast that nothing hinders, on a busy machine


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def meetings(receivers: int, arrival: float = SOON, transfer: float = SOON) -> Meetings:
    return Meetings(LOCAL, receivers, arrival, transfer)


def random_buckets(sizes: Sequence[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]


def received(receiver: Receiver, meeting: Meeting, sizes: dict[str, list[int]], delay: float = 0) -> list[list[Tensor]]:
    """All that comes at a meeting, by sender."""
    time.sleep(delay)
    receiver.meet(meeting)
    found = []
    for owner, of_owner in sizes.items():
        manifest = Manifest((), tuple(Bucket("bytes", size) for size in of_owner))
        incoming = receiver.buckets(BroadcastBuckets(owner, meeting), manifest)
        found.append([incoming[index] for index in range(len(of_owner))])
    return found


def all_of(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of calls made at the same time, or what they raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5000), max_size=4), min_size=1, max_size=3),
    st.lists(st.floats(0, 0.05), min_size=1, max_size=3),
)
def test_every_receiver_has_every_bucket_of_every_rank_in_order(sizes: list[list[int]], delays: list[float]) -> None:
    called = meetings(len(delays))
    by_owner = {f"learner rank {rank}": of_rank for rank, of_rank in enumerate(sizes)}
    senders = {owner: Sender(CPU, owner) for owner in by_owner}
    receivers = [Receiver(CPU) for _ in delays]
    both = [called.call(), called.call()]  # the second begins before the first is over
    sent = []
    for meeting in both:
        of_meeting = [random_buckets(of_rank, meeting.number * 10 + rank) for rank, of_rank in enumerate(sizes)]
        for sender, buckets in zip(senders.values(), of_meeting, strict=True):
            if buckets:
                sender.send(meeting, buckets)
        sent.append(of_meeting)

    def take(receiver: Receiver, delay: float) -> list[list[list[Tensor]]]:
        return [received(receiver, meeting, by_owner, delay) for meeting in both]

    for found in all_of([lambda r=r, d=d: take(r, d) for r, d in zip(receivers, delays, strict=True)]):
        for expected, of_meeting in zip(sent, found, strict=True):
            for theirs, ours in zip(of_meeting, expected, strict=True):
                assert len(theirs) == len(ours)
                assert all(map(torch.equal, theirs, ours))


def test_one_who_does_not_come_ends_the_wait_of_the_others_with_a_sentence_and_the_next_meeting_is_new() -> None:
    called = meetings(2, arrival=1.0)
    sender, here, late = Sender(CPU, "learner rank 0"), Receiver(CPU), Receiver(CPU)
    [bucket] = random_buckets([1000], 1)
    missed = called.call()
    sender.send(missed, [bucket])
    started = time.monotonic()
    with pytest.raises(SyncInterrupted, match="broken off: 1 of 2 engine processes came to the broadcast within 1 s"):
        received(here, missed, {"learner rank 0": [1000]})
    assert time.monotonic() - started < 5
    with pytest.raises(SyncInterrupted, match="1 of 2 engine processes came"):
        received(late, missed, {"learner rank 0": [1000]})  # who comes too late does not wait
    called.end("it was noticed")
    meeting = called.call()
    sender.send(meeting, [bucket])
    for found in all_of([lambda r=r: received(r, meeting, {"learner rank 0": [1000]}) for r in (here, late)]):
        assert torch.equal(found[0][0], bucket)


def test_a_generation_that_the_controller_ends_is_over_at_once() -> None:
    called = meetings(2, arrival=600)
    meeting = called.call()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(Receiver(CPU).meet, meeting)
        time.sleep(0.2)
        called.end("rollout worker 1 died")
        error = waiting.exception(timeout=SOON)
    assert isinstance(error, SyncInterrupted)
    assert "broken off: rollout worker 1 died" in str(error)
    assert not called.is_open(error.generation)


def test_one_process_too_many_is_turned_away() -> None:
    called = meetings(1)
    meeting = called.call()
    Receiver(CPU).meet(meeting)
    with pytest.raises(SyncInterrupted, match="one process too many came to a broadcast for 1"):
        Receiver(CPU).meet(meeting)


def test_meetings_of_two_controllers_are_two_though_their_numbers_are_the_same() -> None:
    sender, receiver = Sender(CPU, "learner rank 0"), Receiver(CPU)
    controllers = meetings(1), meetings(1)
    for seed, called in enumerate(controllers):
        meeting = called.call()
        [bucket] = random_buckets([1000], seed)
        sender.send(meeting, [bucket])
        [[found]] = received(receiver, meeting, {"learner rank 0": [1000]})
        assert torch.equal(found, bucket)


def test_without_its_store_a_broadcast_is_refused() -> None:
    called = meetings(1)
    nowhere = replace(called.call(), address=f"{LOCAL}:1", transfer=0.5)
    with pytest.raises(SyncInterrupted, match=r"store at 127\.0\.0\.1:1"):
        Receiver(CPU).meet(nowhere)


class DoneAt:
    """A collective that is done at a moment (time.monotonic())."""

    def __init__(self, moment: float) -> None:
        self._moment = moment

    def is_completed(self) -> bool:
        return time.monotonic() >= self._moment

    def wait(self) -> None:
        assert self.is_completed()


def test_each_bucket_has_the_deadline_to_itself_however_long_all_of_them_take() -> None:
    called = meetings(1, transfer=1.0)
    meeting = called.call()
    party, now = _Party(meeting, CPU, 0), time.monotonic()
    party.finish([DoneAt(now + 0.6), DoneAt(now + 1.2), DoneAt(now + 1.2)], meeting)
    now = time.monotonic()
    with pytest.raises(_Failed, match=r"a bucket took longer than 1 s; raise deadlines\.sync"):
        party.finish([DoneAt(now + 0.1), DoneAt(now + 30)], meeting)
    assert time.monotonic() - now < 5


def come_and_die(meeting: Meeting) -> None:
    Receiver(CPU).meet(meeting)
    os._exit(1)  # when the others count on it


def test_an_engine_that_dies_on_the_way_leaves_the_others_their_old_weights_whole_and_the_next_try_works() -> None:
    config = Config.model_validate(
        {"recipe": "mxfp4", "model": SHAPES["tiny"], "learner": {"ranks": 1, "expert_parallel": 1}}
    )
    learner, engine = LearnerSide(config), EngineSide(config)
    called = meetings(2, arrival=60, transfer=5)  # the other process imports torch first
    old = learner.export(0)
    engine.load_weights([old])
    before = live_bytes(engine.loader)
    learner.step(1)
    meeting = called.call()
    payload = learner.export(1, meeting)
    dying = multiprocessing.get_context("spawn").Process(target=come_and_die, args=(meeting,))
    dying.start()
    started = time.monotonic()
    with pytest.raises(SyncInterrupted, match="a broadcast of weights was broken off") as caught:
        engine.load_weights([payload])
    assert time.monotonic() - started < 65
    dying.join()
    assert live_bytes(engine.loader) == before
    assert called.is_open(caught.value.generation)
    called.end(str(caught.value))
    by_host = learner.export_again(1)
    compare_checksums(learner_checksums([by_host]), engine.load_weights([by_host]))
    assert live_bytes(engine.loader) != before
    other, meeting = EngineSide(config), called.call()
    learner.step(2)
    payload = learner.export(2, meeting)
    for found in all_of([lambda e=e: e.load_weights([payload]) for e in (engine, other)]):
        compare_checksums(learner_checksums([payload]), found)


def test_a_bit_that_changes_on_the_way_is_found_before_anything_is_written() -> None:
    config = Config.model_validate(
        {"recipe": "mxfp4", "model": SHAPES["tiny"], "learner": {"ranks": 1, "expert_parallel": 1}}
    )
    learner, engine = LearnerSide(config), EngineSide(config)
    engine.load_weights([learner.export(0)])
    before = live_bytes(engine.loader)
    learner.step(1)
    called = meetings(1)
    payload = learner.export(1, called.call())
    spoilt = replace(payload, checksums=payload.checksums ^ np.uint64(1))
    with pytest.raises(Exception, match="changed on its way"):
        engine.load_weights([spoilt])
    assert live_bytes(engine.loader) == before


def live_bytes(loader: WeightLoader) -> dict[str, dict[str, bytes]]:
    return {
        name: {part: as_array(live).tobytes() for part, live in slot.parts().items()}
        for name, slot in loader._slots.items()
    }
