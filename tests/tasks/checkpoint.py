"""A tiny Qwen-like tokenizer on disk: byte-level BPE, ChatML template, ends of sequence as Qwen names them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mxdist.config import Config
from mxdist.config.schema import Gsm8kData, ModelConfig, RolloutConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # the last ids, as in Qwen
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def write_tokenizer(
    directory: Path,
    settings: dict[str, Any] | None = None,
    stops: Any = "both",
    chat_template: str | None = CHAT_TEMPLATE,
    eos: str = "<|im_end|>",
) -> dict[str, int]:
    """Write the files and return the ids of the special tokens.

    Args:
        settings: replaces keys of tokenizer_config.json.
        stops: eos_token_id of generation_config.json; None writes no such file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["Question: Ann has 2 pens and buys 2 more. How many?\nAnswer: #### 4", "step by step"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": {"__type": "AddedToken", "content": eos, "special": True},
        "pad_token": "<|endoftext|>",
        **({} if chat_template is None else {"chat_template": chat_template}),
        **(settings or {}),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if stops is not None:
        named = [ids["<|im_end|>"], ids["<|endoftext|>"]] if stops == "both" else stops
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    return ids


def checkpoint_config(directory: Path, train: str, held_out: str, rows: int = 512, **data: Any) -> Config:
    """GSM8K with the tokenizer of ``directory``; ``rows`` are those of the embedding."""
    return Config(
        model=ModelConfig(path=str(directory), vocab_size=rows, max_position_embeddings=2048),
        data=Gsm8kData(train=train, eval=held_out, **data),
        rollout=RolloutConfig(max_new_tokens=64),
    )
