"""Parameters and operations against published models."""

from mxdist.config.model_costs import forward_flops, object_store_bytes, parameters
from mxdist.config.schema import ModelConfig

QWEN25_1_5B = ModelConfig(
    family="qwen2", num_experts=0, tie_word_embeddings=True, hidden_size=1536, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, head_dim=128, intermediate_size=8960,
)  # fmt: skip
QWEN3_30B_A3B = ModelConfig(
    hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
)  # fmt: skip
VOCABULARY = 151_936


def test_parameters_of_published_models_are_met_to_the_biases_and_norms_left_out() -> None:
    assert parameters(QWEN25_1_5B, VOCABULARY) == 1_543_714_304 - 28 * (12 + 2 + 2) * 128  # biases of q, k and v
    assert parameters(QWEN3_30B_A3B, VOCABULARY) == 30_532_122_624 - 48 * 2 * 128  # norms of q and k


def test_a_token_costs_two_operations_a_weight_it_meets_and_attention_grows_with_the_square() -> None:
    dense = parameters(QWEN25_1_5B, VOCABULARY) - 28 * 2 * 1536 - 1536  # tied: the head is the one embedding
    assert forward_flops(QWEN25_1_5B, VOCABULARY, 1) == 2 * dense + 2 * 28 * 1536
    assert forward_flops(QWEN25_1_5B, VOCABULARY, 1000) == 1000 * 2 * dense + 2 * 28 * 1536 * 1000**2


def test_only_the_chosen_experts_count() -> None:
    a_token = forward_flops(QWEN3_30B_A3B, VOCABULARY, 1)
    assert 2 * 2.9e9 < a_token < 2 * 3.3e9  # "A3B"; without the embedding, which is looked up


def test_the_object_store_holds_three_versions_of_large_weights() -> None:
    assert object_store_bytes(ModelConfig()) == 512 << 20
    large = QWEN25_1_5B.model_copy(update={"vocab_size": VOCABULARY})
    assert object_store_bytes(large) == 3 * 4 * parameters(QWEN25_1_5B, VOCABULARY)
    assert object_store_bytes(large.model_copy(update={"dtype": "bfloat16"})) == object_store_bytes(large) // 2
