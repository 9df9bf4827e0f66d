"""When learner and engines may be at work: what sleep, updates in flight and broadcasts of weights need.

Raises ValueError, for ``schema``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxdist.config.schema import Config


def check_turns(config: "Config") -> None:
    """Raise ValueError, one sentence, when ``rollout.sleep`` or ``sync`` asks for what cannot be."""
    if config.rollout.sleep:
        _check_sleep(config)
    if config.sync.update == "in_flight" and not config.rollout.max_lag:
        raise ValueError(
            "sync.update=in_flight gives engines new weights while they sample, and with rollout.max_lag=0 they wait "
            "for the weights instead; set rollout.max_lag=1 or more, or sync.update=drained"
        )
    if config.sync.transport == "broadcast" and (obstacle := broadcast_lacks(config)):
        raise ValueError(f"sync.transport=broadcast {obstacle}")


def broadcast_lacks(config: "Config") -> str | None:
    """Why weights cannot be broadcast with these settings, and what to change; None when they can be."""
    learner, rollout = config.learner.gpus_per_rank, config.rollout.gpus_per_worker
    if learner % 1 or rollout % 1:
        return (
            f"needs a GPU for each process, since NCCL does, and learner.gpus_per_rank={learner:g} with "
            f"rollout.gpus_per_worker={rollout:g} share some; set sync.transport=ipc"
        )
    if config.sync.update == "in_flight":
        return (
            "needs all engines at the same time, and with sync.update=in_flight they come between any two of their "
            "steps; set sync.update=drained, or another sync.transport"
        )
    return None


def _check_sleep(config: "Config") -> None:
    if not (0 < config.rollout.gpus_per_worker < 1 and 0 < config.learner.gpus_per_rank < 1):
        raise ValueError(
            f"rollout.sleep=true frees a GPU that learner and engine share, and learner.gpus_per_rank="
            f"{config.learner.gpus_per_rank:g} with rollout.gpus_per_worker={config.rollout.gpus_per_worker:g} share "
            f"none; set both between 0 and 1, or rollout.sleep=false"
        )
    if config.rollout.max_lag:
        raise ValueError(
            f"rollout.sleep=true does not go with rollout.max_lag={config.rollout.max_lag}, where engines sample "
            f"while the learner updates; set one of them to its default"
        )
    if config.algorithm.prompts_per_step < config.rollout.workers:
        raise ValueError(
            f"rollout.sleep=true lets an engine sleep after it has sampled, and algorithm.prompts_per_step="
            f"{config.algorithm.prompts_per_step} leaves some of rollout.workers={config.rollout.workers} nothing to "
            f"sample; set fewer workers"
        )
