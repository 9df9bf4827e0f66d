"""Which linear of a model gets which recipe, resolved for learner, engine and controller alike. No torch.

Names are Hugging Face's, such as model.layers.3.mlp.experts.5.gate_proj. Learner and engine keep some linears in one
matrix that is quantised as a whole, so their parts have to agree: q, k and v; gate and up; and the experts of a layer,
which share one quantised input.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mxdist.config.schema import Config
from mxdist.errors import UserError
from mxdist.model.linear_names import linear_names, matrix_name
from mxdist.quant.policy import RecipePolicy
from mxdist.quant.recipe import Recipe, get_recipe

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class ModelRecipes:
    """A recipe for every linear of a model with so many decoder layers."""

    policy: RecipePolicy
    layers: int

    def of(self, module: str) -> Recipe:
        """The recipe of a linear by its Hugging Face name; bf16 for what lies outside the decoder layers."""
        found = _LAYER.match(module)
        return get_recipe("bf16") if found is None else self.policy.resolve(module, int(found[1]), self.layers)

    def shared(self, modules: Iterable[str]) -> Recipe:
        """The one recipe of linears that share a matrix. UserError when there are several."""
        first, *others = modules
        for other in others:
            if self.of(other) != self.of(first):
                raise UserError(
                    f"recipe_overrides gives {first} {self.of(first).name} and {other} {self.of(other).name}, but they "
                    f"are quantised together; use globs that match both or neither"
                )
        return self.of(first)

    def to_dict(self) -> dict[str, Any]:
        """Names and full definitions, so that versions that mean different things by one name do not agree."""
        names = {self.policy.default, *(name for _, name in self.policy.overrides)}
        definitions = {name: get_recipe(name).to_dict() for name in sorted(names)}
        return {"policy": self.policy.to_dict(), "layers": self.layers, "recipes": definitions}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelRecipes":
        """Inverse of ``to_dict``. ValueError when a recipe's definition is not the one known here by its name."""
        for name, definition in data["recipes"].items():
            if Recipe.from_dict(definition) != get_recipe(name):
                raise ValueError(f"recipe {name} is defined differently here; install one version of mxdist everywhere")
        return cls(RecipePolicy.from_dict(data["policy"]), data["layers"])


def recipe_policy(config: Config) -> RecipePolicy:
    """What the configuration says."""
    overrides = tuple((override.modules, override.recipe) for override in config.recipe_overrides)
    edges = config.bf16_layers
    return RecipePolicy(config.recipe, overrides, edges.first, edges.last)


def model_recipes(config: Config) -> ModelRecipes:
    """The recipes of ``config``'s model, checked against its linears.

    Raises:
        UserError: an override matches no linear, or linears that are quantised together would get different recipes.
    """
    recipes = ModelRecipes(recipe_policy(config), config.model.num_hidden_layers)
    names = linear_names(config.model)
    for glob, recipe in recipes.policy.overrides:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UserError(
                f"recipe_overrides: {glob!r} (recipe {recipe}) matches none of the model's {len(names)} linears; "
                f"their names are like {names[0]} and {names[-1]}"
            )
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(_EXPERT.sub(".experts.", matrix_name(name)), []).append(name)
    for group in together.values():
        recipes.shared(group)
    return recipes
