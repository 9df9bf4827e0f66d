"""The model in training, whatever backend computes: what micro-batches, losses and updates mean here.

A backend's ``Policy`` says how a pass over micro-batches and an optimizer update are made. Gradients are plain sums
over micro-batches and ranks, because the weights of a batch hold the normaliser of the whole optimizer update already.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mxdist.errors import NotFinite
from mxdist.learner.losses import LossInputs, LossOutput, Objective
from mxdist.learner.losses.base import TokenSum
from mxdist.learner.microbatches import MicroBatch, one_micro_batch
from mxdist.learner.phases import Stopwatch
from mxdist.learner.scoring import token_scores
from mxdist.messages import EntropyStatistics, Mean
from mxdist.model.draws import GradientDraws
from mxdist.model.quantised_weight import requantise
from mxdist.quant.transfer import sent

Finish = Callable[[MicroBatch, Tensor], tuple[Tensor, Any]]
"""Given a micro-batch and its logits, [tokens, this rank's vocabulary], returns the loss and a result."""


@dataclass(frozen=True)
class Scored:
    """What one micro-batch gave."""

    logprobs: np.ndarray  # float32 [rows, length]
    entropy: EntropyStatistics
    loss: float
    metrics: dict[str, Mean]


@dataclass(frozen=True)
class _OnDevice:
    """The same before it is read. ``loss`` shares memory with the loss itself: no backend may change that in place."""

    logprobs: Tensor  # float32 [rows, length]
    entropy: TokenSum
    loss: Tensor  # float32 []
    metrics: dict[str, TokenSum]


class Policy(ABC):
    """``model`` with its gradients and its optimizer state; every method is collective."""

    tensor_parallel: ProcessGroup | None = None
    """The ranks that hold parts of the vocabulary, in order; their rows of tokens are of a multiple of them."""

    def __init__(self, model: nn.Module, draws: GradientDraws) -> None:
        self.model = model
        self.forwards = Stopwatch("forward")
        self._draws = draws

    @property
    @abstractmethod
    def updates(self) -> int:
        """Optimizer updates made so far; a checkpoint carries the count on."""

    @abstractmethod
    def _run(self, parts: Sequence[MicroBatch], finish: Finish, forward_only: bool) -> list[Any]:
        """One pass over micro-batches; adds to the gradients unless ``forward_only``. Each forward is a lap of
        ``forwards``.

        Returns:
            The results, on the ranks that have logits; nothing on the others.
        """

    @abstractmethod
    def _clear_gradients(self) -> None:
        """What accumulates from here on belongs to another update."""

    @abstractmethod
    def _update_weights(self, learning_rate: float) -> float:
        """Clip and update; returns the gradients' norm before clipping.

        Raises:
            NotFinite: a gradient is not finite; no weight has changed.
        """

    def score(self, parts: Sequence[MicroBatch]) -> list[Scored]:
        """Forward only. Empty on the ranks of all pipeline stages but the last."""
        with torch.no_grad():
            return _read(self._run(parts, self._finish(None), forward_only=True))

    def forward(self, sequences: Sequence[np.ndarray]) -> list[Tensor]:
        """Logits [length, vocabulary] of each sequence, int64 [length], from one pass; every rank must call it.

        Empty on the ranks of all pipeline stages but the last.
        """
        part = one_micro_batch(sequences, 1 if self.tensor_parallel is None else self.tensor_parallel.size())

        def finish(_: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
            return logits.new_zeros(()), self._whole_vocabulary(logits)[: len(part.tokens) - part.padding]

        with torch.no_grad():
            found = self._run([part], finish, forward_only=True)
        return list(found[0].split(part.lengths.tolist())) if found else []

    def accumulate(
        self, parts: Sequence[MicroBatch], objective: Objective, old_logprobs: Sequence[np.ndarray] | None
    ) -> list[Scored]:
        """Forward and backward of the micro-batches of one optimizer update; leaves the summed gradients.

        Args:
            old_logprobs: by micro-batch, as ``score`` gave them before the first update of this step; None when this
                is the only update, so that they are those of this very pass.
        Returns:
            As ``score`` does.
        """
        self._clear_gradients()
        old = itertools.repeat(None) if old_logprobs is None else iter(old_logprobs)

        def loss(part: MicroBatch, logprobs: Tensor) -> LossOutput:
            return objective.loss(_loss_inputs(part, logprobs, next(old)))

        return _read(self._run(parts, self._finish(loss), forward_only=False))

    def step(self, learning_rate: float) -> float:
        """Clip, update the weights and quantise them anew. Returns the gradients' norm before clipping.

        Raises:
            NotFinite: a gradient is not finite; no weight has changed.
        """
        norm = self._update_weights(learning_rate)
        requantise(self.model)
        return norm

    def _not_finite(self, parameter: str) -> NotFinite:
        return NotFinite(
            f"a gradient is not finite, first that of {parameter} in the backward pass of update {self.updates + 1}; "
            f"lower optimizer.lr, look at the data of this step, or set guards.not_finite"
        )

    def _whole_vocabulary(self, logits: Tensor) -> Tensor:
        """[tokens, vocabulary] from the parts of the tensor-parallel ranks."""
        return logits

    def _finish(self, loss: Callable[[MicroBatch, Tensor], LossOutput] | None) -> Finish:
        """From the logits of a micro-batch to its loss and what is reported of it; waits for nothing on the device."""

        def finish(part: MicroBatch, logits: Tensor) -> tuple[Tensor, _OnDevice]:
            scored = part.scored
            rows, columns, places, tokens = (
                _sent(index, logits.device) for index in (*scored, part.predicted_at, part.batch.tokens[scored])
            )
            chosen, entropy = token_scores(logits, places, tokens, part.batch.temperature, self.tensor_parallel)
            logprobs = torch.zeros(part.batch.tokens.shape, device=logits.device).index_put((rows, columns), chosen)
            output = LossOutput(logprobs.sum(), {}) if loss is None else loss(part, logprobs)
            found = _OnDevice(logprobs.detach(), TokenSum(entropy, len(tokens)), output.loss.detach(), output.metrics)
            return output.loss, found

        return finish

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _read(found: Sequence[_OnDevice]) -> list[Scored]:
    """A pass's results, for whose end this waits once."""
    sums = [part.loss for part in found] + [part.entropy.total for part in found]
    sums += [each.total for part in found for each in part.metrics.values()]
    numbers = iter(torch.stack(sums).tolist() if sums else [])
    losses, entropies = ([next(numbers) for _ in found] for _ in range(2))
    return [
        Scored(
            part.logprobs.cpu().numpy(),
            EntropyStatistics(entropy, part.entropy.tokens),
            loss,
            {name: Mean(next(numbers), float(each.tokens)) for name, each in part.metrics.items()},
        )
        for part, loss, entropy in zip(found, losses, entropies, strict=True)
    ]


def _loss_inputs(part: MicroBatch, logprobs: Tensor, old_logprobs: np.ndarray | None) -> LossInputs:
    batch, device = part.batch, logprobs.device
    rows, columns = batch.response_mask.nonzero()
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() if old_logprobs is None else _sent(old_logprobs, device),
        rollout_logprobs=_sent(batch.rollout_logprobs, device),
        advantages=_sent(batch.advantages, device),
        mask=_sent(batch.response_mask, device),
        places=(_sent(rows, device), _sent(columns, device)),
        weights=_sent(batch.weights, device),
    )


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    return sent(torch.from_numpy(np.ascontiguousarray(array)), device)  # what has gaps would be waited for
