"""What a scheduler's SIGTERM does: a run in training ends its step, writes a checkpoint and exits with 75.

Send it to the mxdist process alone (Slurm: ``--signal=B:TERM@300`` and ``exec mxdist ...``), early enough for a step
and a checkpoint: Ray's own processes end at once when they are told to.
"""

import signal
from types import FrameType, TracebackType

from mxdist.errors import Preempted

ASKED = "asked to stop (SIGTERM); go on with 'mxdist resume' and the run directory"


class StopRequests:
    """Listens for SIGTERM. Use as a context manager, in the main thread."""

    def __init__(self) -> None:
        self.asked = False
        self.patient = False  # whether somebody will look at ``asked``; otherwise the request is obeyed at once

    def __enter__(self) -> "StopRequests":
        self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        again, self.asked = self.asked, True
        if again or not self.patient:
            raise Preempted(ASKED)
