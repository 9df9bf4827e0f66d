"""The resolved shape of a model: configuration plus vocabulary, as a Hugging Face config and names of tensors."""

from dataclasses import dataclass

from mxdist.config.schema import ModelConfig


@dataclass(frozen=True)
class ModelShape:
    """A model whose vocabulary is known. Every process builds its side of the model from this."""

    config: ModelConfig
    vocab_size: int
    bos_token_id: int | None
    stop_token_ids: tuple[int, ...]  # each ends an answer; the first is the tokenizer's own end of sequence
    pad_token_id: int

    @property
    def is_moe(self) -> bool:
        return self.config.num_experts > 0

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint by its Hugging Face name, layer by layer; with tied embeddings no lm_head."""
        hidden = self.config.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.config.num_hidden_layers):
            shapes |= self._layer_shapes(f"model.layers.{layer}")
        shapes["model.norm.weight"] = (hidden,)
        if not self.config.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def _layer_shapes(self, at: str) -> dict[str, tuple[int, ...]]:
        config, hidden = self.config, self.config.hidden_size
        heads, groups = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        shapes: dict[str, tuple[int, ...]] = {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.o_proj.weight": (hidden, heads),
        }
        for name, rows in (("q", heads), ("k", groups), ("v", groups)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if config.family == "qwen2":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        if config.family == "qwen3":
            shapes |= {f"{at}.self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
        if self.is_moe:
            shapes[f"{at}.mlp.gate.weight"] = (config.num_experts, hidden)
        width = config.moe_intermediate_size if self.is_moe else config.intermediate_size
        for place in [f"{at}.mlp.experts.{expert}" for expert in range(config.num_experts)] or [f"{at}.mlp"]:
            shapes |= {f"{place}.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
            shapes[f"{place}.down_proj.weight"] = (hidden, width)
        return shapes

    def hf_config(self) -> dict[str, object]:
        """The ``config.json`` of this shape, for transformers and vLLM (families qwen2, qwen3 and qwen3_moe)."""
        config = self.config
        common: dict[str, object] = {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": config.rms_norm_eps,
            "initializer_range": config.initializer_range,
            "vocab_size": self.vocab_size,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.stop_token_ids) if len(self.stop_token_ids) > 1 else self.stop_token_ids[0],
            "pad_token_id": self.pad_token_id,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "tie_word_embeddings": config.tie_word_embeddings,
            "use_cache": True,
            "torch_dtype": config.dtype,
        }
        if config.family == "qwen2":
            return {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "intermediate_size": config.intermediate_size,
                "use_sliding_window": False,
                **common,
            }
        common["attention_bias"] = False
        if not self.is_moe:
            return {
                "architectures": ["Qwen3ForCausalLM"],
                "model_type": "qwen3",
                "intermediate_size": config.intermediate_size,
                **common,
            }
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "intermediate_size": config.intermediate_size,
            "moe_intermediate_size": config.moe_intermediate_size,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            **common,
        }
