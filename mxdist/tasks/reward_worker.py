"""Scores answers. Runs in a process of its own, but is an ordinary class."""

from collections.abc import Sequence

from mxdist.config import Config
from mxdist.tasks.base import RewardResult
from mxdist.tasks.rewards import reward_for


class RewardWorker:
    """Holds the reward of the run's task."""

    def __init__(self, config: Config) -> None:
        self._reward = reward_for(config.data)

    def score(self, answers: Sequence[tuple[str, str]]) -> list[RewardResult]:
        """Score pairs of an answer's text and the reference answer, in the order given."""
        return [self._reward(text, reference) for text, reference in answers]
