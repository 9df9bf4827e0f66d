"""Sequences packed into one row see nothing of each other: the logits are those of each sequence alone."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxdist.learner.worker import LearnerWorker
from tests.model.ranks import MOE, Learners, RankProcesses


@pytest.fixture(scope="module")
def learners(ranks: RankProcesses) -> Iterator[Learners]:
    with ranks.learners(MOE, "bf16") as learners:
        yield learners


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 99))
def test_logits_of_packed_sequences_are_those_of_each_alone(learners: Learners, lengths: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(0, 40, length) for length in lengths]
    [(together, alone)] = learners.run(logits_of, sequences)
    for first, second in zip(together, alone, strict=True):
        assert first.shape == second.shape
        assert np.abs(first - second).max() < 2e-5


def logits_of(worker: LearnerWorker, sequences: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    policy = worker._policy
    alone = [policy.forward([sequence])[0].numpy() for sequence in sequences]
    return [logits.numpy() for logits in policy.forward(sequences)], alone


@pytest.mark.parametrize("lengths", [(3, 1, 5), (4, 4)])
def test_gradients_stay_within_a_sequence_and_before_the_token(lengths: tuple[int, ...], learners: Learners) -> None:
    [reached] = learners.run(reach, lengths)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    token = np.arange(sum(lengths))
    expected = (sequence[:, None] == sequence) & (token[:, None] >= token)
    assert np.array_equal(reached, expected)


def reach(worker: LearnerWorker, lengths: tuple[int, ...]) -> np.ndarray:
    """Which token's keys and values each token's output depends on, by gradients."""
    from mxdist.model.attention import PackedAttention, Packing

    attention = PackedAttention(worker._policy.model.config, rotary_base=10_000.0)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(sum(lengths), 1, heads, 16, generator=generator) for heads in (4, 2, 2)]
    for tensor in tensors[1:]:
        tensor.requires_grad_()
    output = attention(*tensors, None, packed_seq_params=Packing(lengths, torch.device("cpu")))
    rows = []
    for token in range(sum(lengths)):
        key, value = torch.autograd.grad(output[token].sum(), tensors[1:], retain_graph=True)
        rows.append(((key.abs() + value.abs()).sum((1, 2, 3)) > 0).numpy())
    return np.array(rows)
