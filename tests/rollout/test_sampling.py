"""Tokens are drawn with the probabilities of the tempered softmax, from noise of (seed, position, word) alone."""

import math

import pytest
import torch

from mxdist.rollout.sampling import exponential, sample

WORDS = 40


def logits_of(rows: int, words: int = WORDS) -> torch.Tensor:
    return 2 * torch.randn(rows, words, generator=torch.Generator().manual_seed(words))


def seeds_of(rows: int) -> torch.Tensor:
    return torch.randint(1 << 62, (rows,), generator=torch.Generator().manual_seed(rows))


def drawn(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor | int = 0, temperature: float = 0.7
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(logits)
    places = torch.as_tensor(positions).expand(rows).contiguous()
    return sample(logits, torch.full((rows,), temperature), seeds, places)


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_tokens_come_as_often_as_the_softmax_says(over: str) -> None:
    count, logits = 20_000, logits_of(1)
    seeds = seeds_of(count) if over == "seeds" else torch.full((count,), 5)
    positions = torch.arange(count) if over == "positions" else torch.zeros(count, dtype=torch.int64)
    tokens, _ = drawn(logits.expand(count, -1), seeds, positions)
    expected = count * (logits[0] / 0.7).softmax(-1)
    common = expected >= 5
    chi_square = ((torch.bincount(tokens, minlength=WORDS) - expected) ** 2 / expected)[common].sum()
    assert common.sum() > 20
    assert chi_square < common.sum() + 4 * (2 * common.sum()) ** 0.5  # mean and four deviations


def test_a_draw_does_not_depend_on_the_batch_or_its_order() -> None:
    logits, seeds, positions = logits_of(64), seeds_of(64), torch.arange(64) * 977
    tokens, logprobs = drawn(logits, seeds, positions)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn(logits[order], seeds[order], positions[order])[0], tokens[order])
    for row in range(0, 64, 9):
        one, its_logprob = drawn(logits[row : row + 1], seeds[row : row + 1], positions[row : row + 1])
        assert one == tokens[row]
        assert its_logprob.item() == pytest.approx(logprobs[row].item(), abs=1e-6)


def test_every_seed_position_and_word_has_noise_of_its_own() -> None:
    seeds, positions = torch.tensor([1, 1 << 40]).repeat_interleave(64), torch.arange(64).repeat(2)
    noise = exponential(seeds, positions, 103)
    assert noise.unique().numel() > 0.999 * noise.numel()
    tall = exponential(seeds_of(1 << 14), torch.zeros(1 << 14, dtype=torch.int64), 4)
    assert torch.corrcoef(tall.T).sub(torch.eye(4)).abs().max() < 0.03  # the words of one call


def test_the_noise_is_exponential_finite_and_fine_near_zero() -> None:
    noise = exponential(seeds_of(100), torch.arange(100), 20_000).flatten().double()
    assert noise.min() > 0
    assert noise.max() < 17
    assert noise.mean().item() == pytest.approx(1, abs=4e-3)
    for bound in (1e-4, 1e-2, 0.1, 1.0, 3.0):
        expected = -math.expm1(-bound)
        found = (noise < bound).double().mean().item()
        assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / noise.numel()) ** 0.5)


def test_temperature_0_takes_the_first_of_the_most_likely_tokens_whatever_the_seed() -> None:
    logits = logits_of(8)
    logits[3, 30] = logits[3, 20] = 50.0
    tokens, logprobs = drawn(logits, seeds_of(8), temperature=0.0)
    assert torch.equal(tokens.long(), logits.argmax(-1))
    assert tokens[3] == 20
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))
    mixed = sample(logits, torch.tensor([0.0, 1.0] * 4), seeds_of(8), torch.zeros(8, dtype=torch.int64))
    assert torch.equal(mixed[0][::2], tokens[::2])
    assert not torch.equal(mixed[0], tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_the_tempered_distribution(dtype: torch.dtype) -> None:
    logits = logits_of(32).to(dtype)
    tokens, logprobs = drawn(logits, seeds_of(32))
    expected = (logits.float() / 0.7).log_softmax(-1).gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs, expected, atol=2e-6, rtol=1e-6)


def test_nan_gives_a_token_of_the_vocabulary_and_a_log_probability_that_tells() -> None:
    logits = logits_of(2)
    logits[0, 7] = float("nan")
    tokens, logprobs = drawn(logits, seeds_of(2))
    assert 0 <= tokens.min() <= tokens.max() < WORDS
    assert logprobs.isnan().tolist() == [True, False]
