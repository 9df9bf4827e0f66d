"""What a learner rank computes with: the seam between ``worker`` and Megatron-core or DeepSpeed."""

import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mxdist.config.schema import Config
from mxdist.messages import Transport, WeightPayload
from mxdist.model.recipes import ModelRecipes
from mxdist.model.shape import ModelShape

if TYPE_CHECKING:
    from mxdist.learner.policy import Policy
    from mxdist.model.hf_tensors import HfTensor


@dataclass(frozen=True)
class Place:
    """What a rank is to the others."""

    data_rank: int  # ranks with the same one compute the same sequences
    data_ranks: int
    expert_data_rank: int  # of those that hold the same experts
    reports: bool  # exactly one rank of every ``data_rank``: the first tensor-parallel one of the last stage


class Backend(ABC):
    """One rank of a model in training. Every method is collective."""

    place: Place
    policy: "Policy"
    tensors: "list[HfTensor]"  # what this rank holds of the model

    @abstractmethod
    def owned(self) -> "Iterable[HfTensor]":
        """Those of ``tensors`` that this rank sends, each readable until the next is asked for."""

    @abstractmethod
    def export(self, recipes: ModelRecipes, version: int, transport: Transport) -> WeightPayload:
        """What this rank owns; the payloads of all ranks hold every Hugging Face tensor exactly once, whole."""

    @abstractmethod
    def export_again(self, version: int) -> WeightPayload:
        """A version that was exported to be broadcast, once more, through the host."""

    @abstractmethod
    def names_of_reporting_rank(self, names: list[str]) -> list[str]:
        """The ``names`` of the rank that reports on this rank's sequences."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Begin to write model, optimizer and random state into the existing, empty ``directory``.

        Raises:
            CheckpointFailed: it cannot be written, on all ranks.
        """

    @abstractmethod
    def save_finished(self, wait: bool) -> bool:
        """Whether all ranks have written what they began; ``wait`` until they have.

        Raises:
            CheckpointFailed: a rank could not write, on all ranks.
        """

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Continue from what ``save`` wrote.

        Raises:
            UserError: the checkpoint is of a model of another shape, or of another backend.
        """


def start(
    config: Config, shape: ModelShape, recipes: ModelRecipes, rank: int, world_size: int, rendezvous: str
) -> Backend:
    """Join the other ranks and build the model and its optimizer; weights come from ``model.path`` or the seed.

    Raises:
        UserError: ``model.path`` is no checkpoint of this model.
    """
    if config.learner.backend == "deepspeed":
        _prepare_deepspeed()
        from mxdist.learner.zero_backend import ZeroBackend

        return ZeroBackend(config, shape, recipes, rank, world_size, rendezvous)
    _quieten_megatron()
    from mxdist.model import megatron_cpu

    megatron_cpu.install()
    from mxdist.learner.megatron_backend import MegatronBackend

    return MegatronBackend(config, shape, recipes, rank, world_size, rendezvous)


def leave(config: Config) -> None:
    """Leave the process groups, also those of a backend that could not be built; safe when there are none."""
    if config.learner.backend == "deepspeed":
        _prepare_deepspeed()
        from mxdist.learner import zero_backend

        zero_backend.stop()
    else:
        from mxdist.learner import parallel

        parallel.stop()


def _prepare_deepspeed() -> None:
    """Before DeepSpeed is imported: set what its launcher would set, and silence what it says while it starts."""
    import torch

    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for module in (r"deepspeed\.", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=module)


def _quieten_megatron() -> None:
    """Megatron warns about each optional package that is not there, and logs its settings."""
    for module in (r"megatron\.", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("megatron").setLevel(logging.ERROR)
