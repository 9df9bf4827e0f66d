"""GSM8K: reading files and hub names, prompts, and every way the data can be wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from mxdist.config import Config
from mxdist.config.schema import Algorithm, Grpo
from mxdist.errors import UserError
from mxdist.tasks.question_files import read_hub_dataset
from mxdist.tasks.registry import make_task
from tests.tasks.data import gsm8k_config, gsm8k_folder, rows, write_questions


@pytest.fixture
def config(tmp_path: Path) -> Config:
    train = write_questions(tmp_path / "train.jsonl", *rows(40))
    return gsm8k_config(train, write_questions(tmp_path / "test.jsonl", *rows(3)))


def test_a_prompt_is_the_question_and_its_reference_the_final_answer(config: Config) -> None:
    task = make_task(config)
    prompt = task.training_prompt(1)
    assert task.tokenizer.decode(prompt.tokens[1:]) == "Question: Ann has 2 pens and buys 2 more. How many?\nAnswer:"
    assert (prompt.key, prompt.reference, task.training_size) == ("train/2", "4", 40)
    assert [p.key for p in task.eval_prompts()] == ["test/1", "test/2", "test/3"]
    demonstration = task.demonstration(1, Random(0))
    assert task.tokenizer.decode(demonstration.answer) == " 2 + 2 = 4\n#### 4"
    assert demonstration.prompt == prompt.tokens


def test_only_the_first_eval_problems_are_held(config: Config) -> None:
    data = config.data.model_copy(update={"eval_problems": 2})
    assert len(make_task(config.model_copy(update={"data": data})).eval_prompts()) == 2


def test_a_saved_tokenizer_is_used_instead_of_a_new_one(config: Config, tmp_path: Path) -> None:
    task = make_task(config)
    task.tokenizer.save(tmp_path / "tokenizer")
    write_questions(tmp_path / "train.jsonl", *({**row, "question": "Zzz " * 20} for row in rows(40)))
    assert make_task(config, tmp_path / "tokenizer").tokenizer.encode("pens") == task.tokenizer.encode("pens")
    assert make_task(config).tokenizer.encode("pens") != task.tokenizer.encode("pens")


def test_worked_solutions_longer_than_the_context_are_left_out_of_the_warm_start(tmp_path: Path) -> None:
    long = {"question": "Short?", "answer": "1 " * 300 + "\n#### 1"}
    train = write_questions(tmp_path / "train.jsonl", *rows(39), long)
    task = make_task(gsm8k_config(train, train, context=128, max_new_tokens=32))
    assert all(len(prompt) + len(answer) <= 128 for prompt, answer in task.demonstrations(0, 400))
    only_long = write_questions(tmp_path / "long.jsonl", *[long] * 40)
    with pytest.raises(UserError, match=r"no worked solution .* warm_start\.steps=0"):
        make_task(gsm8k_config(only_long, train, context=128, max_new_tokens=32)).demonstrations(0, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"data\.train: .*train\.jsonl line 3 is not valid JSON"),
        ("[1]", r"train\.jsonl line 3 holds list"),
        ('{"question": "?"}', r'train\.jsonl line 3 has no "answer"'),
        ('{"question": 5, "answer": "#### 5"}', r'train\.jsonl line 3 has an empty or non-text "question"'),
        ('{"question": "?", "answer": "it is 5"}', r'line 3 does not end in "#### n"'),
        ('{"question": "?", "answer": "it is ####"}', r'line 3 does not end in "#### n"'),
    ],
)
def test_a_malformed_line_is_named(config: Config, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(UserError, match=message):
        make_task(config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at all.jsonl", r"data\.train=nowhere/at all\.jsonl does not exist"),
        ("/nowhere/train", "does not exist"),
        ("train", "does not exist"),
        ("{tmp}", "is a directory"),
        ("{tmp}/empty.jsonl", "holds no questions"),
        ("{tmp}/binary.jsonl", "is not UTF-8 text"),
    ],
)
def test_a_source_that_is_no_data_is_the_users_error(config: Config, tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    data = config.data.model_copy(update={"train": source.replace("{tmp}", str(tmp_path))})
    with pytest.raises(UserError, match=message):
        make_task(config.model_copy(update={"data": data}))


def test_a_dataset_is_read_as_the_hub_gives_it(tmp_path: Path) -> None:
    write_questions(tmp_path / "train.jsonl", *rows(3))
    write_questions(tmp_path / "test.jsonl", *rows(2))
    questions = read_hub_dataset(str(tmp_path), "data.train", "train")
    assert [q.key for q in questions] == ["train/1", "train/2", "train/3"]
    assert questions[1].solution == "2 + 2 = 4\n#### 4"
    assert len(read_hub_dataset(str(tmp_path), "data.eval", "test")) == 2


def test_a_hub_name_that_cannot_be_read_is_one_sentence(config: Config) -> None:
    data = config.data.model_copy(update={"train": "mxdist-tests/no-such-dataset"})
    code = (
        "import sys\nfrom mxdist.config import Config\nfrom mxdist.tasks.registry import make_task\n"
        "from mxdist.errors import UserError\n"
        "try:\n    make_task(Config.model_validate_json(sys.argv[1]))\nexcept UserError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, config.model_copy(update={"data": data}).model_dump_json()]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # else it tries for half a minute
    run = subprocess.run(command, env=offline, capture_output=True, text=True, check=True)
    assert run.stdout.count("\n") == 1
    assert run.stdout.startswith(
        "data.train=mxdist-tests/no-such-dataset is no file here and could not be read from the Hugging Face hub ("
    )


def test_a_prompt_longer_than_the_context_is_found_and_named_before_ray_or_torch(tmp_path: Path) -> None:
    long = {"question": "many " * 100, "answer": "#### 1"}
    train = write_questions(tmp_path / "train.jsonl", *rows(39), {**long, "question": "Zz yy xx " * 40})
    config = gsm8k_config(train, train, context=96, max_new_tokens=40)
    code = (
        "import sys, json\nfrom mxdist.config import Config\nfrom mxdist.tasks.registry import make_task\n"
        "from mxdist.errors import UserError\n"
        "try:\n    make_task(Config.model_validate_json(sys.argv[1]))\nexcept UserError as error:\n    print(error)\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json()], capture_output=True, text=True, check=True
    )
    length = int(run.stdout.split(" has ")[1].split()[0])
    assert length > 56
    assert run.stdout.strip() == (
        f"the prompt of {train} line 40 has {length} tokens, but model.max_position_embeddings=96 less "
        f"rollout.max_new_tokens=40 leaves 56; raise model.max_position_embeddings to at least {length + 40}"
    )


def test_a_batch_larger_than_the_data_is_the_users_error(config: Config) -> None:
    algorithm: Algorithm = Grpo(prompts_per_step=64)
    with pytest.raises(UserError, match=r"prompts_per_step=64 is more than the 40 training problems"):
        make_task(config.model_copy(update={"algorithm": algorithm}))


def test_gsm8k_as_published_is_read() -> None:
    folder = gsm8k_folder()
    task = make_task(gsm8k_config(str(folder / "train.jsonl"), str(folder / "test.jsonl")))
    assert (task.training_size, len(task.eval_prompts()), task.tokenizer.vocab_size) == (7473, 1319, 2048)
    with open(folder / "test.jsonl") as stream:
        first = json.loads(stream.readline())
    text = task.tokenizer.decode(task.eval_prompts()[0].tokens[1:])
    assert text == f"Question: {first['question']}\nAnswer:"
