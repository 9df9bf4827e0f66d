"""Where each Hugging Face tensor of a Qwen3 model lives in the Megatron-core model of this rank, both ways.

Megatron keeps q, k and v in one weight, interleaved by group of query heads ([q.. k v] per key/value head), and gate
and up in another. Every Hugging Face tensor is therefore some rows of a parameter, in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from mxdist.model.draws import GradientDraws
from mxdist.model.linear_names import matrix_name
from mxdist.model.quantised_weight import QuantisedWeight
from mxdist.model.recipes import ModelRecipes
from mxdist.model.shape import ModelShape
from mxdist.quant.tensor import MXTensor, cat_rows
from mxdist.seeds import derive_seed


@dataclass(frozen=True)
class HfTensor:
    """One Hugging Face tensor held by this rank."""

    name: str
    parameter: nn.Parameter
    rows: tuple[slice, ...]  # of the parameter, in the order of the Hugging Face tensor
    linear: QuantisedWeight | None  # of ours, that owns the parameter
    is_expert: bool

    @property
    def module(self) -> QuantisedWeight | None:
        """The linear that owns the parameter, when its weight is quantised."""
        return self.linear if self.linear is not None and self.linear.quantises_weight else None

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.stop - part.start for part in self.rows), *self.parameter.shape[1:])

    def read(self) -> Tensor:
        """The master weight's values, as a copy or a view."""
        parts = [self.parameter.detach()[part] for part in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set the master weight's values; ``values`` must have this tensor's shape."""
        if tuple(values.shape) != self.shape:
            raise ValueError(f"{self.name} has shape {self.shape}, not {tuple(values.shape)}")
        start = 0
        for part in self.rows:
            stop = start + part.stop - part.start
            self.parameter[part].copy_(values[start:stop])
            start = stop

    def quantised(self) -> tuple[MXTensor, Tensor]:
        """The rows of the quantised weight: packed, and the very values that the forward pass multiplies."""
        assert self.module is not None
        packed, values = self.module.quantised(), self.module.quantised_values()
        assert values is not None
        return cat_rows([packed[part] for part in self.rows]), torch.cat([values[part] for part in self.rows])


def hf_tensors(model: GPTModel, shape: ModelShape) -> Iterator[HfTensor]:
    """Every Hugging Face tensor that this rank holds all of, in the order of the layers."""
    yield _whole("model.embed_tokens.weight", model.embedding.word_embeddings)
    for layer in model.decoder.layers:
        prefix = f"model.layers.{layer.layer_number - 1}"
        yield _whole(f"{prefix}.input_layernorm.weight", layer.input_layernorm)
        yield from _attention(f"{prefix}.self_attn", layer.self_attention, shape)
        yield _whole(f"{prefix}.post_attention_layernorm.weight", layer.pre_mlp_layernorm)
        if shape.is_moe:
            yield _whole(f"{prefix}.mlp.gate.weight", layer.mlp.router)
            experts = layer.mlp.experts.local_experts
            for index, expert in zip(layer.mlp.local_expert_indices, experts, strict=True):
                yield from _gated(f"{prefix}.mlp.experts.{index}", expert, is_expert=True)
        else:
            yield from _gated(f"{prefix}.mlp", layer.mlp, is_expert=False)
    yield _whole("model.norm.weight", model.decoder.final_layernorm)
    yield _whole("lm_head.weight", model.output_layer)


def quantised_modules(model: GPTModel, shape: ModelShape) -> tuple[str, ...]:
    """Hugging Face names of the quantised linears of this rank, sorted."""
    names = (tensor.name.removesuffix(".weight") for tensor in hf_tensors(model, shape) if tensor.module is not None)
    return tuple(sorted(names))


def set_up_linears(model: GPTModel, shape: ModelShape, recipes: ModelRecipes, draws: GradientDraws) -> None:
    """Tell every linear its name, its recipe, and where its random draws come from."""
    for tensor in hf_tensors(model, shape):
        if tensor.linear is not None:
            name = tensor.name.removesuffix(".weight")
            recipe = recipes.of(name)
            tensor.linear.name = matrix_name(name)
            tensor.linear.recipe = recipe if recipe.quantises else None
            tensor.linear.draws = draws


def initialise(model: GPTModel, shape: ModelShape, run_seed: int) -> None:
    """Random initial weights: N(0, initializer_range), norms 1.

    Every tensor has a generator of its own, seeded with its Hugging Face name, so that the weights do not depend on
    how they are divided over ranks.
    """
    for tensor in hf_tensors(model, shape):
        if len(tensor.shape) == 1:
            tensor.write(torch.ones(tensor.shape))
            continue
        generator = torch.Generator().manual_seed(derive_seed(run_seed, "init", tensor.name))
        tensor.write(torch.empty(tensor.shape).normal_(0.0, shape.config.initializer_range, generator=generator))


def _whole(name: str, module: nn.Module) -> HfTensor:
    return _rows(name, module, (slice(0, len(module.weight)),))  # type: ignore[arg-type]


def _rows(name: str, module: nn.Module, rows: tuple[slice, ...], is_expert: bool = False) -> HfTensor:
    linear = module if isinstance(module, QuantisedWeight) else None
    return HfTensor(name, module.weight, rows, linear, is_expert)  # type: ignore[arg-type]


def _attention(prefix: str, attention: SelfAttention, shape: ModelShape) -> Iterator[HfTensor]:
    config = shape.config
    head, groups = config.head_dim, config.num_key_value_heads
    queries = config.num_attention_heads // groups * head  # rows of q in one group
    starts = range(0, groups * (queries + 2 * head), queries + 2 * head)
    for name, first, count in (("q", 0, queries), ("k", queries, head), ("v", queries + head, head)):
        rows = tuple(slice(start + first, start + first + count) for start in starts)
        yield _rows(f"{prefix}.{name}_proj.weight", attention.linear_qkv, rows)
    yield _whole(f"{prefix}.o_proj.weight", attention.linear_proj)
    yield _whole(f"{prefix}.q_norm.weight", attention.q_layernorm)
    yield _whole(f"{prefix}.k_norm.weight", attention.k_layernorm)


def _gated(prefix: str, mlp: MLP, is_expert: bool) -> Iterator[HfTensor]:
    width = len(mlp.linear_fc1.weight) // 2
    yield _rows(f"{prefix}.gate_proj.weight", mlp.linear_fc1, (slice(0, width),), is_expert)
    yield _rows(f"{prefix}.up_proj.weight", mlp.linear_fc1, (slice(width, 2 * width),), is_expert)
    yield _rows(f"{prefix}.down_proj.weight", mlp.linear_fc2, (slice(0, len(mlp.linear_fc2.weight)),), is_expert)
