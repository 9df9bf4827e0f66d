"""Where each Hugging Face tensor of a Qwen2 or Qwen3 model lives in the Megatron-core model of this rank, both ways.

Megatron keeps q, k and v in one weight (and bias), interleaved by group of query heads ([q.. k v] per key/value head),
and gate and up in another. Tensor parallelism divides them by groups and by features. What a rank holds of a Hugging
Face tensor is therefore some rows of a parameter, in order, and a contiguous slice of the whole tensor (``Division``).
A pipeline stage holds some of the layers; Megatron numbers them over the whole model, from 1.
"""

from collections.abc import Iterator

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import nn

from mxdist.model.division import Division
from mxdist.model.hf_tensors import HfTensor
from mxdist.model.quantised_weight import QuantisedWeight
from mxdist.model.shape import ModelShape


def hf_tensors(model: GPTModel, shape: ModelShape) -> Iterator[HfTensor]:
    """What this rank holds of every Hugging Face tensor, in the order of the layers."""
    rows, columns = _divided(0), _divided(1)
    if model.pre_process:
        yield _whole("model.embed_tokens.weight", model.embedding.word_embeddings, rows)
    for layer in model.decoder.layers:
        prefix = f"model.layers.{layer.layer_number - 1}"
        yield _whole(f"{prefix}.input_layernorm.weight", layer.input_layernorm)
        yield from _attention(f"{prefix}.self_attn", layer.self_attention, shape)
        yield _whole(f"{prefix}.post_attention_layernorm.weight", layer.pre_mlp_layernorm)
        if shape.is_moe:
            yield _whole(f"{prefix}.mlp.gate.weight", layer.mlp.router)
            experts = layer.mlp.experts.local_experts
            for index, expert in zip(layer.mlp.local_expert_indices, experts, strict=True):
                undivided = Division()  # whole experts on each rank, whatever the tensor parallelism
                yield from _gated(f"{prefix}.mlp.experts.{index}", expert, undivided, undivided, is_expert=True)
        else:
            yield from _gated(f"{prefix}.mlp", layer.mlp, rows, columns, is_expert=False)
    if model.post_process:
        yield _whole("model.norm.weight", model.decoder.final_layernorm)
        if not shape.config.tie_word_embeddings:
            yield _whole("lm_head.weight", model.output_layer, rows)
        elif not model.pre_process:
            yield _whole("model.embed_tokens.weight", model.output_layer, rows, is_copy=True)


def _divided(dimension: int) -> Division:
    """Over the tensor-parallel ranks."""
    index, count = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return Division(dimension, index, count)


def _whole(name: str, module: nn.Module, division: Division | None = None, is_copy: bool = False) -> HfTensor:
    """A tensor that is a module's weight, as far as this rank holds it."""
    rows = (slice(0, len(module.weight)),)  # type: ignore[arg-type]
    return HfTensor(name, module.weight, rows, _ours(module), False, division or Division(), is_copy)  # type: ignore[arg-type]


def _ours(module: nn.Module) -> QuantisedWeight | None:
    return module if isinstance(module, QuantisedWeight) else None


def _attention(prefix: str, attention: SelfAttention, shape: ModelShape) -> Iterator[HfTensor]:
    """The linears and, by family, the biases of q, k and v or the norms of q and k."""
    config, qkv = shape.config, attention.linear_qkv
    division = _divided(0)
    head, groups = config.head_dim, config.num_key_value_heads // division.count
    queries = config.num_attention_heads // config.num_key_value_heads * head  # rows of q in one group
    starts = range(0, groups * (queries + 2 * head), queries + 2 * head)
    for name, first, count in (("q", 0, queries), ("k", queries, head), ("v", queries + head, head)):
        rows = tuple(slice(start + first, start + first + count) for start in starts)
        yield HfTensor(f"{prefix}.{name}_proj.weight", qkv.weight, rows, _ours(qkv), division=division)
        if config.family == "qwen2":
            yield HfTensor(f"{prefix}.{name}_proj.bias", qkv.bias, rows, division=division)
    yield _whole(f"{prefix}.o_proj.weight", attention.linear_proj, _divided(1))
    if config.family == "qwen3":
        yield _whole(f"{prefix}.q_norm.weight", attention.q_layernorm)
        yield _whole(f"{prefix}.k_norm.weight", attention.k_layernorm)


def _gated(prefix: str, mlp: MLP, rows: Division, columns: Division, is_expert: bool) -> Iterator[HfTensor]:
    """Gate, up and down: the first two divided along ``rows``, the third along ``columns``."""
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    width = len(fc1.weight) // 2
    for name, part in (("gate", slice(0, width)), ("up", slice(width, 2 * width))):
        yield HfTensor(f"{prefix}.{name}_proj.weight", fc1.weight, (part,), _ours(fc1), is_expert, rows)
    whole = (slice(0, len(fc2.weight)),)
    yield HfTensor(f"{prefix}.down_proj.weight", fc2.weight, whole, _ours(fc2), is_expert, columns)
