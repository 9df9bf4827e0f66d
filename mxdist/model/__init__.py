"""Model shapes and weights: Hugging Face names on the outside, Megatron-core modules on the inside."""
