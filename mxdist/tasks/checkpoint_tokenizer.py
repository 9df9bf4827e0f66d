"""The tokenizer that comes with a checkpoint: used as it is, never trained, and no code of the checkpoint's is run."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxdist.config.hf_config import model_directory
from mxdist.config.json_file import read_json_object
from mxdist.errors import UserError
from mxdist.tasks.tokenizer import SETTINGS_FILE, TOKENIZER_FILE, TaskTokenizer, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION_FILE = "generation_config.json"  # names the tokens that end an answer
FILES = (
    TOKENIZER_FILE,
    SETTINGS_FILE,
    GENERATION_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
Message = Mapping[str, str]  # "role" and "content"
_PROBE = "0123456789"  # an answer to find again in a rendered chat


class CheckpointTokenizer(TaskTokenizer):
    """Reads ``tokenizer.json`` and its companions from a directory, which must stay readable.

    Stop tokens are the tokenizer's end of sequence and all that ``generation_config.json`` names; for chats also the
    token with which the chat template closes an answer, and that is then the one worked answers end with: a base model
    shown earlier turns ends its own with it, whatever its generation_config.json says.

    Args:
        chat_arguments: further variables of the chat template.
    Raises:
        UserError: a file is missing or malformed, it asks for code of its own, or names no end of sequence.
    """

    def __init__(self, directory: Path, chat: bool, chat_arguments: Mapping[str, Any] | None = None) -> None:
        self._directory = directory
        self._chat_arguments = dict(chat_arguments or {})
        tokenizer, settings = read_tokenizer(directory), _read_json(directory / SETTINGS_FILE)
        if "auto_map" in settings:
            raise UserError(
                f"{directory / SETTINGS_FILE} asks for code of the checkpoint's own (auto_map), which is never run; "
                f"remove it there"
            )
        self._vocabulary = tokenizer.get_vocab()
        self.special_tokens = frozenset(
            token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
        )
        bos, eos, pad = (self._id(settings, f"{name}_token") for name in ("bos", "eos", "pad"))
        stops = [*([] if eos is None else [eos]), *self._generation_stops()]
        if not stops:
            raise UserError(
                f"neither {directory / SETTINGS_FILE} (eos_token) nor {GENERATION_FILE} (eos_token_id) names the token "
                f"that ends an answer; add one of them"
            )
        super().__init__(tokenizer, stops[0] if pad is None else pad, bos, tuple(dict.fromkeys(stops)))
        if chat and (closing := self._closing_token()) is not None:
            self.stop_token_ids = tuple(dict.fromkeys((closing, *stops)))

    @classmethod
    def of_model(cls, path: str, chat: bool, chat_arguments: Mapping[str, Any] | None = None) -> "CheckpointTokenizer":
        """That of ``model.path``, a directory or a hub name."""
        return cls(model_directory(path, only=FILES), chat, chat_arguments)

    def prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Each text with the special tokens that the tokenizer itself puts around one (Qwen: none)."""
        return [tuple(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]

    def chats(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[int, ...]]:
        """Prompts of conversations: each by the chat template, up to where the assistant's next answer begins.

        The caller keeps special tokens (``special_tokens``) out of the contents: they would be read as such.

        Raises:
            UserError: there is no chat template, or it refuses the conversation.
        """
        texts = [self._rendered(conversation, answer_next=True) for conversation in conversations]
        with self._marks_are_tokens():
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [tuple(encoding.ids) for encoding in encodings]

    def save(self, directory: Path) -> None:
        """Copy the checkpoint's files, byte for byte."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self._directory / name).is_file():
                shutil.copyfile(self._directory / name, directory / name)

    @cached_property
    def _template_renderer(self) -> "PreTrainedTokenizerFast":
        from transformers import PreTrainedTokenizerFast  # here because it takes seconds, and only chats need it

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(self._directory), local_files_only=True)
        except Exception as error:  # it raises what its parts raise
            raise UserError(
                f"transformers cannot read the tokenizer in {self._directory} ({_first_line(error)}); mend its "
                f"files, or set data.template=base"
            ) from None
        if tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer in {self._directory} has no chat template, which data.template=chat needs; "
                f"set data.template=base"
            )
        return tokenizer

    def _rendered(self, conversation: Sequence[Message], answer_next: bool) -> str:
        renderer = self._template_renderer
        try:
            return str(
                renderer.apply_chat_template(
                    [dict(message) for message in conversation],
                    tokenize=False,
                    add_generation_prompt=answer_next,
                    **self._chat_arguments,
                )
            )
        except Exception as error:  # a template is a program of the checkpoint's, run in Jinja's sandbox
            raise UserError(
                f"the chat template in {self._directory} cannot render a question ({_first_line(error)}); set "
                f"data.template=base, or mend data.chat_arguments"
            ) from None

    def _closing_token(self) -> int | None:
        """The special token that the chat template puts right behind an answer, if it does."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        _, _, behind = self._rendered(messages, answer_next=False).rpartition(_PROBE)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        found = next((token for token in longest_first if token and behind.startswith(token)), None)
        return None if found is None else self._vocabulary[found]

    def _id(self, settings: Mapping[str, Any], key: str) -> int | None:
        """The id of a special token, named by its text or by an object with "content"; None where there is none."""
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return None
        if text not in self._vocabulary:
            raise UserError(f"{self._directory / SETTINGS_FILE} names {text} as its {key}, but has no such token")
        return self._vocabulary[text]

    def _generation_stops(self) -> list[int]:
        file = self._directory / GENERATION_FILE
        if not file.is_file():
            return []
        found = _read_json(file).get("eos_token_id")
        stops = [] if found is None else found if isinstance(found, list) else [found]
        known = set(self._vocabulary.values())
        for stop in stops:
            if stop not in known:
                raise UserError(f"{file} names {stop} in eos_token_id, but the tokenizer beside it has no such id")
        return stops

    @contextmanager
    def _marks_are_tokens(self) -> Iterator[None]:
        self._tokenizer.encode_special_tokens = False
        try:
            yield
        finally:
            self._tokenizer.encode_special_tokens = True


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _read_json(file: Path) -> dict[str, Any]:
    return read_json_object(file, f"{file.parent} holds no {file.name}; give the tokenizer's files beside the weights")
