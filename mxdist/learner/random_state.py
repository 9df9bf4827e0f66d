"""The random generators of a learner rank, in a file of its own beside the checkpoint's tensors.

Nothing draws from them as long as models have no dropout: initial weights, sampling, noise and stochastic rounding
each derive their seeds. They are kept so that what comes to draw from them resumes where it was.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HOST, DEVICE, TRACKER = "host", "device", "tracker."


def save(directory: Path, tracked: Mapping[str, Tensor] | None = None) -> None:
    """Write this rank's file into ``directory``; ``tracked``: states of generators that a backend keeps, by name."""
    states: dict[str, Tensor] = {HOST: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[DEVICE] = torch.cuda.get_rng_state()
    for name, state in (tracked or {}).items():
        states[TRACKER + name] = state
    save_file({name: state.clone().cpu() for name, state in states.items()}, _file(directory))


def load(directory: Path) -> dict[str, Tensor]:
    """Set what ``save`` wrote, and return what was tracked, when the ranks are as many as then.

    Otherwise the seeds of the start stay in force, and nothing is returned.
    """
    ranks = len(list(directory.glob("random_*.safetensors")))
    if ranks != torch.distributed.get_world_size():
        return {}
    states = load_file(_file(directory))
    torch.set_rng_state(states.pop(HOST))
    if DEVICE in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states.pop(DEVICE))
    return {name.removeprefix(TRACKER): state for name, state in states.items() if name.startswith(TRACKER)}


def _file(directory: Path) -> Path:
    return directory / f"random_{torch.distributed.get_rank()}.safetensors"
