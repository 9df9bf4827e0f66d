"""Tokenizers built by the project: one token a character, or byte-level BPE trained on the task's text.

``checkpoint_tokenizer`` adds those that come with a checkpoint.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mxdist.errors import UserError

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL_TOKENS = [PAD, BOS, EOS]  # ids 0, 1, 2
TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # for ids that are no token: rows that pad an embedding


class TaskTokenizer:
    """Text to token ids and back. Marks such as "<eos>" inside a text are text, never special tokens.

    Attributes:
        stop_token_ids: each ends an answer; the first is the one that worked answers end with.
        vocab_size: one more than the largest id.
    """

    def __init__(
        self, tokenizer: Tokenizer, pad_token_id: int, bos_token_id: int | None, stop_token_ids: tuple[int, ...]
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self.pad_token_id, self.bos_token_id, self.stop_token_ids = pad_token_id, bos_token_id, stop_token_ids
        self._ids = frozenset(tokenizer.get_vocab().values())
        self.vocab_size = max(self._ids) + 1

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of the text alone.

        Raises:
            ValueError: a character tokenizer met a character outside its alphabet.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of many texts, in parallel where the machine allows."""
        try:
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [tuple(encoding.ids) for encoding in encodings]
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"text with a character outside the tokenizer's alphabet ({error})") from None

    def prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Each text after the beginning-of-sequence token."""
        start = () if self.bos_token_id is None else (self.bos_token_id,)
        return [(*start, *ids) for ids in self.encode_all(texts)]

    def answers(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Each text before the end-of-sequence token."""
        return [(*ids, self.stop_token_ids[0]) for ids in self.encode_all(texts)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of an answer, up to the first stop token.

        Other special tokens show, and ids that are no token show as U+FFFD, so that no reward overlooks them.
        """
        ids = [int(token) for token in tokens]
        end = next((index for index, token in enumerate(ids) if token in self.stop_token_ids), len(ids))
        return self._text(ids[:end])

    def decode_prompt(self, tokens: Sequence[int]) -> str:
        """The whole text of a prompt, after the beginning-of-sequence token."""
        start = int(bool(tokens) and tokens[0] == self.bos_token_id)
        return self._text(list(tokens[start:]))

    def _text(self, ids: list[int]) -> str:
        if self._ids.issuperset(ids):
            return self._tokenizer.decode(ids, skip_special_tokens=False)
        parts = ((known, list(part)) for known, part in groupby(ids, key=self._ids.__contains__))
        return "".join(
            self._tokenizer.decode(part, skip_special_tokens=False) if known else UNKNOWN * len(part)
            for known, part in parts
        )

    def save(self, directory: Path) -> None:
        """Write a Hugging Face fast tokenizer, which ``transformers.AutoTokenizer`` and vLLM read."""
        directory.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(directory / TOKENIZER_FILE))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
        }
        (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "TaskTokenizer":
        """Read back what ``save`` wrote.

        Raises:
            UserError: it is not there, or not what was written.
        """
        return own_tokenizer(read_tokenizer(directory))


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer.json of a directory.

    Raises:
        UserError: there is none, or it is not one.
    """
    file = directory / TOKENIZER_FILE
    if not file.is_file():
        raise UserError(
            f"{directory} holds no {TOKENIZER_FILE}, the tokenizer that the model's ids belong to; restore it"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{file} cannot be read as a tokenizer ({error}); restore it") from None


def own_tokenizer(tokenizer: Tokenizer) -> TaskTokenizer:
    """A tokenizer whose special tokens are ``SPECIAL_TOKENS``."""
    found = [id for id in map(tokenizer.token_to_id, SPECIAL_TOKENS) if id is not None]
    if len(found) < len(SPECIAL_TOKENS):
        raise UserError(
            f"a tokenizer without the tokens {', '.join(SPECIAL_TOKENS)} was not made by mxdist; restore the run's own"
        )
    pad, bos, eos = found
    # For whoever else reads the file: a prompt begins with <bos>.
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, bos)])
    return TaskTokenizer(tokenizer, pad, bos, (eos,))


def character_tokenizer(alphabet: str) -> TaskTokenizer:
    """One token for each character of ``alphabet``."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return own_tokenizer(tokenizer)


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
    return own_tokenizer(tokenizer)
