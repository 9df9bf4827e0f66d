"""The algorithms: one file each, with the advantage it forms, the weight it gives a token, and its loss.

To add one: write a file beside these with a subclass of ``Objective``, give it a section in
``mxdist.config.schema`` and list it in ``OBJECTIVES``.
"""

from mxdist.config.schema import AlgorithmConfig, Supervised
from mxdist.learner.losses.base import LossInputs, LossOutput, Objective
from mxdist.learner.losses.dapo import DapoObjective
from mxdist.learner.losses.dr_grpo import DrGrpoObjective
from mxdist.learner.losses.grpo import GrpoObjective
from mxdist.learner.losses.gspo import GspoObjective
from mxdist.learner.losses.rloo import RlooObjective
from mxdist.learner.losses.supervised import SupervisedObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "grpo": GrpoObjective,
    "dapo": DapoObjective,
    "dr_grpo": DrGrpoObjective,
    "gspo": GspoObjective,
    "rloo": RlooObjective,
    "supervised": SupervisedObjective,
}


def get_objective(algorithm: AlgorithmConfig | Supervised) -> Objective:
    """The objective that an ``algorithm`` section names."""
    return OBJECTIVES[algorithm.name](algorithm)


__all__ = ["OBJECTIVES", "LossInputs", "LossOutput", "Objective", "get_objective"]
