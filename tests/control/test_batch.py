"""From scored groups to the padded batch."""

import numpy as np
import pytest

from mxdist.config.schema import Grpo
from mxdist.control.batch import ScoredGroup, build_batch
from mxdist.learner.losses import get_objective
from mxdist.messages import Group, Prompt, Sample


def scored(prompt: tuple[int, ...], answers: list[list[int]], rewards: list[float]) -> ScoredGroup:
    samples = tuple(
        Sample(np.array(answer), np.array([-0.5 * token for token in answer], dtype=np.float32), True)
        for answer in answers
    )
    return ScoredGroup(Group(Prompt("k", prompt, "r"), samples, 0, 0.0), tuple(rewards), {"accuracy": 0.0})


def test_every_token_lands_in_its_place_and_padding_is_masked() -> None:
    groups = [scored((5, 6, 7), [[1, 2], [3]], [1.0, 0.0])]
    batch = build_batch(groups, get_objective(Grpo()), 1, 8, pad_token=9, temperature=0.7)
    assert batch.tokens.tolist() == [[5, 6, 7, 1, 2, 9, 9, 9], [5, 6, 7, 3, 9, 9, 9, 9]]
    assert batch.response_mask.tolist() == [
        [False, False, False, True, True, False, False, False],
        [False, False, False, True, False, False, False, False],
    ]
    assert batch.rollout_logprobs[0, 3:5].tolist() == [-0.5, -1.0]
    assert not batch.rollout_logprobs[~batch.response_mask].any()
    assert batch.temperature == 0.7


def test_weights_add_up_to_one_within_every_optimizer_update() -> None:
    groups = [scored((1,), [[1] * (1 + index), [1]], [1.0, 0.0]) for index in range(4)]
    batch = build_batch(groups, get_objective(Grpo()), 2, 8, pad_token=0, temperature=1.0)
    per_token = batch.weights * batch.response_mask.sum(1)
    assert per_token[:4].sum() == pytest.approx(1)
    assert per_token[4:].sum() == pytest.approx(1)


def test_advantages_are_formed_within_each_group() -> None:
    groups = [scored((1,), [[1], [1]], [1.0, 0.0]), scored((2,), [[1], [1]], [0.5, 0.5])]
    batch = build_batch(groups, get_objective(Grpo()), 1, 8, pad_token=0, temperature=1.0)
    assert batch.advantages.tolist() == [1.0, -1.0, 0.0, 0.0]


def test_a_group_with_equal_rewards_has_no_signal() -> None:
    assert not scored((1,), [[1], [1]], [0.5, 0.5]).has_signal
    assert scored((1,), [[1], [1]], [0.5, 0.6]).has_signal
