"""What a policy does with the logits of micro-batches, on a model of one matrix."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mxdist.config.schema import Dapo, DrGrpo, Grpo, Gspo, Rloo, Supervised
from mxdist.learner.losses import get_objective
from mxdist.learner.microbatches import MicroBatch, micro_batches
from mxdist.learner.policy import Finish, Policy, Scored
from mxdist.messages import TrainBatch
from mxdist.model.draws import GradientDraws

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
POLICY_ALGORITHMS = [Grpo(), Dapo(), DrGrpo(), Gspo(), Rloo()]


class NothingIsRead(TorchDispatchMode):
    """Fails at what would make the host wait for a GPU: numbers that it reads, and sizes that depend on values."""

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert func not in READS, func
        assert not by_mask, "a selection by a mask"
        return func(*args, **(kwargs or {}))


class OneMatrix(Policy):
    """A token's logits are its row."""

    def __init__(self) -> None:
        model = nn.Embedding(11, 11)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
        super().__init__(model, GradientDraws(0, 0, 0))

    @property
    def updates(self) -> int:
        return 0

    def _run(self, parts: Sequence[MicroBatch], finish: Finish, forward_only: bool) -> list[Any]:
        results = []
        for part in parts:
            logits = self.model(torch.from_numpy(part.tokens))
            with NothingIsRead():
                loss, result = finish(part, logits)
            if not forward_only:
                loss.backward()
            results.append(result)
        return results

    def _clear_gradients(self) -> None:
        self.model.zero_grad()

    def _update_weights(self, learning_rate: float) -> float:
        raise NotImplementedError


def batch() -> TrainBatch:
    """Five prompts of two tokens with answers of one to five; rows are cut out of a wider array."""
    random = np.random.default_rng(0)
    lengths = np.arange(5) + 3
    mask = (np.arange(9) >= 2) & (np.arange(9) < lengths[:, None])
    old = -random.random((5, 9)).astype(np.float32)
    advantages, weights = (random.normal(size=5).astype(np.float32) for _ in range(2))
    return TrainBatch(random.integers(0, 11, (5, 9)), mask, old * mask, advantages, weights, temperature=0.7)


def logprobs(model: nn.Module, whole: TrainBatch) -> Tensor:
    """[sequences, length], 0 at the first token."""
    tokens = torch.from_numpy(whole.tokens)
    found = (model(tokens) / whole.temperature).log_softmax(-1)
    return nn.functional.pad(found[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2), (1, 0))


@pytest.mark.parametrize("budget", [64, 9])
@pytest.mark.parametrize("algorithm", [*POLICY_ALGORITHMS, Supervised()], ids=lambda algorithm: algorithm.name)
def test_no_micro_batch_waits_for_the_device_and_an_update_is_read_at_its_end(algorithm: Any, budget: int) -> None:
    policy, whole = OneMatrix(), batch()
    parts = micro_batches(whole, 0, 1, budget)
    assert len(parts) == (1 if budget == 64 else 3)
    scored: list[Scored] = policy.accumulate(parts, get_objective(algorithm), None)
    expected, mask = logprobs(policy.model, whole).detach(), torch.from_numpy(whole.response_mask)
    for part, piece in zip(parts, scored, strict=True):
        for row, found, length in zip(part.rows, piece.logprobs, part.lengths, strict=True):
            wanted = (expected * mask)[row, :length]
            np.testing.assert_allclose(found[:length], wanted, atol=1e-6)
    means = {name: sum(piece.metrics[name].total for piece in scored) for name in scored[0].metrics}
    assert {sum(piece.metrics[name].weight for piece in scored) for name in means} == {15.0}
    if algorithm.name == "supervised":
        assert means["warm_start/loss"] == pytest.approx(-expected[mask].sum().item(), rel=1e-5)
    else:
        difference = torch.from_numpy(whole.rollout_logprobs) - expected
        assert means["rollout_corr/kl"] == pytest.approx(difference[mask].sum().item(), rel=1e-5)
    entropies = torch.distributions.Categorical(logits=policy.model.weight / whole.temperature).entropy()
    predicting = torch.from_numpy(whole.tokens)[:, :-1][mask[:, 1:]]
    assert sum(piece.entropy.tokens for piece in scored) == 15
    assert sum(piece.entropy.total for piece in scored) == pytest.approx(entropies[predicting].sum().item(), rel=1e-5)
    assert policy.model.weight.grad is not None


def test_a_rank_without_logits_reports_nothing() -> None:
    class NoLogits(OneMatrix):
        def _run(self, parts: Sequence[MicroBatch], finish: Finish, forward_only: bool) -> list[Any]:  # noqa: ARG002
            return []

    assert NoLogits().score(micro_batches(batch(), 0, 1, 64)) == []
