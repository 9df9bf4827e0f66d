"""A Megatron-core GPTModel of a Qwen2 or Qwen3 shape, dense or with experts, in the learner's layout."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from mxdist.config.schema import LearnerConfig
from mxdist.errors import UserError
from mxdist.model.megatron_spec import decoder_spec
from mxdist.model.shape import ModelShape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(shape: ModelShape, learner: LearnerConfig) -> TransformerConfig:
    """Megatron's settings for this shape, on this machine."""
    model = shape.config
    on_gpu = torch.cuda.is_available()
    experts = {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_router_topk": model.num_experts_per_tok,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        # Softmax and then the top k, as published. Where Qwen3 makes these k add to 1 (norm_topk_prob), softmax over
        # the k largest logits is the same.
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_grouped_gemm": False,
    }
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.moe_intermediate_size if shape.is_moe else model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        qk_layernorm=model.family == "qwen3",
        add_qkv_bias=model.family == "qwen2",
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # the activation of ``megatron_spec``, which need not be Transformer Engine's
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=learner.tensor_parallel,
        sequence_parallel=learner.tensor_parallel > 1,  # Megatron demands it of experts
        pipeline_model_parallel_size=learner.pipeline_parallel,
        pipeline_dtype=DTYPES[model.dtype],
        variable_seq_lengths=learner.pipeline_parallel > 1,  # micro-batches differ in tokens
        expert_model_parallel_size=learner.expert_parallel,
        expert_tensor_parallel_size=1,
        params_dtype=DTYPES[model.dtype],
        bf16=model.dtype == "bfloat16",
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,  # ``hf_tensors.initialise`` does it, independently of the layout
        # Gradients are plain sums: the batch's weights hold the normaliser already, see ``learner.policy``.
        calculate_per_token_loss=True,
        # These fusions are compiled with torch.compile or need CUDA extensions.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        batch_p2p_sync=on_gpu,
        moe_token_dispatcher_type="alltoall",  # checked without experts as well
        **(recompute if learner.recompute else {}),
        **(experts if shape.is_moe else {}),
    )


def build_gpt(shape: ModelShape, learner: LearnerConfig) -> GPTModel:
    """The model of this rank, its weights and recipes not yet set. Needs Megatron's process groups."""
    model = shape.config
    if shape.vocab_size % learner.tensor_parallel:
        raise UserError(
            f"learner.tensor_parallel={learner.tensor_parallel} does not divide the {shape.vocab_size} tokens of the "
            f"vocabulary; choose a divisor"
        )
    config = transformer_config(shape, learner)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=decoder_spec(
            model.num_hidden_layers // learner.pipeline_parallel,
            model.num_experts or None,
            config.qk_layernorm,
            model.rope_theta,
        ),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        vocab_size=shape.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type="none",  # ``attention`` does it
        share_embeddings_and_output_weights=model.tie_word_embeddings,
    )
    _mark_parameters(gpt, config)
    return gpt


def _mark_parameters(gpt: GPTModel, config: TransformerConfig) -> None:
    """Say of each weight what Megatron's optimizer and gradient sums go by.

    Its own initialisation would mark the divided ones, so that a norm over ranks counts the others once. And it takes
    experts for ordinary parameters when there is no expert parallelism, though tensor-parallel ranks then hold copies
    of whole experts that see tokens of their own: their gradients have to be summed.
    """
    for module in gpt.modules():
        if not isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            continue
        weight = module.weight
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, int(isinstance(module, RowParallelLinear)), 1)
        if getattr(module, "is_expert", False) and config.tensor_model_parallel_size > 1:
            weight.allreduce = False
