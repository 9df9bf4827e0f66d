"""A learner rank on Megatron-core: data, tensor, pipeline and expert parallelism."""

from collections.abc import Iterator
from pathlib import Path

from megatron.core import parallel_state

from mxdist.config.hf_config import model_directory
from mxdist.config.schema import Config
from mxdist.learner import checkpoint, parallel
from mxdist.learner.backend import Backend
from mxdist.learner.export import Exporter
from mxdist.learner.megatron_policy import MegatronPolicy
from mxdist.messages import Transport, WeightPayload
from mxdist.model.draws import GradientDraws
from mxdist.model.gpt import build_gpt
from mxdist.model.hf_tensors import HfTensor, initialise, set_up_linears
from mxdist.model.loading import load_checkpoint
from mxdist.model.recipes import ModelRecipes
from mxdist.model.shape import ModelShape
from mxdist.model.weights import hf_tensors
from mxdist.sync.outgoing import Outgoing


class MegatronBackend(Backend):
    """Built by its constructor; process groups are global to the process."""

    def __init__(
        self, config: Config, shape: ModelShape, recipes: ModelRecipes, rank: int, world_size: int, rendezvous: str
    ) -> None:
        self._shape = shape
        self.place = parallel.start(
            rank, world_size, rendezvous, config.learner, config.run.seed, config.deadlines.collective
        )
        model = build_gpt(shape, config.learner)
        self.tensors = list(hf_tensors(model, shape))
        draws = GradientDraws(config.run.seed, self.place.data_rank, self.place.expert_data_rank)
        set_up_linears(self.tensors, recipes, draws)
        if config.model.path is None:
            initialise(self.tensors, shape, config.run.seed)
        else:
            load_checkpoint(model, self.tensors, shape, model_directory(config.model.path))
        self.policy: MegatronPolicy = MegatronPolicy(model, config.optimizer, draws)
        self._saver = checkpoint.Saver(self.policy, shape)
        outgoing = Outgoing(next(model.parameters()).device, f"learner rank {rank}", config.rollout.max_lag + 1)
        self._exporter = Exporter(self.owned, self.tensors, self.policy.tensor_parallel, outgoing)

    def owned(self) -> Iterator[HfTensor]:
        """Each slice belongs to the first of the data-parallel ranks that hold it; tensor-parallel ranks have one
        each."""
        first = parallel_state.get_data_parallel_rank() == 0
        first_of_experts = parallel_state.get_expert_data_parallel_rank() == 0
        for tensor in self.tensors:
            if not tensor.is_copy and (first_of_experts if tensor.is_expert else first):
                yield tensor

    def export(self, recipes: ModelRecipes, version: int, transport: Transport) -> WeightPayload:
        return self._exporter.export(recipes, version, transport)

    def export_again(self, version: int) -> WeightPayload:
        return self._exporter.again(version)

    def names_of_reporting_rank(self, names: list[str]) -> list[str]:
        return parallel.of_last_stage(names)

    def save(self, directory: Path) -> None:
        self._saver.begin(directory)

    def save_finished(self, wait: bool) -> bool:
        return self._saver.finished(wait)

    def load(self, directory: Path) -> None:
        checkpoint.load(directory, self.policy, self._shape)
