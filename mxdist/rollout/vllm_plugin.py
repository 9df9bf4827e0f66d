"""vLLM's quantisation config "mxdist", registered through the entry point group ``vllm.general_plugins``.

An engine uses it when its model directory's config.json says

    "quantization_config": {"quant_method": "mxdist", "recipes": {...}}     (as ModelRecipes.to_dict gives them)

This file decides which layer gets which method; the methods are in ``methods``.
"""

from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from mxdist.model.linear_names import parts_of
from mxdist.model.packed_checkpoint import METHOD_NAME, read_quantisation_config
from mxdist.model.recipes import ModelRecipes
from mxdist.quant.recipe import Recipe
from mxdist.rollout.methods import LiveEmbeddingMethod, LiveExpertsMethod, LiveLinearMethod, LiveRouterMethod


class MxdistConfig(QuantizationConfig):
    """Gives every weight-bearing layer a method of ours, whatever its recipe.

    Building a layer raises ValueError when its recipe draws random numbers or removes a mean in the forward pass,
    which no engine does.
    """

    def __init__(self, recipes: ModelRecipes, from_disk: bool = False) -> None:
        super().__init__()
        self.recipes, self.from_disk = recipes, from_disk

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MxdistConfig":
        """From the quantization_config of a config.json; "packed" there says that the weights lie beside it."""
        return cls(*read_quantisation_config(config))

    def get_name(self) -> str:
        return METHOD_NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # bfloat16

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if self.from_disk and get_tensor_model_parallel_world_size() > 1:
            raise ValueError("a packed checkpoint is loaded whole: use tensor_parallel_size=1, or a bf16 export")
        if isinstance(layer, VocabParallelEmbedding):  # embed_tokens and lm_head
            return LiveEmbeddingMethod(self.from_disk)
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, LinearBase):
            if prefix.endswith(".mlp.gate"):
                return LiveRouterMethod(self.from_disk)
            return LiveLinearMethod(self._recipe(prefix), self.from_disk)
        return None  # attention: its KV cache stays in the model's dtype

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> LiveExpertsMethod:
        places = [f"{prefix.removesuffix('.routed_experts')}.{e}" for e in range(layer.moe_config.num_experts)]
        return LiveExpertsMethod(
            self._recipe(*(f"{place}.gate_up_proj" for place in places)),
            self._recipe(*(f"{place}.down_proj" for place in places)),
            layer.moe_config,
            self.from_disk,
        )

    def _recipe(self, *matrices: str) -> Recipe:
        """The one recipe of the Hugging Face linears in these matrices."""
        recipe = self.recipes.shared(part for matrix in matrices for part in parts_of(matrix))
        for operand in (recipe.x_fwd, recipe.w):
            if operand is not None and (operand.needs_seed or operand.mean):
                raise ValueError(f"recipe {recipe.name}: a rollout engine's forward pass takes neither seeds nor means")
        return recipe


def register() -> None:
    """Make "mxdist" known to vLLM. Called by vLLM in each of its processes; calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if METHOD_NAME not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD_NAME)(MxdistConfig)
