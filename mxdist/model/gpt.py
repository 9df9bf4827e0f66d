"""A Megatron-core GPTModel of a Qwen3 shape, dense or with experts."""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from mxdist.config.schema import LearnerConfig
from mxdist.model.attention import PackedRotary
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
        # Top-k of the logits, then softmax over those k: equal to Qwen3's softmax, top-k, renormalise.
        "moe_router_pre_softmax": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
    }
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.moe_intermediate_size if shape.is_moe else model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        expert_model_parallel_size=learner.expert_parallel,
        expert_tensor_parallel_size=1,
        params_dtype=DTYPES[model.dtype],
        bf16=model.dtype == "bfloat16",
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,  # ``weights.initialise`` does it, independently of the layout
        # Gradients are plain sums: the batch's weights hold the normaliser already, see ``learner.step``.
        calculate_per_token_loss=True,
        # These fusions are compiled with torch.compile or need CUDA extensions.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        batch_p2p_sync=on_gpu,
        **(experts if shape.is_moe else {}),
    )


def build_gpt(shape: ModelShape, learner: LearnerConfig) -> GPTModel:
    """The model of this rank, its weights and recipes not yet set. Needs Megatron's process groups."""
    model = shape.config
    config = transformer_config(shape, learner)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=decoder_spec(model.num_hidden_layers, model.num_experts or None),
        vocab_size=shape.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        share_embeddings_and_output_weights=False,
    )
    gpt.rotary_pos_emb = PackedRotary(
        kv_channels=model.head_dim,
        rotary_percent=1.0,
        rotary_base=model.rope_theta,
        use_cpu_initialization=config.use_cpu_initialization,
    )
    return gpt
