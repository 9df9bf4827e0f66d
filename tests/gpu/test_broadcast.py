"""Weights broadcast by NCCL from one GPU to another: the engine holds the learner's bytes, and failures end in time."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from mxdist.config import Config
from mxdist.errors import SyncInterrupted
from mxdist.messages import WeightPayload
from mxdist.sync.broadcast import Meetings
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import learner_checksums
from tests.gpu.test_sync import live_bytes
from tools.bench.sync import SHAPES
from tools.bench.sync_sides import EngineSide, LearnerSide

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

DEADLINE = 120  # seconds, of a call
CONFIG = Config.model_validate(
    {"recipe": "mxfp4_mbs_of", "model": SHAPES["tiny"], "learner": {"ranks": 1, "expert_parallel": 1}}
)
SIDE: list[Any] = []  # of a child process


class Side:
    """One side of a sync in a process of its own, with a GPU of its own."""

    def __init__(self, kind: type, gpu: int) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.submit(_build, kind, gpu)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.submit(_with_side, function, *arguments)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pool.submit(function, *arguments).result(timeout=DEADLINE)

    def close(self) -> None:
        self._pool.shutdown()


def _build(kind: type, gpu: int) -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": str(gpu), "NCCL_NVLS_ENABLE": "0", "NCCL_SOCKET_IFNAME": "lo"}
    assert not torch.cuda.is_initialized()
    SIDE.append(kind(CONFIG))
    assert torch.cuda.is_initialized()


def _with_side(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(SIDE[0], *arguments)


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Side, Side]]:
    both = Side(LearnerSide, 0), Side(EngineSide, 1)
    yield both
    for side in both:
        side.close()


def test_the_engine_on_another_gpu_holds_what_was_broadcast_also_after_a_broadcast_that_failed(
    sides: tuple[Side, Side],
) -> None:
    learner, engine = sides
    called = Meetings("127.0.0.1", 1, arrival=60, transfer=30)

    def export(version: int, called: Meetings) -> WeightPayload:
        learner.run(LearnerSide.step, version)
        payload = learner.run(LearnerSide.export, version, called.call())
        assert isinstance(payload, WeightPayload)
        return payload

    for version in range(3):
        payload = export(version, called)
        compare_checksums(learner_checksums([payload]), engine.run(EngineSide.load_weights, [payload]))
        expected = learner.run(LearnerSide.export_again, version)
        entries = {e.name: {part: array.tobytes() for part, array in e.parts.items()} for e in expected.entries}
        assert engine.run(live_bytes) == entries
    before = engine.run(live_bytes)
    late = Meetings("127.0.0.1", 2, arrival=2, transfer=30)  # the other receiver never comes
    started = time.monotonic()
    payload = export(3, late)
    with pytest.raises(SyncInterrupted, match="1 of 2 engine processes came"):
        engine.run(EngineSide.load_weights, [payload])
    assert time.monotonic() - started < 20
    assert engine.run(live_bytes) == before
    called.end("it failed")
    payload = export(4, called)
    compare_checksums(learner_checksums([payload]), engine.run(EngineSide.load_weights, [payload]))
    assert engine.run(live_bytes) != before
