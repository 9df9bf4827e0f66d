"""A learner rank on DeepSpeed: dense models of transformers, divided by ZeRO; ranks see different sequences."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
from transformers import PreTrainedModel

from mxdist.config.hf_config import model_directory
from mxdist.config.schema import Config
from mxdist.learner import zero_checkpoint
from mxdist.learner.backend import Backend, Place
from mxdist.learner.export import Exporter
from mxdist.learner.rendezvous import join
from mxdist.learner.zero_policy import ZeroPolicy, engine_settings
from mxdist.messages import Transport, WeightPayload
from mxdist.model.divided_weights import DividedMxLinear, DividedTensor
from mxdist.model.draws import GradientDraws
from mxdist.model.hf_tensors import HfTensor, initialise, set_up_linears
from mxdist.model.loading import load_checkpoint
from mxdist.model.recipes import ModelRecipes
from mxdist.model.shape import ModelShape
from mxdist.model.transformers_model import MxLinear, build_transformers, hf_tensors, replace_linears
from mxdist.sync.outgoing import Outgoing


class ZeroBackend(Backend):
    """Built by its constructor; DeepSpeed's groups are global to the process."""

    def __init__(
        self, config: Config, shape: ModelShape, recipes: ModelRecipes, rank: int, world_size: int, rendezvous: str
    ) -> None:
        self._shape = shape
        _start(rank, world_size, rendezvous, config.deadlines.collective)
        self.place = Place(data_rank=rank, data_ranks=world_size, expert_data_rank=rank, reports=True)
        model = _build(config, shape)
        kind = DividedTensor if config.learner.zero_stage == 3 else HfTensor
        # All ranks hold every tensor, or a part of it; they take turns in sending them.
        self.tensors = [
            replace(tensor, is_copy=index % world_size != rank)
            for index, tensor in enumerate(hf_tensors(model, shape, kind))
        ]
        draws = GradientDraws(config.run.seed, rank, rank)
        set_up_linears(self.tensors, recipes, draws)
        if config.model.path is None:
            initialise(self.tensors, shape, config.run.seed)
        else:
            load_checkpoint(model, self.tensors, shape, model_directory(config.model.path))
        self.policy: ZeroPolicy = ZeroPolicy(model, config, draws)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        outgoing = Outgoing(device, f"learner rank {rank}", config.rollout.max_lag + 1)
        self._exporter = Exporter(self.owned, self.tensors, None, outgoing)

    def owned(self) -> Iterator[HfTensor]:
        for tensor in self.tensors:
            # Of a quantised weight every rank has the packed form; the others are put together for all at once.
            with tensor.whole() if tensor.module is None else nullcontext():
                if not tensor.is_copy:
                    yield tensor

    def export(self, recipes: ModelRecipes, version: int, transport: Transport) -> WeightPayload:
        return self._exporter.export(recipes, version, transport)

    def export_again(self, version: int) -> WeightPayload:
        return self._exporter.again(version)

    def names_of_reporting_rank(self, names: list[str]) -> list[str]:
        return names

    def save(self, directory: Path) -> None:
        zero_checkpoint.save(directory, self.policy, self.tensors, self._shape)

    def save_finished(self, wait: bool) -> bool:  # noqa: ARG002
        return True  # DeepSpeed's ``save_checkpoint`` returns when everything is written

    def load(self, directory: Path) -> None:
        zero_checkpoint.load(directory, self.policy, self._shape)


def _start(rank: int, world_size: int, rendezvous: str, timeout: float) -> None:
    join(rank, world_size, rendezvous, timeout)
    # DeepSpeed would look for compilers, and build its collectives in shared memory on a machine without GPUs.
    deepspeed.ops.__compatible_ops__ = {}
    backend = torch.distributed.get_backend()
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def stop() -> None:
    """Leave the groups; safe when there are none."""
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


def _build(config: Config, shape: ModelShape) -> PreTrainedModel:
    learner = config.learner
    if learner.zero_stage < 3:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = build_transformers(shape, learner.recompute)
        replace_linears(model, MxLinear)
        return model
    with deepspeed.zero.Init(config_dict_or_path=engine_settings(config)):
        model = build_transformers(shape, learner.recompute)
    replace_linears(model, DividedMxLinear)
    for module in model.modules():
        if isinstance(module, DividedMxLinear):
            module.recomputed = learner.recompute
    return model
