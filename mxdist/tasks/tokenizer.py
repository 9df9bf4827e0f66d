"""Tokenizers built by the project: one token a character, or byte-level BPE trained on the task's text."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL_TOKENS = [PAD, BOS, EOS]  # ids 0, 1, 2


class TaskTokenizer:
    """Text to token ids and back. Marks such as "<eos>" inside a text are text, never special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab()
        self.pad_token_id, self.bos_token_id, self.eos_token_id = (vocabulary[token] for token in SPECIAL_TOKENS)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of the text alone.

        Raises:
            ValueError: a character tokenizer met a character outside its alphabet.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of many texts, in parallel where the machine allows."""
        try:
            return [tuple(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"text with a character outside the tokenizer's alphabet ({error})") from None

    def prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Each text after the beginning-of-sequence token."""
        return [(self.bos_token_id, *ids) for ids in self.encode_all(texts)]

    def answers(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Each text before the end-of-sequence token."""
        return [(*ids, self.eos_token_id) for ids in self.encode_all(texts)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text up to the first end-of-sequence token. Other special tokens show, so that no reward overlooks them."""
        ids = [int(token) for token in tokens]
        if self.eos_token_id in ids:
            ids = ids[: ids.index(self.eos_token_id)]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write a Hugging Face fast tokenizer, which ``transformers.AutoTokenizer`` and vLLM read."""
        directory.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "TaskTokenizer":
        """Read back what ``save`` wrote."""
        return cls(Tokenizer.from_file(str(directory / "tokenizer.json")))


def character_tokenizer(alphabet: str) -> TaskTokenizer:
    """One token for each character of ``alphabet``."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return TaskTokenizer(tokenizer)


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> TaskTokenizer:
    """Byte-level BPE with one token a digit. Any text round-trips; the same texts give the same tokenizer.

    Args:
        vocab_size: upper bound, special tokens and the 256 bytes included; little text yields fewer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TaskTokenizer(tokenizer)
