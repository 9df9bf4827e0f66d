"""The process groups of the learner's ranks: expert parallelism over some of them, data parallelism for the rest."""

import os
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel

from mxdist.seeds import derive_seed


def start(rank: int, world_size: int, rendezvous: str, expert_parallel: int, run_seed: int, timeout: float) -> None:
    """Join the other ranks.

    Args:
        rendezvous: "tcp://host:port" of rank 0, the same on every rank.
        expert_parallel: ranks that share one set of experts; divides ``world_size``.
        timeout: seconds that one collective may take.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=on_gpu,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(derive_seed(run_seed, "learner", bits=31))


def stop() -> None:
    """Leave the groups; safe when ``start`` never ran."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def largest(value: int) -> int:
    """The largest ``value`` of all data-parallel ranks; every rank must call it."""
    tensor = torch.tensor(value, device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, parallel_state.get_data_parallel_group())
    return int(tensor)
