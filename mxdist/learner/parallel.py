"""The process groups of the learner's ranks, by tensor, pipeline, expert and data parallelism.

Ranks of one tensor-parallel group are neighbours; the stages of a pipeline lie furthest apart.
"""

import torch
from megatron.core import parallel_state, tensor_parallel

from mxdist.config.schema import LearnerConfig
from mxdist.learner.backend import Place
from mxdist.learner.rendezvous import join
from mxdist.seeds import derive_seed


def start(rank: int, world_size: int, rendezvous: str, learner: LearnerConfig, run_seed: int, timeout: float) -> Place:
    """Join the other ranks.

    Args:
        rendezvous: "tcp://host:port" of rank 0, the same on every rank.
        learner: the layout; its ranks are ``world_size``.
        timeout: seconds that one collective may take.
    """
    join(rank, world_size, rendezvous, timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=learner.tensor_parallel,
        pipeline_model_parallel_size=learner.pipeline_parallel,
        expert_model_parallel_size=learner.expert_parallel,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=torch.cuda.is_available(),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(derive_seed(run_seed, "learner", bits=31))
    is_first = parallel_state.get_tensor_model_parallel_rank() == 0
    return Place(
        data_rank=parallel_state.get_data_parallel_rank(),
        data_ranks=parallel_state.get_data_parallel_world_size(),
        expert_data_rank=parallel_state.get_expert_data_parallel_rank(),
        reports=is_first and parallel_state.is_pipeline_last_stage(),
    )


def stop() -> None:
    """Leave the groups; safe when ``start`` never ran."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def of_last_stage(names: list[str]) -> list[str]:
    """The ``names`` that the last stage of this rank's pipeline gives; all its stages must call it."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return names
    shared = [names]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    torch.distributed.broadcast_object_list(
        shared, parallel_state.get_pipeline_model_parallel_last_rank(), group, device=device
    )
    return shared[0]
