"""Recipes by module name: what is resolved, what is refused, and that real linears compute with it."""

import pytest
import torch

from mxdist.config.schema import Config
from mxdist.errors import UserError
from mxdist.learner.worker import LearnerWorker
from mxdist.messages import WeightPayload
from mxdist.model.linear_names import linear_names
from mxdist.model.recipes import ModelRecipes, model_recipes
from mxdist.quant.recipe import get_recipe
from tests.model.ranks import DENSE, MOE, RankProcesses

MIXED = [
    {"modules": "*.0.self_attn.*", "recipe": "bf16"},
    {"modules": "*.down_proj", "recipe": "mxfp4"},
    {"modules": "*.down_proj", "recipe": "bf16"},
]


def config_of(overrides: list[dict[str, str]], model: object = MOE, **settings: object) -> Config:
    layout = {"ranks": 1, "expert_parallel": 1}
    return Config(model=model, recipe="mxfp4_mbs_of", recipe_overrides=overrides, learner=layout, **settings)


def test_the_first_override_that_matches_decides() -> None:
    recipes = model_recipes(config_of(MIXED))
    assert recipes.of("model.layers.0.self_attn.q_proj") == get_recipe("bf16")
    assert recipes.of("model.layers.1.self_attn.q_proj") == get_recipe("mxfp4_mbs_of")
    assert recipes.of("model.layers.0.mlp.experts.3.down_proj") == get_recipe("mxfp4")
    assert recipes.of("lm_head") == get_recipe("bf16")


def test_layers_at_either_end_stay_in_bf16_whatever_the_overrides_say() -> None:
    recipes = model_recipes(config_of([{"modules": "*", "recipe": "mxfp4"}], bf16_layers={"last": 1}))
    assert [recipes.of(f"model.layers.{layer}.self_attn.o_proj").name for layer in range(2)] == ["mxfp4", "bf16"]


def test_recipes_survive_json_and_another_meaning_of_a_name_is_refused() -> None:
    recipes = model_recipes(config_of(MIXED, bf16_layers={"first": 1}))
    data = recipes.to_dict()
    assert ModelRecipes.from_dict(data) == recipes
    data["recipes"]["mxfp4"]["w"]["block"] = 16
    with pytest.raises(ValueError, match="recipe mxfp4 is defined differently here"):
        ModelRecipes.from_dict(data)


@pytest.mark.parametrize("glob", ["model.layers.7.*", "lm_head", "*.mlp.gate", "layers.0.*"])
def test_an_override_that_matches_no_linear_is_named(glob: str) -> None:
    escaped = glob.replace("*", "[*]")
    with pytest.raises(UserError, match=rf"'{escaped}' \(recipe bf16\) matches none of the model's 32 linears"):
        model_recipes(config_of([*MIXED, {"modules": glob, "recipe": "bf16"}]))


@pytest.mark.parametrize("glob", ["*.k_proj", "*.up_proj", "*.experts.2.*"])
def test_linears_that_are_quantised_together_may_not_differ(glob: str) -> None:
    with pytest.raises(UserError, match="quantised together; use globs that match both or neither"):
        model_recipes(config_of([{"modules": glob, "recipe": "mxfp4"}]))


@pytest.mark.parametrize("model", [MOE, DENSE])
def test_learner_quantises_and_exports_what_the_recipes_say(model: object, ranks: RankProcesses) -> None:
    recipes = model_recipes(config_of(MIXED, model))
    expected = sorted(name for name in linear_names(model) if recipes.of(name).quantises)
    with ranks.learners(model, "mxfp4_mbs_of", recipe_overrides=MIXED) as learners:
        assert list(learners.reports[0].quantised_modules) == expected
        [payload] = learners.call("export", 0)
        learners.run(check_attention)
    check_payload(payload, recipes, expected)


def check_payload(payload: WeightPayload, recipes: ModelRecipes, expected: list[str]) -> None:
    assert payload.recipes == recipes.to_dict()
    parts = {entry.name.removesuffix(".weight"): set(entry.parts) for entry in payload.entries if entry.kind == "mx"}
    assert sorted(parts) == expected
    for name, held in parts.items():
        plain = recipes.of(name).name == "mxfp4"
        assert held == {"codes", "scales"} | (set() if plain else {"macro", "residual_codes", "residual_scales"})


def check_attention(worker: LearnerWorker) -> None:
    """Layer 0 is exact, layer 1 is not."""
    x = torch.randn(3, 2, 64)
    for layer, exact in zip(worker._policy.model.decoder.layers, (True, False), strict=True):
        linear = layer.self_attention.linear_qkv
        assert torch.equal(linear(x)[0], x @ linear.weight.T) == exact
