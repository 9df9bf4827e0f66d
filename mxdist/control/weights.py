"""Weight sync seen from the controller: push a version to every engine, then hold both sides' checksums together."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import ray

from mxdist.config import Config
from mxdist.control.groups import LearnerGroup, RolloutPool
from mxdist.control.supervisor import Call
from mxdist.control.waits import Pending, wait_for
from mxdist.messages import WeightPayload
from mxdist.sync.broadcast import Meetings
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import PartSums, learner_checksums

Way = Literal["host", "delta", "ipc"] | Meetings
"""How all versions of a run travel."""


@dataclass(frozen=True)
class _Push:
    version: int
    payloads: list[Pending]  # one a learner rank
    loads: list[Call]  # one a rollout worker
    started: float


class WeightSync:
    """Pushes weights and checks every push; with ``rollout.max_lag`` k up to k pushes are open at a time.

    ``sync.update`` drained: an engine first finishes the batches that were submitted before a push. in_flight: it goes
    on with the new weights in the midst of them, after a check of its own; what it then holds is compared here, as
    ever, when those batches are finished.
    """

    def __init__(self, learners: LearnerGroup, pool: RolloutPool, transport: Way, config: Config) -> None:
        self._learners = learners
        self._pool = pool
        self._transport = transport
        self._deadlines = config.deadlines
        self._max_lag = config.rollout.max_lag
        self._load = pool.load_weights_in_flight if config.sync.update == "in_flight" else pool.load_weights
        self._open: deque[_Push] = deque()

    def push(self, version: int) -> None:
        """Start the sync of ``version``."""
        started = time.monotonic()
        transport = self._transport.call() if isinstance(self._transport, Meetings) else self._transport
        payloads = self._learners.export(version, transport)

        @cache  # for all engines that missed it
        def again() -> Sequence["ray.ObjectRef"]:
            return self._learners.export_again(version)

        serve_once = transport not in ("host", "ipc")
        loads = self._load([call.ref for call in payloads], version, again if serve_once else None)
        self._open.append(_Push(version, payloads, loads, started))

    def check_through(self, version: int) -> dict[str, float]:
        """Wait for every open push up to ``version`` and compare checksums; the metrics of the last of them.

        Raises:
            ParityError: an engine holds other bytes than the learner computes with.
        """
        metrics: dict[str, float] = {}
        while self._open and self._open[0].version <= version:
            metrics = self._check(self._open.popleft())
        return metrics

    def check_all(self) -> dict[str, float]:
        """Wait for and compare every open push, after the batches that the engines have to finish first."""
        return self.check_through(self._open[-1].version) if self._open else {}

    def _check(self, push: _Push) -> dict[str, float]:
        payloads: Sequence[WeightPayload] = wait_for(push.payloads, self._deadlines.sync, "sync")
        expected = learner_checksums(payloads)
        # Behind batches that are still being sampled, the wait is theirs as well.
        patience = self._deadlines.sync + self._max_lag * self._deadlines.rollout
        engines: list[PartSums] = self._pool.wait(push.loads, patience, "sync")
        for found in engines:
            compare_checksums(expected, found)
        return {
            "sync/bytes": float(sum(payload.nbytes for payload in payloads)),
            "sync/seconds": time.monotonic() - push.started,
            "sync/export_seconds": max(payload.seconds for payload in payloads),
            **{
                f"sync/{phase}_seconds": max(found.seconds[phase] for found in engines)
                for phase in ("check", "copy", "parity")
            },
            "sync/version": float(push.version),
            "parity/checked_tensors": float(len(expected) * len(engines)),  # a difference has raised above
        }
