"""vLLM's layer methods that compute with `LiveWeight`: linears, router gate, embeddings, experts.

They replace vLLM's own for every weight-bearing layer and every recipe, bf16 included: on a CPU vLLM's unquantised
methods hand their weights to oneDNN or repack them once, after which a copy into the parameter changes nothing.
With tensor parallelism vLLM asks for a process's share of a matrix. With ``from_disk`` its loader fills whole ones from
a packed checkpoint (``disk_weights``); without, they stay empty until a weight sync.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from mxdist.quant.recipe import Recipe
from mxdist.rollout.disk_weights import DiskWeight, rows_of_experts, rows_of_splits, whole_rows
from mxdist.rollout.experts import route, run_experts
from mxdist.rollout.live_weight import LiveWeight
from mxdist.rollout.products import linear


class LiveLinearMethod(LinearMethodBase):
    """Quantised linears: q/k/v, output, gate/up and down projections."""

    def __init__(self, recipe: Recipe, from_disk: bool = False) -> None:
        self.recipe, self.from_disk = recipe, from_disk

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        del input_size, output_size, extra
        layer.live = LiveWeight(sum(output_partition_sizes), input_size_per_partition, self.recipe.w, params_dtype)
        layer.live_splits = tuple(output_partition_sizes)
        if self.from_disk:
            layer.disk = DiskWeight(layer, layer.live, rows_of_splits(layer.live_splits), sum(layer.live_splits))

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.from_disk:
            layer.disk.finish(layer.prefix)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.live, self.recipe, bias, layer.prefix)


class LiveRouterMethod(LiveLinearMethod):
    """The router: never quantised, computed in float32 whatever the model's dtype. Returns float32 logits."""

    def __init__(self, from_disk: bool = False) -> None:
        super().__init__(Recipe("router"), from_disk)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x.float(), layer.live.values.float(), bias)


class LiveEmbeddingMethod(QuantizeMethodBase):
    """Token embedding and output head: never quantised."""

    def __init__(self, from_disk: bool = False) -> None:
        self.from_disk = from_disk

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        del input_size, output_size, extra
        layer.live = LiveWeight(sum(output_partition_sizes), input_size_per_partition, None, params_dtype)
        if self.from_disk:
            layer.disk = DiskWeight(layer, layer.live, whole_rows, layer.org_vocab_size)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.from_disk:
            layer.disk.finish(type(layer).__name__)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.live.values, bias)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return F.embedding(input_, layer.live.values)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        del layer
        return embed_tokens  # the model's output head is then the very module of its embedding


class LiveExpertsMethod(FusedMoEMethodBase):
    """Routed experts. Monolithic in vLLM's words: it does its own routing, so that every vLLM version and device
    routes as the learner does."""

    def __init__(self, gate_up: Recipe, down: Recipe, moe_config: Any, from_disk: bool = False) -> None:
        super().__init__(moe_config)
        self.gate_up, self.down, self.from_disk = gate_up, down, from_disk

    @property
    def is_monolithic(self) -> bool:
        return True

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        del extra
        wide = intermediate_size_per_partition
        # Rows of expert e: gate then up in live_w13 from 2 e wide on, down in live_w2 from e hidden_size on.
        layer.live_w13 = LiveWeight(num_experts * 2 * wide, hidden_size, self.gate_up.w, params_dtype)
        layer.live_w2 = LiveWeight(num_experts * hidden_size, wide, self.down.w, params_dtype)
        if self.from_disk:
            first, second = rows_of_experts(wide, ("w1", "w3")), rows_of_experts(hidden_size, ("w2",))
            layer.disk = (
                DiskWeight(layer, layer.live_w13, first, num_experts * 2 * wide, "w13_"),
                DiskWeight(layer, layer.live_w2, second, num_experts * hidden_size, "w2_"),
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        for weight in layer.disk if self.from_disk else ():
            weight.finish(layer.layer_name)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        del layer  # no kernel of vLLM's runs here, so none is to be told of scales

    def apply_monolithic(self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None) -> Tensor:
        del input_ids
        weights, experts = route(router_logits, layer.top_k, layer.renormalize)
        return run_experts(
            x, weights, experts, layer.live_w13, layer.live_w2, self.gate_up, self.down, layer.layer_name
        )
