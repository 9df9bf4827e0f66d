"""The noise injector on plain tensors: which norms, what noise, and bit-exact restoration."""

import pytest
import torch

from mxdist.aqn.injector import NoiseInjector, NoisyNorm, select_norms
from mxdist.errors import RunStopped
from mxdist.messages import Noise

LAYERS = 3
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
NOISE = Noise(sigma=0.01, seed=11)


def model_norms(dtype: torch.dtype = torch.float32, hidden: int = 4096) -> list[tuple[str, torch.Tensor]]:
    named = [
        (f"model.layers.{layer}.{norm}", torch.nn.Parameter(torch.rand(hidden).to(dtype)))
        for layer in range(LAYERS)
        for norm in NORMS
    ]
    return [*named, ("model.norm", torch.nn.Parameter(torch.ones(hidden, dtype=dtype)))]


def bits(norms: list[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone().view(torch.uint8) for name, weight in norms}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routed", [frozenset(), frozenset({0, 1, 2}), frozenset({1})])
def test_only_norms_that_feed_linears_but_no_router_change_and_all_come_back(
    dtype: torch.dtype, routed: frozenset[int]
) -> None:
    norms = model_norms(dtype)
    injector = NoiseInjector(select_norms(norms, routed), routed)
    before = bits(norms)
    with injector.perturbed(NOISE) as applied:
        during = changed(before, bits(norms))
    expected = [
        f"model.layers.{layer}.{norm}"
        for layer in range(LAYERS)
        for norm in NORMS[:2]
        if norm == "input_layernorm" or layer not in routed
    ]
    assert during == expected
    assert list(injector.names) == sorted(expected)
    assert applied.norms == len(expected)
    assert applied.sigma == pytest.approx(NOISE.sigma, rel=0.02)
    assert changed(before, bits(norms)) == []


def test_weights_come_back_after_an_exception() -> None:
    norms = model_norms()
    before = bits(norms)
    with pytest.raises(KeyError), NoiseInjector(select_norms(norms, frozenset()), frozenset()).perturbed(NOISE):
        raise KeyError
    assert changed(before, bits(norms)) == []


def test_noise_is_absolute_normal_of_the_asked_for_deviation_and_differs_between_norms() -> None:
    norms = model_norms(hidden=100_000)
    clean = {name: weight.detach().clone() for name, weight in norms}
    injector = NoiseInjector(select_norms(norms, frozenset()), frozenset())
    with injector.perturbed(NOISE):
        draws = {name: weight.detach() - clean[name] for name, weight in norms if name in injector.names}
        for draw in draws.values():
            assert draw.std().item() == pytest.approx(0.01, rel=0.02)
            assert abs(draw.mean().item()) < 3e-4
        stacked = torch.stack(list(draws.values()))
        correlations = torch.corrcoef(stacked) - torch.eye(len(stacked))
        assert correlations.abs().max() < 0.03


def test_two_engines_draw_the_same_noise_and_another_seed_draws_another() -> None:
    def noisy(noise: Noise) -> torch.Tensor:
        norm = NoisyNorm(5, "model.layers.5.input_layernorm", torch.ones(64))
        torch.rand(7)  # the global generator plays no part
        with NoiseInjector([norm], frozenset({5})).perturbed(noise):
            return norm.weight.clone()

    assert torch.equal(noisy(NOISE), noisy(NOISE))
    assert not torch.equal(noisy(NOISE), noisy(Noise(NOISE.sigma, NOISE.seed + 1)))


def test_no_noise_needs_no_norm_and_changes_nothing() -> None:
    with NoiseInjector([], frozenset()).perturbed(Noise(0.0, 11)) as applied:
        assert applied == (0, 0)


def test_noise_that_the_dtype_rounds_away_is_counted_as_it_arrived() -> None:
    # Around 1, bfloat16 has steps of 2^-8 below and 2^-7 above.
    norms = [(f"model.layers.{layer}.input_layernorm", torch.ones(512, dtype=torch.bfloat16)) for layer in range(4)]
    injector = NoiseInjector(select_norms(norms, frozenset()), frozenset())
    with injector.perturbed(Noise(1e-3, 11)) as applied:
        moved = torch.cat([weight.float() - 1 for _, weight in norms])
    assert applied.norms == sum(bool(part.any()) for part in moved.split(512))
    assert applied.sigma == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-6)
    assert applied.sigma < 0.9e-3
    with (
        pytest.raises(RunStopped, match="changes no norm weight"),
        injector.perturbed(Noise(1e-4, 11)),
    ):
        pass
    assert all(bool((weight == 1).all()) for _, weight in norms)


def test_noise_that_reaches_no_module_is_an_error() -> None:
    with (
        pytest.raises(RuntimeError, match="no norm of the model can carry it"),
        NoiseInjector([], frozenset()).perturbed(NOISE),
    ):
        pass


def test_nested_noise_is_an_error_and_leaves_the_outer_noise_to_be_undone() -> None:
    norms = model_norms()
    before = bits(norms)
    injector = NoiseInjector(select_norms(norms, frozenset()), frozenset())
    with injector.perturbed(NOISE):
        with pytest.raises(RuntimeError, match="already on"), injector.perturbed(NOISE):
            pass
        assert changed(before, bits(norms))
    assert changed(before, bits(norms)) == []


@pytest.mark.parametrize(
    ("name", "layer", "complaint"),
    [
        ("model.layers.1.post_attention_layernorm", 1, "feeds the router"),
        ("model.layers.1.self_attn.q_norm", 1, "must stay clean"),
        ("model.norm", 0, "must stay clean"),
        ("model.layers.1.input_layernorm", 2, "not a layer norm of layer 2"),
    ],
)
def test_norms_that_must_stay_clean_are_refused_whoever_lists_them(name: str, layer: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        NoiseInjector([(layer, name, torch.ones(4))], frozenset({1}))


def test_a_norm_listed_twice_is_refused() -> None:
    norm = (0, "model.layers.0.input_layernorm", torch.ones(4))
    with pytest.raises(ValueError, match="twice"):
        NoiseInjector([norm, norm], frozenset())
