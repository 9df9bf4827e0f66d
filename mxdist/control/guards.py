"""Watches the metrics of every step for a run that has gone wrong, and warns, stops it or has it rolled back."""

from collections.abc import Callable, Iterator, Mapping

from mxdist.config.schema import GuardConfig
from mxdist.errors import NotFinite, RollBack, RunStopped


class Guards:
    """The bounds of one run."""

    def __init__(self, config: GuardConfig, groups: int, note: Callable[[str], None]) -> None:
        """
        Args:
            groups: trained on in a step.
            note: is told of what is only warned of.
        """
        self._config = config
        self._groups = groups
        self._note = note
        self._pinned = 0  # steps in a row

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hold a step's metrics to the bounds.

        Raises:
            RollBack, RunStopped: a bound is passed, as configured.
        """
        if metrics["guards/skipped_update"]:
            self._note(f"step {step}: a gradient was not finite, and the update is left out (guards.not_finite=skip)")
        for reason in self._reasons(metrics):
            sentence = f"step {step}: {reason}"
            if self._config.then == "roll_back":
                raise RollBack(sentence)
            if self._config.then == "stop":
                raise RunStopped(f"{sentence}; guards.then=warn goes on all the same")
            self._note(sentence)

    def not_finite(self, found: NotFinite) -> RunStopped:
        """What to raise when the learner has met a gradient that is no number, and made no update."""
        return RollBack(str(found)) if self._config.not_finite == "roll_back" else found

    def _reasons(self, metrics: Mapping[str, float]) -> Iterator[str]:
        config = self._config
        mismatch = metrics.get("rollout_corr/k3_kl", 0.0)
        if config.max_mismatch is not None and not mismatch <= config.max_mismatch:
            yield f"rollout_corr/k3_kl {mismatch:.4g} is beyond guards.max_mismatch={config.max_mismatch:g}"
        entropy = metrics["actor/entropy"]
        if config.min_entropy is not None and not entropy >= config.min_entropy:
            yield f"actor/entropy {entropy:.4g} has fallen below guards.min_entropy={config.min_entropy:g}"
        pinned = metrics["rollout/groups_without_signal"] >= self._groups
        self._pinned = self._pinned + 1 if pinned else 0
        if 0 < config.pinned_reward_steps <= self._pinned:
            yield f"no group's rewards have differed for {self._pinned} steps (guards.pinned_reward_steps)"
