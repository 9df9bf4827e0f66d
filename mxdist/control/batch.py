"""From scored groups to the padded batch that the learner ranks take."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mxdist.learner.losses.base import Objective
from mxdist.messages import Group, TrainBatch
from mxdist.tasks.base import RewardResult

PAD_TO = 8  # batch lengths are rounded up to this: fewer distinct shapes, less padding than to the context


@dataclass(frozen=True)
class ScoredGroup:
    """A group with the reward of each of its samples."""

    group: Group
    rewards: tuple[float, ...]
    parts: dict[str, float]  # mean of each part of the reward over the group, such as "accuracy"
    results: tuple[RewardResult, ...] = ()  # of each of its samples

    @property
    def has_signal(self) -> bool:
        """Whether its rewards differ, so that a group-relative advantage is not all zeros."""
        return max(self.rewards) > min(self.rewards)


@dataclass(frozen=True)
class Answered:
    """A prompt and one answer to it."""

    prompt: tuple[int, ...]
    response: np.ndarray  # int64 [response]
    logprobs: np.ndarray  # float32 [response]


def pad_sequences(
    sequences: Sequence[Answered], advantages: np.ndarray, weights: np.ndarray, pad_token: int, temperature: float
) -> TrainBatch:
    """Right-pad to a common length.

    Args:
        advantages: float32 [sequences].
        weights: float32 [sequences], of each response token.
    """
    longest = max(len(sequence.prompt) + len(sequence.response) for sequence in sequences)
    shape = (len(sequences), -(-longest // PAD_TO) * PAD_TO)
    tokens = np.full(shape, pad_token, dtype=np.int64)
    mask = np.zeros(shape, dtype=bool)
    logprobs = np.zeros(shape, dtype=np.float32)
    for row, sequence in enumerate(sequences):
        start, end = len(sequence.prompt), len(sequence.prompt) + len(sequence.response)
        tokens[row, :start] = sequence.prompt
        tokens[row, start:end] = sequence.response
        mask[row, start:end] = True
        logprobs[row, start:end] = sequence.logprobs
    return TrainBatch(tokens, mask, logprobs, advantages.astype(np.float32), weights.astype(np.float32), temperature)


def token_weights(objective: Objective, lengths: np.ndarray, minibatches: int, max_new_tokens: int) -> np.ndarray:
    """Token weights of all sequences, normalised within each optimizer update: equal consecutive parts."""
    parts = np.split(lengths, minibatches)
    return np.concatenate([objective.token_weights(part, max_new_tokens) for part in parts])


def build_batch(
    scored: Sequence[ScoredGroup],
    objective: Objective,
    minibatches: int,
    max_new_tokens: int,
    pad_token: int,
    temperature: float,
) -> TrainBatch:
    """The batch of one step: every sample of every group, with its advantage and its tokens' weight."""
    rewards = np.array([group.rewards for group in scored], dtype=np.float64)  # [groups, samples]
    sequences = [
        Answered(group.group.prompt.tokens, sample.tokens, sample.logprobs)
        for group in scored
        for sample in group.group.samples
    ]
    lengths = np.array([len(sequence.response) for sequence in sequences])
    weights = token_weights(objective, lengths, minibatches, max_new_tokens)
    advantages = objective.advantages(rewards).reshape(-1)
    return pad_sequences(sequences, advantages, weights, pad_token, temperature)
