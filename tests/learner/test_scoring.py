"""Log-probabilities and entropies against their definitions, and their gradients against autograd's."""

import math

import pytest
import torch

from mxdist.learner import scoring_pieces
from mxdist.learner.scoring import token_scores

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(18, 11, generator=GENERATOR) * 2
PLACES = torch.tensor([2, 3, 7, 8, 9, 10, 16])
TOKENS = torch.randint(0, 11, (7,), generator=GENERATOR)


@pytest.fixture(params=[2**24, 25, 1], ids=["one piece", "pieces of two", "pieces of one"])
def _piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_pieces, "PIECE", request.param)


@pytest.mark.usefixtures("_piece")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_entropies_and_gradients_are_those_of_a_log_softmax(temperature: float) -> None:
    logits, exact = LOGITS.clone().requires_grad_(), LOGITS.double().requires_grad_()
    logprobs, entropy = token_scores(logits, PLACES, TOKENS, temperature)
    distribution = (exact[PLACES] / temperature).log_softmax(-1)
    expected = distribution[torch.arange(7), TOKENS]
    assert torch.allclose(logprobs.double(), expected, atol=1e-5)
    assert entropy.item() == pytest.approx(-(distribution.exp() * distribution).sum().item(), rel=1e-5)
    weights = torch.randn(7, generator=GENERATOR)
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert torch.allclose(logits.grad.double(), exact.grad, atol=1e-6)


def test_large_logits_overflow_nowhere() -> None:
    logits = (LOGITS * 100 + 1e4).requires_grad_()
    logprobs, entropy = token_scores(logits, PLACES, TOKENS, 0.5)
    logprobs.sum().backward()
    assert torch.allclose(logprobs, (logits[PLACES] / 0.5).log_softmax(-1)[torch.arange(7), TOKENS], rtol=1e-4)
    assert 0 <= entropy.item() < 7 * math.log(11)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_gradients_reach_only_the_logits_that_predict_scored_tokens() -> None:
    logits = LOGITS.clone().requires_grad_()
    token_scores(logits, PLACES, TOKENS, 1.0)[0].sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(-1).nonzero().squeeze(1).tolist() == PLACES.tolist()


def test_bfloat16_logits_are_scored_in_float32() -> None:
    logits = LOGITS.bfloat16().requires_grad_()
    logprobs, _ = token_scores(logits, PLACES, TOKENS, 1.0)
    logprobs.sum().backward()
    assert torch.allclose(logprobs, logits.float()[PLACES].log_softmax(-1)[torch.arange(7), TOKENS], atol=1e-6)
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_nothing_to_score_still_has_a_gradient() -> None:
    # A rank without response tokens takes part in the backward pass: the others wait for it.
    logits = LOGITS.clone().requires_grad_()
    logprobs, entropy = token_scores(logits, PLACES[:0], TOKENS[:0], 1.0)
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0
    assert entropy == 0
