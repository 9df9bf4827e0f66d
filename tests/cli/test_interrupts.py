"""Ctrl-C where it must not be raised in the midst of things."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from mxdist.interrupts import put_off


@pytest.fixture(autouse=True)
def _not_ignored() -> Iterator[None]:
    """Also when the tests themselves run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_what_an_interrupt_is_put_off_for_is_done_to_its_end() -> None:
    done = []

    def work() -> None:
        with put_off():
            interrupt()
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    with put_off():
        pass  # the one before is forgotten
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_an_error_of_what_an_interrupt_is_put_off_for_comes_first() -> None:
    def fail() -> None:
        with put_off():
            interrupt()
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        fail()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_interrupt_stays_ignored_and_other_threads_handle_none() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with put_off():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        interrupt()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = []

    def elsewhere() -> None:
        with put_off():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_an_interrupt_that_python_would_lose_ends_the_process_at_once_in_one_line() -> None:
    program = """
import os, signal
from mxdist.interrupts import ending_at_once
signal.signal(signal.SIGINT, signal.default_int_handler)
class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
with ending_at_once():
    Dying()
print("went on")
"""
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (130, "", "mxdist: interrupted\n")
