"""Weight sync seen from the controller: push a version to every engine, then hold both sides' checksums together."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from mxdist.config import Config
from mxdist.control.groups import LearnerGroup, RolloutPool
from mxdist.control.waits import Pending, wait_for
from mxdist.messages import WeightPayload
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import learner_checksums


@dataclass(frozen=True)
class _Push:
    version: int
    payloads: list[Pending]  # one a learner rank
    loads: list[Pending]  # one a rollout worker
    started: float


class WeightSync:
    """Pushes are checked before the next one, and at once when training is synchronous."""

    def __init__(self, learners: LearnerGroup, pool: RolloutPool, config: Config) -> None:
        self._learners = learners
        self._pool = pool
        self._deadline = config.deadlines.sync
        self._open: _Push | None = None

    def push(self, version: int) -> None:
        """Start the sync of ``version``. Engines take it when they have finished what was submitted before."""
        self.check()
        started = time.monotonic()
        payloads = self._learners.export(version)
        loads = self._pool.load_weights([call.ref for call in payloads], version)
        self._open = _Push(version, payloads, loads, started)

    def check(self) -> dict[str, float]:
        """Wait for the open push and compare checksums; the metrics of that sync, empty when none was open.

        Raises:
            ParityError: an engine holds other bytes than the learner computes with.
        """
        if self._open is None:
            return {}
        push, self._open = self._open, None
        payloads: Sequence[WeightPayload] = wait_for(push.payloads, self._deadline, "sync")
        expected = learner_checksums(payloads)
        for found in wait_for(push.loads, self._deadline, "sync"):
            compare_checksums(expected, found)
        seconds = time.monotonic() - push.started
        return {
            "sync/bytes": float(sum(payload.nbytes for payload in payloads)),
            "sync/seconds": seconds,
            "sync/version": float(push.version),
            "parity/mismatched_codes": 0.0,  # a difference has raised above
        }
