"""Whether the gradients of an update are numbers, found before the optimizer touches a weight."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

NO_RANK = 1 << 31  # more than any rank's number


def first_not_finite(ddp: "DistributedDataParallel") -> str | None:
    """Which gradient is NaN or infinite; every rank must call it, after the gradients have been reduced.

    Returns:
        Megatron's name of the parameter at which the backward pass first met one on the lowest rank that has any:
        the last such parameter in the order of the forward pass. None when all gradients of all ranks are finite.
    """
    buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
    mine = any(not bool(torch.isfinite(buffer.grad_data.sum())) for buffer in buffers)
    return of_lowest_rank(_last_bad(ddp) if mine else None, next(ddp.parameters()).device)


def of_lowest_rank(name: str | None, device: torch.device) -> str | None:
    """What the lowest rank that has a ``name`` calls it, on all ranks; None when none has one. Collective."""
    rank = torch.distributed.get_rank() if name is not None else NO_RANK
    lowest = torch.tensor(rank, device=device)
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    if int(lowest) == NO_RANK:
        return None
    shared = [name if rank == int(lowest) else ""]
    torch.distributed.broadcast_object_list(shared, int(lowest), device=device if device.type == "cuda" else None)
    return shared[0]


def _last_bad(ddp: "DistributedDataParallel") -> str:
    names = [
        name for name, parameter in ddp.module.named_parameters() if not bool(torch.isfinite(parameter.main_grad).all())
    ]
    return names[-1] if names else "an overflowing sum"
