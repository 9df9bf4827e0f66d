"""What a model of a shape costs, from the shape alone: parameters held, floating-point operations, weights in Ray."""

from mxdist.config.schema import ModelConfig

LEAST_OBJECT_STORE = 512 << 20
VERSIONS_IN_STORE = 3  # of the weights: one on its way, one that the engines have, one that goes


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Numbers in all weight matrices and layer norms; the few of biases and of q/k norms are left out."""
    embeddings = vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    experts = model.num_experts or 1
    layer = _attention(model) + experts * _feed_forward(model) + _router(model) + 2 * model.hidden_size
    return embeddings + model.num_hidden_layers * layer + model.hidden_size


def object_store_bytes(model: ModelConfig) -> int:
    """Of the Ray that a run starts: for weights in full precision; what does not fit would go through the disk."""
    weights = parameters(model, model.vocab_size or 0) * (4 if model.dtype == "float32" else 2)
    return max(LEAST_OBJECT_STORE, VERSIONS_IN_STORE * weights)


def forward_flops(model: ModelConfig, vocab_size: int, length: int) -> int:
    """Floating-point operations of a forward pass over one sequence of ``length`` tokens.

    Two for each weight that a token is multiplied with (of the experts, the chosen ones), and those of causal
    attention, whose two products look at half of all pairs of tokens. A backward pass takes twice as many. Source:
    arXiv 2204.02311, appendix B, with the causal half.
    """
    experts = model.num_experts_per_tok if model.num_experts else 1
    layer = _attention(model) + experts * _feed_forward(model) + _router(model)
    weights = model.num_hidden_layers * layer + vocab_size * model.hidden_size
    attention = model.num_hidden_layers * model.num_attention_heads * model.head_dim
    return 2 * weights * length + 2 * attention * length**2


def _attention(model: ModelConfig) -> int:
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads  # q and output, k and v
    return model.hidden_size * heads * model.head_dim


def _feed_forward(model: ModelConfig) -> int:
    """One expert, or the whole of a dense layer's."""
    return 3 * model.hidden_size * (model.moe_intermediate_size if model.num_experts else model.intermediate_size)


def _router(model: ModelConfig) -> int:
    return model.hidden_size * model.num_experts
