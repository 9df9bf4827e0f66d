"""Prompts of GSM8K: plain, for base models, as a chat; worked examples; and what counts as the model's answer."""

from pathlib import Path
from random import Random
from typing import Any

import pytest

from mxdist.config import Config
from mxdist.config.schema import Gsm8kData
from mxdist.errors import UserError
from mxdist.tasks.base import Task
from mxdist.tasks.registry import make_task
from mxdist.tasks.rewards import has_form, is_right
from mxdist.tasks.templates import INSTRUCTION, PREAMBLE
from tests.tasks.checkpoint import checkpoint_config, write_tokenizer
from tests.tasks.data import gsm8k_config, rows, write_questions

QUESTION = "Ann has 2 pens and buys 2 more. How many?"


def marked(count: int) -> list[dict[str, object]]:
    """Questions whose solutions have GSM8K's calculator marks."""
    return [
        {**row, "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n, row in enumerate(rows(count), 1)
    ]


def task_of(tmp_path: Path, seed: int = 0, context: int = 4096, **data: Any) -> Task:
    write_tokenizer(tmp_path / "model")
    train = write_questions(tmp_path / "train.jsonl", *marked(40))
    held_out = write_questions(
        tmp_path / "test.jsonl", *({**row, "question": f"Held out: {n}?"} for n, row in enumerate(rows(3)))
    )
    config = checkpoint_config(tmp_path / "model", train, held_out, **data)
    model = config.model.model_copy(update={"max_position_embeddings": context})
    return make_task(config.model_copy(update={"run": config.run.model_copy(update={"seed": seed}), "model": model}))


def shown(task: Task, index: int = 1) -> str:
    return task.tokenizer.decode_prompt(task.training_prompt(index).tokens)


def worked(task: Task, index: int = 1) -> str:
    return task.tokenizer.decode(task.demonstration(index, Random(0)).answer)


def test_plain_is_the_question_alone_and_keeps_the_solution_as_published(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    assert shown(task) == f"Question: {QUESTION}\nAnswer:"
    assert worked(task) == " 2 + 2 = <<2+2=4>>4\n#### 4"


def test_base_asks_for_the_mark_and_leaves_the_calculator_out(tmp_path: Path) -> None:
    task = task_of(tmp_path, template="base")
    assert shown(task) == f"{PREAMBLE}Question: {QUESTION}\nAnswer:"
    assert worked(task) == " 2 + 2 = 4\n#### 4"


def test_chat_asks_in_the_users_turn_and_leaves_the_answer_to_the_assistant(tmp_path: Path) -> None:
    task = task_of(tmp_path, template="chat")
    assert shown(task).endswith(f"<|im_start|>user\n{QUESTION} {INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")
    assert worked(task) == "2 + 2 = 4\n#### 4"
    assert task.demonstration(1, Random(0)).answer[-1] == task.tokenizer.stop_token_ids[0]


def test_a_chats_examples_are_earlier_turns(tmp_path: Path) -> None:
    text = shown(task_of(tmp_path, template="chat", few_shot=2))
    turns = [turn.partition("\n")[0] for turn in text.split("<|im_start|>")[1:]]
    assert turns == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert text.count("#### ") == 2
    assert "<<" not in text


@pytest.mark.parametrize("template", ["plain", "base"])
def test_examples_come_before_the_question_with_blank_lines_between(tmp_path: Path, template: str) -> None:
    text = shown(task_of(tmp_path, template=template, few_shot=3))
    blocks = text.removeprefix(PREAMBLE).split("\n\n")
    assert len(blocks) == 4
    assert all("\nAnswer: " in block and "#### " in block for block in blocks[:3])
    assert blocks[3] == f"Question: {QUESTION}\nAnswer:"


def test_examples_are_the_same_for_every_question_and_follow_from_the_seed(tmp_path: Path) -> None:
    def examples(text: str) -> list[str]:
        return text.split("\n\n")[:-1]

    task = task_of(tmp_path, few_shot=2)
    held_out = [task.tokenizer.decode_prompt(prompt.tokens) for prompt in task.eval_prompts()]
    assert len({tuple(examples(text)) for text in held_out}) == 1
    assert shown(task_of(tmp_path, few_shot=2)) == shown(task)
    others = task_of(tmp_path, seed=1, few_shot=2)
    assert examples(shown(others, 30)) != examples(shown(task, 30))


def test_no_question_is_an_example_for_itself_and_none_is_held_out(tmp_path: Path) -> None:
    task = task_of(tmp_path, few_shot=4)
    for index in range(task.training_size):
        blocks = [block.split("\nAnswer:")[0] for block in shown(task, index).split("\n\n")]
        assert len(set(blocks)) == 5
        assert not any("Held out" in block for block in blocks)


def test_held_out_questions_are_no_examples_even_when_the_files_overlap(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    train = write_questions(tmp_path / "train.jsonl", *rows(40))
    task = make_task(checkpoint_config(tmp_path / "model", train, train, few_shot=3))
    for prompt in task.eval_prompts():
        *examples, asked = task.tokenizer.decode_prompt(prompt.tokens).split("\n\n")
        assert len(examples) == 3
        assert not any(example.startswith(asked) for example in examples)


def test_more_examples_than_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.few_shot=40 needs 41 different questions in data\.train, which has 40"):
        task_of(tmp_path, few_shot=40)


def test_a_prompt_too_long_for_its_examples_names_the_line_and_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the prompt of .*jsonl line \d+ has \d+ tokens, .* or lower data\.few_shot$"):
        task_of(tmp_path, few_shot=2, context=180)


def test_examples_that_leave_no_context_are_refused_before_everything_is_encoded(tmp_path: Path) -> None:
    sentence = r"data\.few_shot=16 makes prompts of about \d{3,} tokens, more than the context of 200; lower it"
    with pytest.raises(UserError, match=sentence):
        task_of(tmp_path, few_shot=16, context=200)


def test_a_base_model_is_judged_by_what_stands_before_a_question_of_its_own(tmp_path: Path) -> None:
    text = " 2 + 2 = 4\n#### 4\n\nQuestion: Bob has 5?\nAnswer: #### 5"

    def judged(**data: Any) -> str:
        task = task_of(tmp_path, **data)
        return task.answer_text(task.tokenizer.encode(text))

    assert is_right(judged(template="base"), "4")
    assert has_form(judged(template="base"))
    assert is_right(judged(few_shot=2), "4")
    assert judged() == text  # as it always was


def test_chat_needs_a_checkpoint(tmp_path: Path) -> None:
    train = write_questions(tmp_path / "train.jsonl", *rows(40))
    config: Config = gsm8k_config(train, train)
    data = config.data.model_copy(update={"template": "chat"})
    with pytest.raises(UserError, match=r"data\.template=chat needs a checkpoint's chat template; set model\.path"):
        make_task(config.model_copy(update={"data": data}))
    with pytest.raises(ValueError, match="chat_arguments are for template=chat alone"):
        Gsm8kData(train="a", eval="b", chat_arguments={"enable_thinking": False})


def test_special_tokens_inside_a_question_are_refused_in_a_chat(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    train = write_questions(tmp_path / "train.jsonl", *rows(39), {"question": "<|im_end|> 1?", "answer": "#### 1"})
    with pytest.raises(UserError, match=r"train\.jsonl line 40 holds <\|im_end\|>"):
        make_task(checkpoint_config(tmp_path / "model", train, train, template="chat"))
    make_task(checkpoint_config(tmp_path / "model", train, train, template="base"))


def test_what_the_warm_start_leaves_out_is_said(tmp_path: Path) -> None:
    long = {"question": "Short?", "answer": "1 " * 300 + "\n#### 1"}
    train = write_questions(tmp_path / "train.jsonl", *rows(39), long)
    task = make_task(gsm8k_config(train, train, context=128, max_new_tokens=32))
    assert task.left_out() == (
        "the warm start leaves out 1 of 40 worked solutions: with their prompts they are longer than the context of "
        "128 tokens"
    )
    assert task_of(tmp_path).left_out() == ""
