"""The sampling kernel draws what the torch form draws: on the GPU if there is one, and interpreted elsewhere."""

import pytest
import torch

import tests.interpreted  # noqa: F401

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.rollout import sampling_kernel
from mxdist.rollout.sampling import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = 151_936 if DEVICE == "cuda" else 2 * sampling_kernel.PIECE + 77


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [5, 512, sampling_kernel.PIECE, LARGE])
def test_tokens_and_log_probabilities_are_those_of_the_torch_form(words: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(words)
    logits = (3 * torch.randn(6, words + 3, generator=generator)).to(dtype)[:, :words]  # rows of a padded vocabulary
    temperature = torch.tensor([1.0, 0.0, 0.7, 2.0, 1.0, 1.0])
    seeds = torch.randint(1 << 62, (6,), generator=generator)
    positions = torch.tensor([0, 1, 7, 100_000, 3, 4])
    tokens, logprobs = reference(logits, temperature, seeds, positions)
    found = sampling_kernel.launch(*(each.to(DEVICE) for each in (logits, temperature, seeds, positions)))
    assert found[0].cpu().tolist() == tokens.tolist()
    torch.testing.assert_close(found[1].cpu(), logprobs, atol=4e-6, rtol=2e-6)


def test_a_row_of_nan_names_a_word_and_says_so() -> None:
    words = sampling_kernel.PIECE + 9
    logits = torch.zeros(3, words)
    logits[0, 5], logits[1] = float("nan"), float("nan")
    rows = torch.arange(3)
    tokens, logprobs = sampling_kernel.launch(
        logits.to(DEVICE), torch.ones(3, device=DEVICE), rows.to(DEVICE), rows.to(DEVICE)
    )
    assert 0 <= tokens.min() <= tokens.max() < words
    assert logprobs.isnan().tolist() == [True, True, False]


def test_words_that_are_impossible_are_never_drawn() -> None:
    words, rows = 2 * sampling_kernel.PIECE, 8
    logits = torch.full((rows, words), -float("inf"))
    logits[:, sampling_kernel.PIECE + 3 :][:, :4] = 0.0  # the first piece holds nothing that is possible
    seeds = torch.arange(rows)
    tokens, logprobs = sampling_kernel.launch(
        logits.to(DEVICE), torch.ones(rows, device=DEVICE), seeds.to(DEVICE), seeds.to(DEVICE)
    )
    assert set((tokens - sampling_kernel.PIECE - 3).tolist()) <= {0, 1, 2, 3}
    torch.testing.assert_close(logprobs.cpu(), torch.full((rows,), 0.25).log())
