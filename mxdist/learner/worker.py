"""One learner rank: a model in training, in its own process, driven by the controller; ``backend`` computes.

    build -> (update | score | export | save | load)* -> shutdown

Every method but ``shutdown`` is collective: all ranks are called with the same arguments, or they wait for each other.
What they report adds up over all ranks: of those that compute the same sequences, one reports for the others.
"""

import contextlib
import math
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mxdist.config.schema import AlgorithmConfig, Config, Supervised
from mxdist.errors import NotFinite
from mxdist.learner.losses import Objective, get_objective
from mxdist.learner.microbatches import (
    ROWS_OF_GPU_KERNELS,
    MicroBatch,
    micro_batches,
    optimizer_batches,
    padding_saved,
    rejoin,
)
from mxdist.learner.phases import timed
from mxdist.learner.trace import traced
from mxdist.messages import (
    EntropyStatistics,
    LearnerReport,
    Mean,
    SharedBuckets,
    TrainBatch,
    Transport,
    UpdateReport,
    WeightPayload,
)
from mxdist.model.linear_names import linear_names
from mxdist.model.recipes import model_recipes
from mxdist.model.shape import ModelShape
from mxdist.observe.usage import process_usage

if TYPE_CHECKING:
    from mxdist.learner.policy import Scored

NOTHING = Mean(0.0, 0.0)


