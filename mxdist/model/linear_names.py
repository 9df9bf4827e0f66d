"""Hugging Face names of a model's linears, and which of them learner and engine keep in one matrix. No torch."""

from mxdist.config.schema import ModelConfig

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused linears and the Hugging Face linears whose rows they hold."""


def matrix_name(module_name: str) -> str:
    """The name of the matrix that holds this Hugging Face module: its own, or that of its fused linear.

    Example:
        >>> matrix_name("model.layers.0.self_attn.k_proj")
        'model.layers.0.self_attn.qkv_proj'
    """
    parent, dot, leaf = module_name.rpartition(".")
    return parent + dot + next((fused for fused, parts in FUSED.items() if leaf in parts), leaf)


def parts_of(matrix: str) -> list[str]:
    """Inverse of ``matrix_name``: the Hugging Face modules whose rows a matrix holds, in order."""
    parent, dot, leaf = matrix.rpartition(".")
    return [parent + dot + part for part in FUSED.get(leaf, (leaf,))]


def linear_names(model: ModelConfig) -> list[str]:
    """Every linear of the decoder layers; embedding, head and routers are never quantised and not among them."""
    names = []
    for layer in range(model.num_hidden_layers):
        at = f"model.layers.{layer}"
        names += [f"{at}.self_attn.{part}_proj" for part in "qkvo"]
        for place in [f"{at}.mlp.experts.{expert}" for expert in range(model.num_experts)] or [f"{at}.mlp"]:
            names += [f"{place}.{part}_proj" for part in ("gate", "up", "down")]
    return names
