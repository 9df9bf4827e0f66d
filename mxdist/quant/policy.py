"""Which module gets which recipe: a default, exceptions by name, and layers kept in BF16 at both ends. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mxdist.quant.recipe import Recipe, checked_keys, get_recipe


@dataclass(frozen=True, slots=True)
class RecipePolicy:
    """The recipe of every linear of a model.

    default      recipe name for modules that nothing below speaks of.
    overrides    ordered (glob, recipe name) pairs over module names; the first glob that matches decides. `*` matches
                 dots too: ("*.experts.*", "mxfp4_mbs_of") with default "bf16" quantises the experts only.
    first, last  so many decoder layers at either end stay in bf16, whatever the globs say.

    ValueError for an unknown recipe name or a negative count.
    """

    default: str
    overrides: tuple[tuple[str, str], ...] = ()
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", tuple((str(glob), str(name)) for glob, name in self.overrides))
        for name in (self.default, *(name for _, name in self.overrides)):
            get_recipe(name)
        if self.first < 0 or self.last < 0:
            raise ValueError(f"the numbers of bf16 layers are not negative: first {self.first}, last {self.last}.")

    def resolve(self, module_name: str, layer_index: int | None = None, num_layers: int | None = None) -> Recipe:
        """Return the recipe of a module; `layer_index` counts decoder layers from 0, None outside them.

        ValueError when `last` is used and a layer comes without `num_layers`.
        """
        if layer_index is not None:
            if self.last and num_layers is None:
                raise ValueError(f"keeping the last layers in bf16 needs the number of layers to place {module_name}.")
            if layer_index < self.first or (num_layers is not None and layer_index >= num_layers - self.last):
                return get_recipe("bf16")
        for glob, name in self.overrides:
            if fnmatchcase(module_name, glob):
                return get_recipe(name)
        return get_recipe(self.default)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain JSON-serialisable dict that `from_dict` turns back into an equal policy."""
        overrides = [list(pair) for pair in self.overrides]
        return {"default": self.default, "overrides": overrides, "first": self.first, "last": self.last}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RecipePolicy:
        """Inverse of `to_dict`. ValueError on an unknown key."""
        return cls(**checked_keys(cls, data))
