"""Decides sigma, the strength of the adaptive quantisation noise, for every rollout of a run. Pure Python.

Two ways, chosen by ``aqn.mode``; both are silent during the first of ``aqn.stages`` equal stages of the run, so that
the policy first settles under the quantisation error alone (QeRL, arXiv 2510.11696, section 3.3):

    schedule      sigma falls from sigma_start to sigma_end, by equal factors from stage to stage
    entropy_band  sigma rises while the policy's entropy is below a band, falls while it is above, else stays

Only sigma and a seed leave this object; each rollout worker draws the noise itself (``aqn.injector``).
"""

import math

from mxdist.config.schema import AqnConfig
from mxdist.messages import EntropyStatistics, Noise
from mxdist.seeds import derive_seed


class AqnController:
    """Sigma for steps 0 .. total_steps - 1 of a run, absolute, in units of the norm weights it is added to.

    One instance lives in the controller process. ``state`` and ``restore`` carry it through a checkpoint.
    """

    def __init__(self, config: AqnConfig, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"a run has at least one step, not {total_steps}")
        self._config = config
        self._total_steps = total_steps
        self._held = 0.0  # entropy_band: the sigma in force; 0 until the entropy first leaves the band downwards
        self._observed = -1  # last step whose entropy moved it

    @property
    def total_steps(self) -> int:
        """The steps that the stages divide; what was given at the run's first start."""
        return self._total_steps

    def sigma(self, step: int) -> float:
        """Standard deviation of the noise of rollout ``step``; 0 when there is none."""
        stage = self._stage(step)
        if self._config.mode == "disabled" or stage == 0:
            return 0.0
        if self._config.mode == "entropy_band":
            return self._held
        return self._scheduled(stage)

    def noise(self, step: int, run_seed: int) -> Noise:
        """What the rollout workers need to draw the noise of ``step``."""
        return Noise(sigma=self.sigma(step), seed=derive_seed(run_seed, "aqn", step))

    def observe(self, step: int, entropy: EntropyStatistics) -> None:
        """Move sigma by one factor when the mean entropy of ``step`` (over all workers) is outside the band.

        The silent stage is not steered. A step already observed is ignored, so replaying one after a resume does
        not move sigma twice; so is a step without tokens.
        """
        band = self._config.mode == "entropy_band"
        if not band or step <= self._observed or self._stage(step) == 0 or not entropy.tokens:
            return
        self._observed = step
        if entropy.mean < self._config.entropy_low:
            risen = self._held * self._config.gain or self._config.sigma_end
            self._held = min(risen, self._config.sigma_start)
        elif entropy.mean > self._config.entropy_high and self._held:
            self._held = max(self._held / self._config.gain, self._config.sigma_end)

    def state(self) -> dict[str, float | int]:
        """What a checkpoint keeps (JSON)."""
        return {"sigma": self._held, "observed_step": self._observed}

    def restore(self, state: dict[str, float | int]) -> None:
        """Inverse of ``state``. KeyError when the state is not one of this class."""
        held, observed = float(state["sigma"]), int(state["observed_step"])
        if not (math.isfinite(held) and held >= 0):
            raise ValueError(f"sigma={held} in the checkpoint's noise state is not a standard deviation")
        self._held, self._observed = held, observed

    def _stage(self, step: int) -> int:
        """Which of the equal stages a step is in; steps past the end count as the last stage."""
        if step < 0:
            raise ValueError(f"steps count from 0, not from {step}")
        return min(step * self._config.stages // self._total_steps, self._config.stages - 1)

    def _scheduled(self, stage: int) -> float:
        """sigma_start (sigma_end / sigma_start)^(i / (K - 2)) for i = stage - 1 of K stages (QeRL's code)."""
        start, end = self._config.sigma_start, self._config.sigma_end
        last = self._config.stages - 2
        if last == 0:  # two stages: silence, then one strength
            return start
        return start * (end / start) ** ((stage - 1) / last)
