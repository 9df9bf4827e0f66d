"""The learning rate of a step."""

import math

from mxdist.config.schema import OptimizerConfig, WarmStartConfig

WARM_START_RAMP = 10  # steps of linear warm-up before the cosine
WARM_START_FLOOR = 0.1  # share of the peak that the cosine ends at


def learning_rate(optimizer: OptimizerConfig, step: int) -> float:
    """Reinforcement learning: linear warm-up over ``warmup_steps``, then constant. ``step`` counts from 0."""
    if step >= optimizer.warmup_steps:
        return optimizer.lr
    return optimizer.lr * (step + 1) / optimizer.warmup_steps


def warm_start_learning_rate(section: WarmStartConfig, step: int) -> float:
    """Warm start: linear warm-up, then a cosine down to a tenth of the peak. ``step`` counts from 0."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / section.steps))
    ramp = min(1.0, (step + 1) / WARM_START_RAMP)
    return section.lr * ramp * (WARM_START_FLOOR + (1 - WARM_START_FLOOR) * cosine)
