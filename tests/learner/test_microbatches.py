"""Every row of a step is learnt from exactly once, in the same number of micro-batches on every rank."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mxdist.learner.microbatches import fill_up, micro_batches, optimizer_batches, rank_share, rejoin
from mxdist.messages import TrainBatch
from tests.learner.batches import random_batch


def numbered(rows: int) -> TrainBatch:
    """A batch whose advantages are 1, 2, 3, ..., so that rows can be told apart."""
    batch = random_batch(rows)
    return TrainBatch(
        batch.tokens,
        batch.response_mask,
        batch.rollout_logprobs,
        np.arange(1, rows + 1, dtype=np.float32),
        batch.weights,
    )


def counting_rows(batches: list[TrainBatch]) -> list[float]:
    return [advantage for batch in batches for advantage in batch.advantages[batch.response_mask.any(axis=1)]]


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.integers(1, 7))
def test_ranks_and_micro_batches_share_out_every_row_once(rows: int, updates: int, ranks: int, size: int) -> None:
    updates = min(updates, rows)
    seen = []
    for part in optimizer_batches(numbered(rows), updates):
        shares = [micro_batches(rank_share(part, rank, ranks), size) for rank in range(ranks)]
        assert len({tuple(len(piece) for piece in share) for share in shares}) == 1
        total = sum(float((piece.weights[:, None] * piece.response_mask).sum()) for share in shares for piece in share)
        assert np.isclose(total, (part.weights[:, None] * part.response_mask).sum())
        seen += [row for share in shares for row in counting_rows(share)]
    assert sorted(seen) == list(range(1, rows + 1))


def test_updates_are_runs_of_consecutive_rows() -> None:
    parts = optimizer_batches(numbered(6), 3)
    assert [part.advantages.tolist() for part in parts] == [[1, 2], [3, 4], [5, 6]]


def test_rows_filled_up_have_no_response_and_no_weight() -> None:
    filled = fill_up(numbered(3), 5)
    assert len(filled) == 5
    assert not filled.response_mask[3:].any()
    assert filled.response_mask[:3].any(axis=1).all()
    assert (filled.weights[3:] == 0).all()


def test_an_empty_batch_can_be_filled_up() -> None:
    filled = fill_up(random_batch().rows(slice(0, 0)), 3)
    assert len(filled) == 3
    assert not filled.response_mask.any()


def test_micro_batches_end_at_their_last_response_token() -> None:
    for piece in micro_batches(random_batch(9), 2):
        assert piece.response_mask[:, -1].any()


@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 3))
def test_rejoin_undoes_filling_up_and_cutting(rows: int, size: int, extra: int) -> None:
    batch = random_batch(9).rows(slice(0, rows))
    pieces = micro_batches(fill_up(batch, rows + extra), size)
    joined = rejoin([piece.rollout_logprobs for piece in pieces], *batch.tokens.shape)
    assert np.array_equal(joined, batch.rollout_logprobs)
