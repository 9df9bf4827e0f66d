"""Weights that stay on the learner's GPU: another process loads them from there, or refuses them as a whole."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from mxdist.config import Config
from mxdist.errors import ParityError, ProcessDied, RunStopped
from mxdist.messages import ChangedBlocks, SharedBuckets, Transport, WeightPayload
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import PartSums, learner_checksums
from mxdist.sync.shared import Probe, handle_of
from tests.sync.entries import as_array
from tools.bench.sync import SHAPES
from tools.bench.sync_sides import EngineSide, LearnerSide

DEADLINE = 120  # seconds, of a call
CONFIG = Config.model_validate(
    {"recipe": "mxfp4_mbs_of", "model": SHAPES["tiny"], "learner": {"ranks": 1, "expert_parallel": 1}}
)
SIDE: list[Any] = []  # of a child process


class Side:
    """One side of a sync in a process of its own."""

    def __init__(self, kind: type) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._submit(_build, kind)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._submit(_with_side, function, *arguments)

    def close(self) -> None:
        self._pool.shutdown()

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pool.submit(function, *arguments).result(timeout=DEADLINE)


def _build(kind: type) -> None:
    SIDE.append(kind(CONFIG))


def _with_side(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(SIDE[0], *arguments)


@pytest.fixture(scope="module")
def learner() -> Iterator[Side]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    side = Side(LearnerSide)
    yield side
    side.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[Side]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    side = Side(EngineSide)
    yield side
    side.close()


def new_weights(learner: Side, seed: int, transport: Transport) -> WeightPayload:
    learner.run(LearnerSide.step, seed)
    payload = learner.run(LearnerSide.export, seed, transport)
    assert isinstance(payload, WeightPayload)
    return payload


def load(engine: Side, payload: WeightPayload) -> PartSums:
    sums = engine.run(EngineSide.load_weights, [payload])
    assert isinstance(sums, PartSums)
    return sums


def live_bytes(engine: EngineSide) -> dict[str, dict[str, bytes]]:
    return {
        name: {part: as_array(live).tobytes() for part, live in slot.parts().items()}
        for name, slot in engine.slots.items()
    }


@pytest.mark.parametrize("transport", ["host", "ipc"])
def test_the_engine_holds_the_learners_bytes_after_either_transport(
    learner: Side, engine: Side, transport: Transport
) -> None:
    expected = new_weights(learner, 1, "host")
    entries = {entry.name: {part: array.tobytes() for part, array in entry.parts.items()} for entry in expected.entries}
    load(engine, new_weights(learner, 2, "host"))
    assert engine.run(live_bytes) != entries
    payload = new_weights(learner, 1, transport)
    assert isinstance(payload.buckets, SharedBuckets) == (transport == "ipc")
    compare_checksums(learner_checksums([payload]), load(engine, payload))
    assert engine.run(live_bytes) == entries


def test_shared_weights_outlive_the_learners_next_update_and_not_its_next_export(learner: Side, engine: Side) -> None:
    first = new_weights(learner, 1, "ipc")
    learner.run(LearnerSide.step, 2)
    compare_checksums(learner_checksums([first]), load(engine, first))
    before = engine.run(live_bytes)
    learner.run(LearnerSide.export, 2, "ipc")
    with pytest.raises(RunStopped, match=r"too late for weights version 1 of learner rank 0, .* now hold version 2"):
        load(engine, first)
    assert engine.run(live_bytes) == before


def test_what_changed_on_one_gpu_is_laid_over_what_another_process_has(learner: Side, engine: Side) -> None:
    new_weights(learner, 1, "delta")
    load(engine, learner.run(LearnerSide.export_again, 1))
    payload = new_weights(learner, 2, "delta")
    assert isinstance(payload.buckets, ChangedBlocks)
    compare_checksums(learner_checksums([payload]), load(engine, payload))
    learner.run(LearnerSide.step, 3, 1e-6)
    payload = learner.run(LearnerSide.export, 3, "delta")
    assert payload.nbytes < payload.manifest.nbytes / 10
    compare_checksums(learner_checksums([payload]), load(engine, payload))


def test_an_engine_tries_whether_it_can_read_a_learners_gpu(learner: Side, engine: Side) -> None:
    shared = learner.run(make_probe)
    assert engine.run(try_probe, shared) is None
    assert "now hold version 2" in engine.run(try_probe, learner.run(make_probe, 2))


def test_a_changed_byte_is_refused_with_the_old_weights_whole(learner: Side, engine: Side) -> None:
    load(engine, new_weights(learner, 1, "ipc"))
    before = engine.run(live_bytes)
    payload = new_weights(learner, 2, "ipc")
    learner.run(flip_a_bit)
    with pytest.raises(ParityError, match="part codes, changed on its way"):
        load(engine, payload)
    assert engine.run(live_bytes) == before


def test_a_truncated_bucket_is_refused_with_the_old_weights_whole(learner: Side, engine: Side) -> None:
    load(engine, new_weights(learner, 1, "ipc"))
    before = engine.run(live_bytes)
    payload = new_weights(learner, 2, "ipc")
    assert isinstance(payload.buckets, SharedBuckets)
    handles = (learner.run(handle_of_a_truncated_bucket), *payload.buckets.handles[1:])
    with pytest.raises(ParityError, match="bucket 0 of payload 0 came with"):
        load(engine, replace(payload, buckets=replace(payload.buckets, handles=handles)))
    assert engine.run(live_bytes) == before


def test_the_weights_of_a_learner_that_is_gone_are_said_to_be(engine: Side) -> None:
    gone = Side(LearnerSide)
    payload = new_weights(gone, 1, "ipc")
    gone.close()
    with pytest.raises(ProcessDied, match="GPU of learner rank 0 cannot be mapped") as caught:
        load(engine, payload)
    assert caught.value.processes == ("learner rank 0",)


def try_probe(engine: EngineSide, shared: SharedBuckets) -> str | None:
    return engine.loader.cannot_map([shared])


# Executed in the learner's process -------------------------------------------------------------------------------


def make_probe(_: LearnerSide, content: int = Probe.VERSION) -> SharedBuckets:
    SIDE.append(Probe("learner rank 0"))  # it stays
    SIDE[-1]._stamp.fill_(content)
    torch.cuda.synchronize()
    shared = SIDE[-1].shared
    assert isinstance(shared, SharedBuckets)
    return shared


def flip_a_bit(learner: LearnerSide) -> None:
    buckets = learner._exporter._outgoing._buckets.tensors
    codes = next(i for i, bucket in enumerate(learner._exporter._plan.manifest.buckets) if bucket.kind == "codes")
    buckets[codes][5] ^= 1
    torch.cuda.synchronize()


def handle_of_a_truncated_bucket(learner: LearnerSide) -> bytes:
    return handle_of(learner._exporter._outgoing._buckets.tensors[0][:-16])
