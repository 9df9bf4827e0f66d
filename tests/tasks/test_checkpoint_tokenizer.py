"""Tokenizers of checkpoints: used as they are, every end of sequence found, and what does not fit refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mxdist.errors import UserError
from mxdist.tasks.checkpoint_tokenizer import CheckpointTokenizer
from mxdist.tasks.registry import make_task
from mxdist.tasks.tokenizer import TaskTokenizer, character_tokenizer
from tests.tasks.checkpoint import checkpoint_config, write_tokenizer
from tests.tasks.data import rows, write_questions

TURN = [{"role": "user", "content": "How many?"}]


def test_all_ends_of_sequence_that_a_checkpoint_names_are_stops(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path)
    tokenizer = CheckpointTokenizer(tmp_path, chat=False)
    assert tokenizer.stop_token_ids == (ids["<|im_end|>"], ids["<|endoftext|>"])
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (ids["<|endoftext|>"], None)
    end = tokenizer.encode(" 4")
    assert tokenizer.decode([*end, ids["<|im_end|>"], *end]) == tokenizer.decode([*end, ids["<|endoftext|>"]]) == " 4"


def test_a_base_models_chat_also_stops_where_its_template_closes_an_answer(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path, stops=None, eos="<|endoftext|>")
    assert CheckpointTokenizer(tmp_path, chat=False).stop_token_ids == (ids["<|endoftext|>"],)
    chat = CheckpointTokenizer(tmp_path, chat=True)
    assert chat.stop_token_ids == (ids["<|im_end|>"], ids["<|endoftext|>"])
    assert chat.answers(["4"])[0][-1] == ids["<|im_end|>"]


def test_a_chat_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = CheckpointTokenizer(tmp_path, chat=True)
    expected = theirs.apply_chat_template(TURN, add_generation_prompt=True)["input_ids"]
    assert list(ours.chats([TURN])[0]) == expected
    assert ours.decode_prompt(ours.chats([TURN])[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    silent = CheckpointTokenizer(tmp_path, chat=True, chat_arguments={"enable_thinking": False})
    assert silent.decode_prompt(silent.chats([TURN])[0]).endswith("<think></think>")


def test_marks_in_a_text_are_text_and_unknown_ids_show(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path)
    tokenizer = CheckpointTokenizer(tmp_path, chat=False)
    assert not set(ids.values()) & set(tokenizer.prompts(["a<|im_end|>b"])[0])
    four = tokenizer.encode("4")
    assert tokenizer.decode([*four, 500, 501, *four]) == "4\ufffd\ufffd4"
    assert tokenizer.vocab_size == max(ids.values()) + 1


def test_the_files_are_copied_as_they_were_and_read_the_same(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    first = CheckpointTokenizer(tmp_path / "model", chat=True)
    first.save(tmp_path / "copy")
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    assert all((tmp_path / "copy" / n).read_bytes() == (tmp_path / "model" / n).read_bytes() for n in names)
    again = CheckpointTokenizer(tmp_path / "copy", chat=True)
    assert (again.stop_token_ids, again.chats([TURN])) == (first.stop_token_ids, first.chats([TURN]))


def test_a_tokenizer_that_begins_texts_with_a_token_does_so_in_prompts_alone(tmp_path: Path) -> None:
    character_tokenizer("0123").save(tmp_path)
    tokenizer = CheckpointTokenizer(tmp_path, chat=False)
    assert tokenizer.prompts(["12"]) == character_tokenizer("0123").prompts(["12"])
    assert tokenizer.answers(["12"]) == character_tokenizer("0123").answers(["12"])
    assert tokenizer.decode_prompt(tokenizer.prompts(["12"])[0]) == "12"


def test_without_a_pad_token_the_end_of_sequence_pads(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path, settings={"pad_token": None})
    assert CheckpointTokenizer(tmp_path, chat=False).pad_token_id == ids["<|im_end|>"]


def test_a_checkpoints_code_is_refused_and_not_run(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, settings={"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"tokenizer_config\.json asks for code of the checkpoint's own \(auto_map\)"):
        CheckpointTokenizer(tmp_path, chat=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"stops": None, "settings": {"eos_token": None}}, "names the token that ends an answer"),
        ({"settings": {"eos_token": "<nowhere>"}}, "names <nowhere> as its eos_token, but has no such token"),
        ({"stops": [7, 99999]}, r"generation_config\.json names 99999 in eos_token_id"),
        ({"stops": "two"}, "names two in eos_token_id"),
        ({"chat_template": None}, "has no chat template, .* set data.template=base"),
        (
            {"chat_template": "{{ raise_exception('no users') }}"},
            r"cannot render a question \(TemplateError: no users\)",
        ),
        ({"chat_template": "{% if %}"}, "cannot render a question"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_one_sentence(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    write_tokenizer(tmp_path, **broken)
    with pytest.raises(UserError, match=message) as caught:
        CheckpointTokenizer(tmp_path, chat=True).chats([TURN])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, r"holds no tokenizer\.json"),
        ("tokenizer.json", "{}", r"tokenizer\.json cannot be read as a tokenizer"),
        ("tokenizer_config.json", None, r"holds no tokenizer_config\.json"),
        ("tokenizer_config.json", "[1]", "holds no JSON object"),
        ("generation_config.json", "{", "is not valid JSON"),
    ],
)
def test_a_missing_or_broken_file_is_named(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        CheckpointTokenizer(tmp_path, chat=False)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    train = write_questions(tmp_path / "train.jsonl", *rows(40))
    ids = make_task(checkpoint_config(tmp_path / "model", train, train)).tokenizer.vocab_size
    assert make_task(checkpoint_config(tmp_path / "model", train, train, rows=ids)).tokenizer.vocab_size == ids
    with pytest.raises(
        UserError, match=rf"model\.path=.* has ids up to {ids - 1}, but the embedding has {ids - 1} rows"
    ):
        make_task(checkpoint_config(tmp_path / "model", train, train, rows=ids - 1))


def test_a_run_goes_on_with_its_copy_whatever_became_of_the_checkpoint(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    train = write_questions(tmp_path / "train.jsonl", *rows(40))
    config = checkpoint_config(tmp_path / "model", train, train, template="chat")
    before = make_task(config)
    before.tokenizer.save(tmp_path / "run")
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    after = make_task(config, tmp_path / "run")
    assert after.training_prompt(3) == before.training_prompt(3)
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        make_task(config, tmp_path / "gone")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        TaskTokenizer.load(tmp_path / "gone")


def test_base_prompts_of_a_checkpoint_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    train = write_questions(tmp_path / "train.jsonl", *rows(40))
    config = checkpoint_config(tmp_path / "model", train, train, template="base")
    code = (
        "import sys\nfrom mxdist.config import Config\nfrom mxdist.tasks.registry import make_task\n"
        "make_task(Config.model_validate_json(sys.argv[1]))\n"
        "print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, config.model_dump_json()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_settings_of_a_real_qwen_config_are_understood(tmp_path: Path) -> None:
    """The special tokens of Qwen2.5-3B (base): its own end of sequence differs from the chat's."""
    ids = write_tokenizer(tmp_path, eos="<|endoftext|>")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": ids["<|endoftext|>"], "do_sample": False, "eos_token_id": ids["<|endoftext|>"]})
    )
    assert CheckpointTokenizer(tmp_path, chat=False).stop_token_ids == (ids["<|endoftext|>"],)
    assert CheckpointTokenizer(tmp_path, chat=True).stop_token_ids == (ids["<|im_end|>"], ids["<|endoftext|>"])
