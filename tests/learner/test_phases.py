"""Seconds of phases."""

import time

from mxdist.learner.phases import Stopwatch, timed


def test_laps_add_up_and_are_taken_once() -> None:
    watch, most = Stopwatch("forward"), 0.0
    for _ in range(2):
        started = time.perf_counter()
        with watch.running():
            time.sleep(0.02)
        most += time.perf_counter() - started
        time.sleep(0.05)
    assert 0.04 <= watch.take() <= most
    assert watch.take() == 0


def test_a_phase_that_fails_has_cost_its_seconds_too() -> None:
    seconds, started = {"optimizer": 1.0}, time.perf_counter()
    try:
        with timed(seconds, "optimizer"):
            time.sleep(0.02)
            raise ValueError
    except ValueError:
        pass
    assert 1.02 <= seconds["optimizer"] <= 1 + time.perf_counter() - started
