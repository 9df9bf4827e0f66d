"""Every algorithm's advantage, token weights and loss against its published formula."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mxdist.config.schema import Dapo, DrGrpo, Grpo, Gspo, Rloo, Supervised
from mxdist.learner.losses import OBJECTIVES, LossInputs, LossOutput, get_objective

CLIPPED = [Grpo(), Dapo(), DrGrpo(), Gspo()]
POLICY = [*CLIPPED, Rloo()]


def make_inputs(seed: int = 0, sequences: int = 4, length: int = 7, spread: float = 0.3) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(sequences, length, generator=generator) * 3
    mask = torch.zeros(sequences, length, dtype=torch.bool)
    for row in range(sequences):
        mask[row, 2 : 3 + row % (length - 2)] = True
    new = (old + spread * torch.randn(sequences, length, generator=generator)).requires_grad_()
    return LossInputs(
        logprobs=new,
        old_logprobs=old,
        rollout_logprobs=old + 0.1 * torch.randn(sequences, length, generator=generator),
        advantages=torch.randn(sequences, generator=generator),
        mask=mask,
        places=mask.nonzero(as_tuple=True),  # type: ignore[arg-type]  # a pair: the mask has two axes
        weights=torch.rand(sequences, generator=generator),
    )


def mean(output: LossOutput, name: str) -> float:
    found = output.metrics[name]
    return found.total.item() / found.tokens


rewards = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.floats(-2, 2))


@given(rewards)
def test_grpo_advantages_have_mean_zero_and_deviation_one_or_are_all_zero(values: np.ndarray) -> None:
    advantages = get_objective(Grpo()).advantages(values).astype(np.float64)
    assert np.allclose(advantages.mean(axis=1), 0, atol=1e-4)
    flat = values.std(axis=1) <= 1e-8
    assert np.all(advantages[flat] == 0)
    assert np.allclose(advantages[~flat].std(axis=1), 1, atol=1e-3)


@given(rewards)
def test_dr_grpo_advantages_are_only_centred(values: np.ndarray) -> None:
    expected = values - values.mean(axis=1, keepdims=True)
    assert np.allclose(get_objective(DrGrpo()).advantages(values), expected, atol=1e-5)


@given(rewards)
def test_rloo_compares_each_sample_with_the_mean_of_the_others(values: np.ndarray) -> None:
    advantages = get_objective(Rloo()).advantages(values)
    for group, row in zip(values, advantages, strict=True):
        for index, advantage in enumerate(row):
            assert advantage == pytest.approx(group[index] - np.delete(group, index).mean(), abs=1e-5)


@given(arrays(np.int64, st.integers(1, 8), elements=st.integers(1, 20)))
def test_token_weights_normalise_as_published(lengths: np.ndarray) -> None:
    def per_sequence(algorithm: object) -> np.ndarray:
        return get_objective(algorithm).token_weights(lengths, 20) * lengths  # type: ignore[arg-type]

    count = len(lengths)
    assert np.allclose(per_sequence(Grpo()), 1 / count)  # every answer weighs the same
    assert np.allclose(per_sequence(Gspo()), 1 / count)
    assert np.allclose(per_sequence(Dapo()), lengths / lengths.sum())  # every token weighs the same
    assert np.allclose(per_sequence(Supervised()), lengths / lengths.sum())
    assert np.allclose(per_sequence(DrGrpo()), lengths / (20 * count))  # a constant divides, not the length
    assert np.allclose(per_sequence(Rloo()), lengths / count)


@pytest.mark.parametrize("algorithm", [Grpo(), Dapo(), DrGrpo()], ids=lambda a: a.name)
def test_token_clipping_follows_the_ppo_formula(algorithm: Grpo) -> None:
    inputs = make_inputs()
    expected = 0.0
    for row, column in inputs.mask.nonzero().tolist():
        ratio = (inputs.logprobs[row, column] - inputs.old_logprobs[row, column]).exp().item()
        advantage = inputs.advantages[row].item()
        clipped = min(max(ratio, 1 - algorithm.clip_low), 1 + algorithm.clip_high)
        tis = min(float((inputs.old_logprobs - inputs.rollout_logprobs)[row, column].exp()), 2.0)
        expected -= min(ratio * advantage, clipped * advantage) * tis * inputs.weights[row].item()
    assert get_objective(algorithm).loss(inputs).loss.item() == pytest.approx(expected, rel=1e-5)


def test_gspo_clips_a_sequence_as_a_whole() -> None:
    inputs = make_inputs(spread=1e-3)
    output = get_objective(Gspo(tis_cap=None)).loss(inputs)
    expected = 0.0
    for row in range(4):
        mask = inputs.mask[row]
        ratio = (inputs.logprobs - inputs.old_logprobs)[row][mask].mean().exp().item()
        advantage = inputs.advantages[row].item()
        surrogate = min(ratio * advantage, min(max(ratio, 1 - 3e-4), 1 + 4e-4) * advantage)
        expected -= surrogate * int(mask.sum()) * inputs.weights[row].item()
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    output.loss.backward()
    assert torch.all(inputs.logprobs.grad[~inputs.mask] == 0)  # type: ignore[index]


@pytest.mark.parametrize("algorithm", [*POLICY, Supervised()], ids=lambda a: a.name)
def test_statistics_are_means_over_response_tokens(algorithm: Grpo) -> None:
    inputs = make_inputs()
    output = get_objective(algorithm).loss(inputs)
    if algorithm.name == "supervised":
        assert mean(output, "warm_start/loss") == pytest.approx(-inputs.logprobs[inputs.mask].mean().item())
        return
    kl = (inputs.old_logprobs - inputs.logprobs)[inputs.mask].mean().item()
    assert mean(output, "actor/ppo_kl") == pytest.approx(kl, rel=1e-6)
    difference = (inputs.old_logprobs - inputs.rollout_logprobs)[inputs.mask]
    assert mean(output, "rollout_corr/logprob_abs_diff") == pytest.approx(difference.abs().mean().item(), rel=1e-6)
    assert mean(output, "rollout_corr/tis_weight") == pytest.approx(difference.exp().clamp(max=2).mean().item())


@pytest.mark.parametrize("algorithm", POLICY, ids=lambda a: a.name)
def test_on_policy_gradient_is_the_policy_gradient(algorithm: Grpo) -> None:
    inputs = make_inputs()
    logprobs = inputs.old_logprobs.clone().requires_grad_()
    on_policy = replace(inputs, logprobs=logprobs, rollout_logprobs=inputs.old_logprobs)
    get_objective(algorithm).loss(on_policy).loss.backward()
    expected = torch.where(inputs.mask, -(inputs.advantages * inputs.weights)[:, None], 0.0)
    if algorithm.name == "gspo":  # the mean over a sequence shares its gradient evenly: the same row sums
        assert torch.allclose(logprobs.grad.sum(-1), expected.sum(-1), atol=1e-6)  # type: ignore[union-attr]
    else:
        assert torch.allclose(logprobs.grad, expected, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", POLICY, ids=lambda a: a.name)
def test_tokens_outside_the_mask_change_nothing(algorithm: Grpo) -> None:
    inputs = make_inputs()
    noise = torch.where(inputs.mask, 0.0, 5.0)
    disturbed = replace(inputs, logprobs=inputs.logprobs + noise, rollout_logprobs=inputs.rollout_logprobs - noise)
    objective = get_objective(algorithm)
    assert objective.loss(disturbed).loss.item() == pytest.approx(objective.loss(inputs).loss.item(), rel=1e-6)


def test_the_importance_weight_is_capped_and_can_be_switched_off() -> None:
    inputs = make_inputs()
    far = replace(inputs, logprobs=inputs.old_logprobs, rollout_logprobs=inputs.old_logprobs - 3.0)
    plain = get_objective(Grpo(tis_cap=None)).loss(far)
    capped = get_objective(Grpo(tis_cap=2.0)).loss(far)
    assert capped.loss.item() == pytest.approx(2 * plain.loss.item(), rel=1e-6)
    assert mean(capped, "rollout_corr/tis_capped") == 1.0
    assert mean(capped, "rollout_corr/kl") == pytest.approx(-3.0, rel=1e-5)


def test_supervised_loss_is_the_negative_log_likelihood() -> None:
    inputs = make_inputs()
    output = get_objective(Supervised()).loss(inputs)
    expected = -(inputs.logprobs * inputs.weights[:, None])[inputs.mask].sum()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_algorithm_of_the_configuration_has_an_objective() -> None:
    assert set(OBJECTIVES) == {algorithm.name for algorithm in [*POLICY, Supervised()]}
