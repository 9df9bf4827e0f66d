"""Tasks: problems, prompts, tokenizers built from them, and rewards."""
