"""The training order: a cursor and a seed say everything."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxdist.config import Config
from mxdist.tasks.base import Cursor, draw_indices
from mxdist.tasks.registry import make_task


def test_an_epoch_draws_every_problem_once_and_the_next_in_another_order() -> None:
    first, cursor = draw_indices(Cursor(), size=10, count=10, run_seed=0)
    second, _ = draw_indices(cursor, size=10, count=10, run_seed=0)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert draw_indices(Cursor(), size=10, count=10, run_seed=1)[0] != first


@given(size=st.integers(1, 50), counts=st.lists(st.integers(0, 50), max_size=12), seed=st.integers(0, 1000))
def test_a_batch_never_holds_a_problem_twice(size: int, counts: list[int], seed: int) -> None:
    cursor = Cursor()
    for count in counts:
        indices, cursor = draw_indices(cursor, size, min(count, size), seed)
        assert len(set(indices)) == len(indices) == min(count, size)


def test_a_resumed_run_draws_exactly_what_the_uninterrupted_one_does() -> None:
    task, task_after_restart = make_task(Config()), make_task(Config())
    cursor, uninterrupted = Cursor(), []
    for _ in range(200):  # over an epoch's end
        prompts, cursor = task.draw(cursor, 32)
        uninterrupted.append(prompts)
    cursor = Cursor()
    for expected in uninterrupted:
        restored = Cursor.restore(json.loads(json.dumps(cursor.state())))
        prompts, cursor = task_after_restart.draw(restored, 32)
        assert prompts == expected
    assert cursor.epoch > 0


def test_more_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="cannot draw 5"):
        draw_indices(Cursor(), size=4, count=5, run_seed=0)
