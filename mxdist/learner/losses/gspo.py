"""GSPO (arXiv 2507.18071): GRPO with one length-normalised ratio a sequence, clipped as a whole."""

from mxdist.learner.losses.base import LossInputs, LossOutput
from mxdist.learner.losses.clipped import clipped_surrogate, sequence_log_ratio
from mxdist.learner.losses.grpo import GrpoObjective


class GspoObjective(GrpoObjective):
    def loss(self, inputs: LossInputs) -> LossOutput:
        algorithm = self.algorithm
        return clipped_surrogate(
            inputs, sequence_log_ratio(inputs), algorithm.clip_low, algorithm.clip_high, algorithm.tis_cap
        )
