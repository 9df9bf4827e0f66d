"""A worker that does what a test asks for. Imported by Ray's workers, so it stands in a file of its own."""

import os
import signal
import time

from mxdist.errors import ParityError, UserError


class Sleeper:
    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def fail(self, kind: str) -> None:
        raise {"user": UserError, "parity": ParityError, "bug": ZeroDivisionError}[kind]("what happened")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def add(self, items: list[int]) -> int:
        return sum(items)
