"""Questions with worked answers: from a JSON-lines file, or from a dataset on the Hugging Face hub."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mxdist.config.hf_config import is_hub_name
from mxdist.errors import UserError

HUB_CONFIGURATION = "main"  # the one of openai/gsm8k


@dataclass(frozen=True)
class Question:
    question: str
    solution: str
    where: str  # such as "data/train.jsonl line 17", for messages
    key: str  # stable over the whole data set


def read_questions(source: str, key: str, split: str) -> list[Question]:
    """Read the questions that a configuration key names.

    Args:
        source: a path, or a hub name such as "openai/gsm8k".
        key: the configuration key the source came from, for messages.
        split: of the hub dataset; also the start of every question's key.
    Raises:
        UserError: no such file, a malformed line, a missing field, nothing in it, or the hub cannot be read.
    """
    path = find_file(source, key)
    questions = read_hub_dataset(source, key, split) if path is None else read_file(path, key, split)
    if not questions:
        raise UserError(f"{key}={source} holds no questions; give another file")
    return questions


def find_file(source: str, key: str) -> Path | None:
    """The file that a configuration key names; None for a name on the hub.

    Raises:
        UserError: it is neither.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{key}={source} is a directory; name the .jsonl file in it")
    if path.suffix not in (".jsonl", ".json") and is_hub_name(source):
        return None
    raise UserError(
        f"{key}={source} does not exist; give the path of a JSON-lines file, or a Hugging Face dataset name such "
        f"as openai/gsm8k"
    )


def read_file(path: Path, key: str, split: str) -> list[Question]:
    """The questions of a JSON-lines file, by their line numbers; empty lines are passed over."""
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            questions.append(_question(_json_object(line, where, key), where, f"{split}/{number}", key))
    return questions


def _json_object(line: str, where: str, key: str) -> Mapping[str, object]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{key}: {where} is not valid JSON ({error.msg} at column {error.colno}); mend or remove that line"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{key}: {where} holds {type(value).__name__}, not a JSON object with question and answer")
    return value


def _question(row: Mapping[str, object], where: str, name: str, key: str) -> Question:
    fields = []
    for field in ("question", "answer"):
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            fault = "has no" if field not in row else "has an empty or non-text"
            raise UserError(f'{key}: {where} {fault} "{field}"; every line needs a "question" and an "answer"')
        fields.append(value)
    return Question(fields[0], fields[1], where, name)


def read_hub_dataset(source: str, key: str, split: str) -> list[Question]:
    """The rows of one split of a dataset on the hub, or of a local folder that has the form of one.

    Raises:
        UserError: it cannot be read, or a row has no question or answer.
    """
    import datasets  # here because it is heavy, and a file needs none of it

    datasets.disable_progress_bars()
    try:
        names = datasets.get_dataset_config_names(source)
        name = HUB_CONFIGURATION if HUB_CONFIGURATION in names else None
        rows: Iterable[Mapping[str, object]] = datasets.load_dataset(source, name, split=split)
    except Exception as error:  # the library, the hub and the network raise what they like
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{key}={source} is no file here and could not be read from the Hugging Face hub ({reason}); check the "
            f"name and the network, or give the path of a JSON-lines file"
        ) from None
    return [
        _question(row, f"{source} {split} row {number}", f"{split}/{number}", key)
        for number, row in enumerate(rows, start=1)
    ]
