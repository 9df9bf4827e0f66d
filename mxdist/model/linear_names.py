"""Hugging Face names of a Qwen3 model's linears, and which of them learner and engine keep in one matrix. No torch."""

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