class LearnerWorker:
    """One instance is one rank, in a process of its own (process groups are global to the process)."""

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
        from mxdist.learner import backend
        from mxdist.model.hf_tensors import quantised_modules
        from mxdist.sync.shared import device_place

        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, int(self.config.learner.cpus_per_rank)))
        self._backend = backend.start(
            self.config, self.shape, self.recipes, self.rank, self.world_size, self.rendezvous
        )
        self._policy, self._place = self._backend.policy, self._backend.place
        return LearnerReport(
            rank=self.rank,
            quantised_modules=quantised_modules(self._backend.tensors),
            parameters=sum(parameter.numel() for parameter in self._policy.model.parameters()),
            resident_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            device=device_place(),
        )

    def score(self, batch: TrainBatch) -> np.ndarray:
        """Log-probabilities of the response tokens of ``batch``, the same on every rank, forward only.

        Returns:
            float32 [sequences, length], 0 outside the response mask, at the first token, and in the rows that other
            ranks report: the sum over all ranks is the whole.
        """
        parts = self._micro_batches(batch)
        scored = self._policy.score(parts)
        pieces = [piece.logprobs for piece in scored] if self._place.reports else []
        return rejoin(pieces, parts[: len(pieces)], *batch.tokens.shape)

    def update(
        self,
        batch: TrainBatch,
        algorithm: AlgorithmConfig | Supervised,
        learning_rate: float,
        watch: bool = False,
        trace: Path | None = None,
    ) -> UpdateReport:
        """Make ``algorithm.minibatches`` optimizer updates of the whole step's batch, which every rank is given.

        Update i takes the i-th run of consecutive rows, shared out by ``micro_batches``. ``watch`` adds the metrics of
        ``learner.telemetry``, if anything is quantised. ``trace`` is a file for rank 0's trace of it all.
        """
        with traced(trace if self.rank == 0 else None):
            return self._update(batch, algorithm, learning_rate, watch)

    def _update(
        self, batch: TrainBatch, algorithm: AlgorithmConfig | Supervised, learning_rate: float, watch: bool
    ) -> UpdateReport:
        seconds = dict.fromkeys(("old_logprobs", "forward", "backward", "optimizer"), 0.0)
        objective = get_objective(algorithm)
        batches = optimizer_batches(batch, algorithm.minibatches)
        shares = [self._micro_batches(rows) for rows in batches]
        old_logprobs: list[list[np.ndarray]] | list[None] = [None] * len(shares)
        if len(shares) > 1:
            with timed(seconds, "old_logprobs"):
                old_logprobs = [[piece.logprobs for piece in self._policy.score(share)] for share in shares]
        scored, norms = [], []
        with self._watched(shares[0][0], watch, seconds) as means:
            for share, old in zip(shares, old_logprobs, strict=True):
                scored += self._accumulate(share, objective, old, seconds)
                with timed(seconds, "optimizer"):
                    norms.append(self._step(learning_rate))
        entropy = sum((piece.entropy for piece in scored), EntropyStatistics())
        means |= self._means(batches, shares, scored, isinstance(algorithm, Supervised))
        if not self._place.reports:
            entropy = EntropyStatistics()
        return UpdateReport(means, entropy, float(np.mean(norms)), learning_rate, seconds, process_usage())

    def _accumulate(
        self,
        share: Sequence[MicroBatch],
        objective: Objective,
        old_logprobs: Sequence[np.ndarray] | None,
        seconds: dict[str, float],
    ) -> "list[Scored]":
        """Forward and backward, which alternate: what is not the one is the other, waits of a pipeline included."""
        both = {"forward_backward": 0.0}
        self._policy.forwards.take()
        with timed(both, "forward_backward"):
            scored = self._policy.accumulate(share, objective, old_logprobs)
        forward = self._policy.forwards.take()
        seconds["forward"] += forward
        seconds["backward"] += both["forward_backward"] - forward
        return scored

    def _step(self, learning_rate: float) -> float:
        """The gradients' norm; NaN when the update is left out because they are not finite."""
        try:
            return self._policy.step(learning_rate)
        except NotFinite:
            if self.config.guards.not_finite != "skip":
                raise
            return float("nan")

    def _micro_batches(self, batch: TrainBatch) -> list[MicroBatch]:
        place, learner = self._place, self.config.learner
        # Sequence parallelism cuts the row of tokens between the tensor-parallel ranks.
        multiple = math.lcm(learner.tensor_parallel, ROWS_OF_GPU_KERNELS if torch.cuda.is_available() else 1)
        return micro_batches(batch, place.data_rank, place.data_ranks, learner.micro_batch_tokens, multiple)

    def _means(
        self,
        batches: Sequence[TrainBatch],
        shares: Sequence[Sequence[MicroBatch]],
        scored: "Sequence[Scored]",
        supervised: bool,
    ) -> dict[str, Mean]:
        """What the micro-batches report, under the same names on every rank; nothing of it on ranks that do not."""
        means: dict[str, Mean] = {}
        for name, mean in [item for piece in scored for item in piece.metrics.items()]:
            means[name] = means.get(name, NOTHING) + mean
        if not supervised:
            # Adds up over ranks to the loss of an average update.
            means["actor/pg_loss"] = Mean(sum(piece.loss for piece in scored), len(shares) / self._place.data_ranks)
            entropy = sum((piece.entropy for piece in scored), EntropyStatistics())
            means["actor/entropy"] = Mean(entropy.total, entropy.tokens)
        means["perf/padding_fraction"] = sum((part.padding_fraction for share in shares for part in share), NOTHING)
        # Every rank knows the whole of it, so each reports its share.
        unpacked = sum((padding_saved(batch) for batch in batches), NOTHING)
        ranks = self._place.data_ranks
        means["perf/padding_fraction_unpacked"] = Mean(unpacked.total / ranks, unpacked.weight / ranks)
        names = self._backend.names_of_reporting_rank(list(means))
        return means if self._place.reports else dict.fromkeys(names, NOTHING)

    @contextlib.contextmanager
    def _watched(self, first: MicroBatch, watch: bool, seconds: dict[str, float]) -> Iterator[dict[str, Mean]]:
        """Around the updates of a step; the metrics are in the dictionary at the end."""
        means: dict[str, Mean] = {}
        if not (watch and any(self.recipes.of(name).quantises for name in linear_names(self.shape.config))):
            yield means
            return
        from mxdist.learner.telemetry import Telemetry

        seconds["telemetry"] = 0.0
        telemetry = Telemetry(self._policy, self._backend.owned(), self.shape, self.recipes)
        with timed(seconds, "telemetry"):
            telemetry.before_step(first)
        with telemetry.watching_gradients():
            yield means
        with timed(seconds, "telemetry"):
            means |= telemetry.after_step()

    def export(self, version: int, transport: Transport = "host") -> WeightPayload:
        """The tensors that this rank owns, quantised ones as the packed parts of what the forward pass uses."""
        payload = self._backend.export(self.recipes, version, transport)
        if self.config.rollout.sleep:
            torch.cuda.empty_cache()  # the engine on this GPU is about to wake up
        return payload

    def probe(self) -> SharedBuckets:
        """A few bytes of this rank's GPU, for engines to try whether they can read it. They stay until the next."""
        from mxdist.sync.shared import Probe

        self._probe = Probe(f"learner rank {self.rank}")
        return self._probe.shared

    def export_again(self, version: int) -> WeightPayload:
        """A version that was exported to be broadcast or as changes, whole, for engines that it did not reach or that
        have nothing to lay changes over. RunStopped: too late."""
        return self._backend.export_again(version)

    def save(self, directory: Path) -> None:
        """Begin to write model, optimizer and random state into the existing, empty ``directory``.

        Raises:
            CheckpointFailed: it cannot be written.
        """
        self._backend.save(directory)

    def save_finished(self, wait: bool) -> bool:
        """Whether what ``save`` began is written; ``wait`` until it is.

        Raises:
            CheckpointFailed: it could not be written.
        """
        return self._backend.save_finished(wait)

    def load(self, directory: Path) -> None:
        """Continue from what ``save`` wrote.

        Raises:
            UserError: the checkpoint is of a model of another shape.
        """
        self._backend.load(directory)

    def shutdown(self) -> None:
        """Leave the process groups."""
        from mxdist.learner import backend

        backend.leave(self.config)
