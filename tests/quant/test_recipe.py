"""Recipes: presets, validation, JSON."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from mxdist.quant.recipe import PRESETS, Fallback, Macro, Operand, Recipe, ScaleRule, get_recipe


def test_presets_are_the_papers_corrections() -> None:
    both = get_recipe("mxfp4_mbs_of")
    assert both.x_fwd == Operand(macro=Macro(128, "static", 8), fallback=Fallback(0.5))
    assert both.w == Operand(macro=Macro(128, "search", 4), fallback=Fallback(0.5))
    assert get_recipe("mxfp4").w == Operand(block=32, scale_rule=ScaleRule.CEIL)
    assert both.dy_dgrad is both.x_wgrad is both.dy_wgrad is None
    assert not get_recipe("bf16").quantises
    assert all(get_recipe(name).quantises for name in PRESETS if name != "bf16")


def test_an_unknown_preset_is_answered_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'mxpf4'; choose one of bf16, mxfp4, mxfp4_mbs"):
        get_recipe("mxpf4")


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_survive_json(name: str) -> None:
    recipe = get_recipe(name)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert all(isinstance(o.scale_rule, ScaleRule) for o in (again.x_fwd, again.w) if o is not None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_fwd": None}, "unknown recipe key 'w_fwd'"),
        ({"w": {"blok": 32}}, "unknown operand key 'blok'"),
        ({"w": {"macro": {"sise": 64}}}, "unknown macro key 'sise'"),
        ({"w": {"fallback": {"alfa": 64}}}, "unknown fallback key 'alfa'"),
        ({"w": {"scale_rule": "sealing"}}, "unknown scale rule 'sealing'"),
        ({"w": "mxfp4"}, "written as an object"),
        ({"name": None}, "needs a name"),
    ],
)
def test_reading_a_recipe_is_strict(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(get_recipe("mxfp4").to_dict() | change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fallback(alpha=1.5), r"alpha lies in \[0, 1\]"),
        (lambda: Fallback(alpha=-0.1), r"alpha lies in \[0, 1\]"),
        (lambda: Fallback(alpha=float("nan")), r"alpha lies in \[0, 1\]"),
        (lambda: Fallback(fraction=1.0), "strictly between"),
        (lambda: Operand(block=24), "block size 24"),
        (lambda: Operand(rounding="up"), "neither nearest nor stochastic"),
        (lambda: Operand(hadamard="yes"), "none, plain, signed"),
        (lambda: Macro(size=32), "macro block size 32"),
        (lambda: Macro(method="dynamic"), "macro method 'dynamic'"),
        (lambda: Macro(bits=9), "1 to 8 mantissa bits"),
        (lambda: Macro(method="search", bits=8), "bits is at most 4"),
        (lambda: Operand(rounding="stochastic", scale_rule="floor"), "needs the ceil scale rule"),
    ],
)
def test_values_out_of_range_are_one_clear_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert str(error.value).endswith(".")


def test_recipes_can_be_read_without_torch() -> None:
    code = "import sys, mxdist.quant.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
