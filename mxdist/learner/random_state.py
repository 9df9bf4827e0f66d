"""The random generators of a learner rank, in a file of its own beside the checkpoint's tensors.

Nothing draws from them as long as models have no dropout: initial weights, sampling, noise and stochastic rounding
each derive their seeds. They are kept so that what comes to draw from them resumes where it was.
"""

from pathlib import Path

import torch
from megatron.core import tensor_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor

HOST, DEVICE, TRACKER = "host", "device", "tracker."


def save(directory: Path) -> None:
    """Write this rank's file into ``directory``."""
    states: dict[str, Tensor] = {HOST: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[DEVICE] = torch.cuda.get_rng_state()
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        states[TRACKER + name] = state
    save_file({name: state.clone().cpu() for name, state in states.items()}, _file(directory))


def load(directory: Path) -> None:
    """Set what ``save`` wrote, when the ranks are as many as then. Otherwise the seeds of the start stay in force."""
    ranks = len(list(directory.glob("random_*.safetensors")))
    if ranks != torch.distributed.get_world_size():
        return
    states = load_file(_file(directory))
    torch.set_rng_state(states.pop(HOST))
    if DEVICE in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states.pop(DEVICE))
    tracked = {name.removeprefix(TRACKER): state for name, state in states.items() if name.startswith(TRACKER)}
    if tracked:
        tensor_parallel.get_cuda_rng_tracker().set_states(tracked)


def _file(directory: Path) -> Path:
    return directory / f"random_{torch.distributed.get_rank()}.safetensors"
