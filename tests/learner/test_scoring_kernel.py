"""The kernels that score tokens, against torch's operations in pieces."""

import pytest
import torch

import tests.interpreted  # noqa: F401

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.learner import scoring_kernel, scoring_pieces
from tests.quant.kernels.data import DEVICE

PLACES = torch.tensor([2, 3, 7, 0], device=DEVICE)


def logits_and_tokens(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(9, width + 8, generator=generator)[:, :width] * 3  # of a wider tensor
    tokens = torch.randint(0, width, (4,), generator=generator)
    tokens[1], tokens[3] = -1, width  # of other ranks
    return logits.to(DEVICE), tokens.to(DEVICE)


@pytest.mark.parametrize("width", [11, 4096, 9001])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sums_and_gradients_are_those_of_torchs_operations(width: int, temperature: float) -> None:
    logits, tokens = logits_and_tokens(width)
    found = scoring_kernel.row_sums(logits, PLACES, tokens, temperature)
    expected = scoring_pieces.row_sums(logits, PLACES, tokens, temperature)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)
    shift, scale = expected[0] + expected[1].log(), torch.tensor([1.0, -2.0, 0.5, 0.0], device=DEVICE)
    gradients = [torch.zeros(9, width, device=DEVICE) for _ in range(2)]
    for gradient, by in zip(gradients, (scoring_kernel, scoring_pieces), strict=True):
        by.write_gradient(gradient, logits, PLACES, tokens, shift, scale, temperature)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_large_and_rising_logits_overflow_nowhere() -> None:
    logits = torch.linspace(-3e4, 3e4, 9001, device=DEVICE).expand(9, -1).contiguous()
    tokens = torch.tensor([9000, 0, 5, 8999], device=DEVICE)
    found = scoring_kernel.row_sums(logits, PLACES, tokens, 1.0)
    torch.testing.assert_close(found, scoring_pieces.row_sums(logits, PLACES, tokens, 1.0), rtol=1e-6, atol=1e-6)


def test_nothing_to_score_gives_nothing() -> None:
    logits, tokens = logits_and_tokens(11)
    assert scoring_kernel.row_sums(logits, PLACES[:0], tokens[:0], 1.0).shape == (4, 0)
