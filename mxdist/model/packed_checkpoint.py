"""What a config.json says to vLLM of this project's weights; written by engine and export, read by the plugin."""

from typing import Any

from mxdist.model.recipes import ModelRecipes

METHOD_NAME = "mxdist"


def quantisation_config(recipes: ModelRecipes, packed: bool) -> dict[str, Any]:
    """The quantization_config.

    Args:
        packed: the weights lie beside the config.json, as "MODULE.codes" and the other parts of an MXTensor where they
            are quantised and as "MODULE.weight" elsewhere; else they come by weight sync.
    """
    return {"quant_method": METHOD_NAME, "recipes": recipes.to_dict(), "packed": packed}


def read_quantisation_config(config: dict[str, Any]) -> tuple[ModelRecipes, bool]:
    """Inverse of ``quantisation_config``. ValueError when a recipe means something else here."""
    return ModelRecipes.from_dict(config["recipes"]), bool(config.get("packed", False))
