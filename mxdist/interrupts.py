"""Ctrl-C where a KeyboardInterrupt would do harm: raised in the midst of imports it may be lost in a callback, and in
the midst of Ray's start it leaves processes behind. Of the main thread; imports nothing of mxdist."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit code: 128 and the number of SIGINT."""
MESSAGE = "mxdist: interrupted"


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Where nothing is held that has to be given back, such as imports: Ctrl-C ends the process with its one line."""
    with _handled(_end):
        yield


@contextmanager
def put_off() -> Iterator[None]:
    """What is done here is done to its end. KeyboardInterrupt is raised then, if Ctrl-C came, and no other error."""
    came = []
    with _handled(lambda *_: came.append(True)):
        yield
    if came:
        raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    print(MESSAGE, file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Unless somebody else handles SIGINT, or nobody shall: a script's background process ignores it."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
