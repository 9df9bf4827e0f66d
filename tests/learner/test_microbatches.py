"""Every answer of a step is learnt from exactly once, in the same number of micro-batches on every rank."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxdist.learner.microbatches import (
    MicroBatch,
    micro_batches,
    one_micro_batch,
    optimizer_batches,
    padding_saved,
    rejoin,
    sequence_lengths,
)
from mxdist.messages import Mean, TrainBatch
from tests.learner.batches import random_batch


def numbered(rows: int, seed: int = 0) -> TrainBatch:
    """A batch whose advantages are 1, 2, 3, ..., so that rows can be told apart."""
    return replace(random_batch(rows, seed=seed), advantages=np.arange(1, rows + 1, dtype=np.float32))


def of_all_ranks(batch: TrainBatch, ranks: int, budget: int, multiple: int = 1) -> list[list[MicroBatch]]:
    return [micro_batches(batch, rank, ranks, budget, multiple) for rank in range(ranks)]


sizes = {
    "rows": st.integers(1, 20),
    "ranks": st.integers(1, 4),
    "budget": st.integers(1, 60),
    "seed": st.integers(0, 9),
}


@given(**sizes, updates=st.integers(1, 4))
def test_ranks_and_micro_batches_share_out_every_row_once(
    rows: int, ranks: int, budget: int, seed: int, updates: int
) -> None:
    seen: list[float] = []
    for update in optimizer_batches(numbered(rows, seed), min(updates, rows)):
        shares = of_all_ranks(update, ranks, budget)
        assert len({len(share) for share in shares}) == 1
        parts = [part for share in shares for part in share if len(part.rows)]
        for part in parts:
            assert np.array_equal(part.batch.advantages, update.advantages[part.rows])
            assert np.array_equal(part.batch.weights, update.weights[part.rows])
            seen += part.batch.advantages.tolist()
        responses = sum(int(part.batch.response_mask.sum()) for share in shares for part in share)
        assert responses == update.response_mask.sum()
    assert sorted(seen) == list(range(1, rows + 1))


@given(**sizes)
def test_a_micro_batch_keeps_to_its_tokens_unless_one_sequence_is_longer(
    rows: int, ranks: int, budget: int, seed: int
) -> None:
    for share in of_all_ranks(random_batch(rows, seed=seed), ranks, budget):
        assert all(part.lengths.sum() <= budget or len(part.rows) == 1 for part in share)


@given(**sizes, multiple=st.integers(1, 4))
def test_the_row_of_tokens_is_the_sequences_up_to_their_last_response_token(
    rows: int, ranks: int, budget: int, seed: int, multiple: int
) -> None:
    batch = random_batch(rows, seed=seed)
    for part in [part for share in of_all_ranks(batch, ranks, budget, multiple) for part in share]:
        assert len(part.tokens) == sum(part.packed_lengths)
        assert len(part.tokens) % multiple == 0
        assert part.padding < multiple
        whole = [batch.tokens[row, : np.flatnonzero(batch.response_mask[row])[-1] + 1] for row in part.rows]
        if whole:
            assert np.array_equal(part.tokens[: len(part.tokens) - part.padding], np.concatenate(whole))


@given(**sizes)
def test_every_response_token_is_predicted_by_the_one_before_it(rows: int, ranks: int, budget: int, seed: int) -> None:
    batch = random_batch(rows, seed=seed)
    for part in [part for share in of_all_ranks(batch, ranks, budget) for part in share]:
        where = part.predicted_at
        assert len(set(where.tolist())) == len(where) == part.batch.response_mask.sum()
        found, columns = part.scored
        for place, row, column in zip(where, found, columns, strict=True):
            assert part.tokens[place] == part.batch.tokens[row, column - 1]
            assert part.tokens[place + 1] == part.batch.tokens[row, column]


def test_tokens_are_shared_out_evenly() -> None:
    lengths = np.array([100, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    mask = np.arange(100) < lengths[:, None]
    zeros = np.zeros(11, np.float32)
    batch = TrainBatch(mask.astype(np.int64), mask, mask.astype(np.float32), zeros, zeros)
    first, second = of_all_ranks(batch, 2, 100)
    assert [part.lengths.tolist() for part in first] == [[100]]
    assert [part.lengths.tolist() for part in second] == [[10] * 10]


def test_rows_without_a_response_are_not_computed() -> None:
    batch = random_batch(4)
    batch.response_mask[1::2] = False
    [part] = micro_batches(batch, 0, 1, 1000)
    assert part.rows.tolist() == [0, 2]


def test_a_rank_with_nothing_to_do_computes_what_counts_for_nothing() -> None:
    for rank in (0, 1):
        [part] = micro_batches(random_batch(1), rank, 2, 1000, multiple=2)
        assert len(part.rows) == 1 - rank
        assert part.batch.response_mask.any() == (rank == 0)
    assert len(part.tokens) == 2
    assert part.padding_fraction == Mean(2, 2)


def test_padding_is_counted_and_so_is_what_was_saved() -> None:
    batch = random_batch(5)
    lengths = sequence_lengths(batch)
    [part] = micro_batches(batch, 0, 1, 1000, multiple=64)
    assert part.padding_fraction == Mean(-lengths.sum() % 64, lengths.sum() + -lengths.sum() % 64)
    assert padding_saved(batch) == Mean(5 * lengths.max() - lengths.sum(), 5 * lengths.max())


def test_updates_are_runs_of_consecutive_rows() -> None:
    parts = optimizer_batches(numbered(6), 3)
    assert [part.advantages.tolist() for part in parts] == [[1, 2], [3, 4], [5, 6]]


def test_sequences_can_be_packed_with_nothing_to_learn_from() -> None:
    part = one_micro_batch([np.array([1, 2, 3]), np.array([4])], multiple=3)
    assert part.tokens.tolist() == [1, 2, 3, 4, 0, 0]
    assert part.packed_lengths == (3, 1, 2)
    assert not part.batch.response_mask.any()


@given(**sizes)
def test_rejoin_undoes_sharing_out(rows: int, ranks: int, budget: int, seed: int) -> None:
    batch = random_batch(rows, seed=seed)
    joined = [
        rejoin([part.batch.rollout_logprobs for part in share], share, *batch.tokens.shape)
        for share in of_all_ranks(batch, ranks, budget)
    ]
    assert np.array_equal(sum(joined), batch.rollout_logprobs)


@pytest.mark.parametrize(("lengths", "budget"), [(range(2, 18), 200), ((9, 7, 5, 3), 9)], ids=["one", "several"])
def test_ranks_have_equally_many_tokens_whatever_the_order_of_the_sequences(
    lengths: Sequence[int], budget: int
) -> None:
    columns = np.arange(max(lengths))
    mask = (columns > 0) & (columns < np.array(lengths)[:, None])
    zeros = np.zeros(mask.shape, dtype=np.float32)
    batch = TrainBatch(zeros.astype(np.int64), mask, zeros, zeros[:, 0], zeros[:, 0])
    first, second = (sum(int(part.lengths.sum()) for part in share) for share in of_all_ranks(batch, 2, budget))
    assert first == second == sum(lengths) / 2
