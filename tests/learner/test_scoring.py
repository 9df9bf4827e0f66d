"""Log-probabilities and entropies against their definitions, token by token."""

import numpy as np
import pytest
import torch

from mxdist.learner.scoring import token_scores

LOGITS = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0)) * 2
TOKENS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_the_token_that_follows(temperature: float) -> None:
    logprobs, entropy = token_scores(LOGITS, TOKENS, MASK, temperature)
    total = 0.0
    for row, column in np.ndindex(*MASK.shape):
        if not MASK[row, column]:
            assert logprobs[row, column] == 0
            continue
        distribution = (LOGITS[row, column - 1].double() / temperature).softmax(-1)
        assert logprobs[row, column].item() == pytest.approx(distribution[TOKENS[row, column]].log().item(), abs=1e-5)
        total -= float((distribution * distribution.log()).sum())
    assert entropy.tokens == int(MASK.sum())
    assert entropy.total == pytest.approx(total, rel=1e-5)


def test_the_first_token_is_never_scored() -> None:
    logprobs, entropy = token_scores(LOGITS, TOKENS, torch.ones(3, 6, dtype=torch.bool), 1.0)
    assert (logprobs[:, 0] == 0).all()
    assert entropy.tokens == 15


def test_gradients_reach_only_the_logits_that_predict_scored_tokens() -> None:
    logits = LOGITS.clone().requires_grad_()
    token_scores(logits, TOKENS, MASK, 1.0)[0].sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1)[:, :-1] > 0, MASK[:, 1:])


def test_nothing_to_score_still_has_a_gradient() -> None:
    # A rank without response tokens takes part in the backward pass: the others wait for it.
    logits = LOGITS.clone().requires_grad_()
    logprobs, entropy = token_scores(logits, TOKENS, torch.zeros(3, 6, dtype=torch.bool), 1.0)
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0
    assert entropy.tokens == 0
