"""One learner rank: a Megatron-core model in its own process, driven by the controller.

    build -> (update | score | export | save | load)* -> shutdown

Every method but ``shutdown`` is collective: all ranks are called with the same arguments (``score`` excepted, where
each has rows of its own), or they wait for each other.
"""

import contextlib
import logging
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mxdist.config.hf_config import model_directory
from mxdist.config.schema import AlgorithmConfig, Config, Supervised
from mxdist.learner.losses import get_objective
from mxdist.learner.microbatches import fill_up, micro_batches, optimizer_batches, rank_share, rejoin
from mxdist.messages import EntropyStatistics, LearnerReport, Mean, TrainBatch, UpdateReport, WeightPayload
from mxdist.model.linear_names import linear_names
from mxdist.model.recipes import model_recipes
from mxdist.model.shape import ModelShape


class LearnerWorker:
    """One instance is one rank, in a process of its own (Megatron's groups are global to the process)."""

    def __init__(self, config: Config, shape: ModelShape, rank: int, world_size: int, rendezvous: str) -> None:
        self.config = config
        self.shape = shape
        self.rank = rank
        self.world_size = world_size
        self.rendezvous = rendezvous
        self.recipes = model_recipes(config)

    def build(self) -> LearnerReport:
        """Join the other ranks, build the model and its optimizer; weights come from ``model.path`` or the seed.

        Raises:
            UserError: ``model.path`` is no checkpoint of this model.
        """
        _quieten_megatron()
        from mxdist.model import megatron_cpu

        megatron_cpu.install()
        from mxdist.learner import parallel
        from mxdist.learner.policy import Policy
        from mxdist.model.draws import GradientDraws
        from mxdist.model.gpt import build_gpt
        from mxdist.model.loading import load_checkpoint
        from mxdist.model.weights import initialise, quantised_modules, set_up_linears

        config = self.config
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, int(config.learner.cpus_per_rank)))
        parallel.start(
            self.rank,
            self.world_size,
            self.rendezvous,
            config.learner.expert_parallel,
            config.run.seed,
            config.deadlines.collective,
        )
        model = build_gpt(self.shape, config.learner.expert_parallel)
        draws = GradientDraws(config.run.seed, self.rank)
        set_up_linears(model, self.shape, self.recipes, draws)
        if config.model.path is None:
            initialise(model, self.shape, config.run.seed)
        else:
            load_checkpoint(model, self.shape, model_directory(config.model.path))
        self._policy = Policy(model, config.optimizer, draws)
        return LearnerReport(
            rank=self.rank,
            quantised_modules=quantised_modules(model, self.shape),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            resident_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )

    def score(self, batch: TrainBatch) -> np.ndarray:
        """Log-probabilities of the response tokens of this rank's own rows, forward only.

        Ranks may be given different numbers of rows, even none, but all of them have to be called.

        Returns:
            float32 [sequences, length], 0 outside the response mask and at the first token.
        """
        from mxdist.learner.parallel import largest

        rows = largest(len(batch))
        scored = self._policy.score(micro_batches(fill_up(batch, rows), self.config.learner.micro_batch))
        return rejoin([piece.logprobs for piece in scored], *batch.tokens.shape)

    def update(
        self, batch: TrainBatch, algorithm: AlgorithmConfig | Supervised, learning_rate: float, watch: bool = False
    ) -> UpdateReport:
        """Make ``algorithm.minibatches`` optimizer updates of the whole step's batch, which every rank is given.

        Update i takes the i-th run of consecutive rows, of which this rank takes every ``world_size``-th.
        ``watch`` adds the metrics of ``learner.telemetry``, if anything is quantised.
        """
        seconds = dict.fromkeys(("old_logprobs", "forward_backward", "optimizer"), 0.0)
        objective = get_objective(algorithm)
        shares = [
            micro_batches(rank_share(rows, self.rank, self.world_size), self.config.learner.micro_batch)
            for rows in optimizer_batches(batch, algorithm.minibatches)
        ]
        old_logprobs: list[list[np.ndarray]] | list[None] = [None] * len(shares)
        if len(shares) > 1:
            with _timed(seconds, "old_logprobs"):
                old_logprobs = [[piece.logprobs for piece in self._policy.score(share)] for share in shares]
        scored, norms = [], []
        with self._watched(shares[0][0], watch, seconds) as means:
            for share, old in zip(shares, old_logprobs, strict=True):
                with _timed(seconds, "forward_backward"):
                    scored += self._policy.accumulate(share, objective, old)
                with _timed(seconds, "optimizer"):
                    norms.append(self._policy.step(learning_rate))
        entropy = sum((piece.entropy for piece in scored), EntropyStatistics())
        for name, mean in [item for piece in scored for item in piece.metrics.items()]:
            means[name] = means[name] + mean if name in means else mean
        if not isinstance(algorithm, Supervised):
            # Adds up over ranks to the loss of an average update.
            loss = sum(piece.loss for piece in scored)
            means["actor/pg_loss"] = Mean(loss, len(shares) / self.world_size)
            means["actor/entropy"] = Mean(entropy.total, entropy.tokens)
        return UpdateReport(means, entropy, float(np.mean(norms)), learning_rate, seconds)

    @contextlib.contextmanager
    def _watched(self, first: TrainBatch, watch: bool, seconds: dict[str, float]) -> Iterator[dict[str, Mean]]:
        """Around the updates of a step; the metrics are in the dictionary at the end."""
        means: dict[str, Mean] = {}
        if not (watch and any(self.recipes.of(name).quantises for name in linear_names(self.shape.config))):
            yield means
            return
        from mxdist.learner.telemetry import Telemetry

        seconds["telemetry"] = 0.0
        telemetry = Telemetry(self._policy, self.shape)
        with _timed(seconds, "telemetry"):
            telemetry.before_step(first)
        with telemetry.watching_gradients():
            yield means
        with _timed(seconds, "telemetry"):
            means |= telemetry.after_step()

    def export(self, version: int) -> WeightPayload:
        """The tensors that this rank owns, quantised ones as the packed parts of what the forward pass uses."""
        from mxdist.learner.export import export

        return export(self._policy.model, self.shape, self.recipes, version)

    def save(self, directory: Path) -> None:
        """Write model and optimizer into the existing, empty ``directory``."""
        from mxdist.learner import checkpoint

        checkpoint.save(directory, self._policy, self.shape)

    def load(self, directory: Path) -> None:
        """Continue from what ``save`` wrote.

        Raises:
            UserError: the checkpoint is of a model of another shape.
        """
        from mxdist.learner import checkpoint

        checkpoint.load(directory, self._policy, self.shape)

    def shutdown(self) -> None:
        """Leave the process groups."""
        from mxdist.learner import parallel

        parallel.stop()


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] += time.perf_counter() - start


def _quieten_megatron() -> None:
    """Megatron warns about each optional package that is not there, and logs its settings."""
    for module in (r"megatron\.", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("megatron").setLevel(logging.ERROR)
