"""The sums: their form, the split, worked answers."""

import pytest

from mxdist.config import Config
from mxdist.config.schema import ArithmeticData
from mxdist.errors import UserError
from mxdist.tasks.arithmetic import ArithmeticTask, Sum, all_problems
from mxdist.tasks.base import Cursor
from mxdist.tasks.registry import make_task


def test_a_problem_is_zero_padded_and_a_forgotten_carry_is_wrong() -> None:
    problem = Sum(7, 25, 2)
    assert (problem.question, problem.answer, problem.answer_without_carry) == ("07+25=", "32", "22")
    assert Sum(123, 989 - 123, 3).answer_without_carry == Sum(123, 989 - 123, 3).answer == "989"
    assert Sum(156, 67, 3).answer_without_carry == "113"


def test_every_carrying_sum_below_100_and_as_many_others_are_problems() -> None:
    training, held_out = all_problems(2)
    problems = training + held_out
    assert len(set(problems)) == len(problems)
    carrying = {problem for problem in problems if problem.answer != problem.answer_without_carry}
    expected = {Sum(a, b, 2) for a in range(100) for b in range(100 - a) if a % 10 + b % 10 > 9}
    assert carrying == expected
    assert len(problems) - len(carrying) == len(carrying)


def test_held_out_sums_never_stand_in_training_in_either_order() -> None:
    training, held_out = all_problems(2)
    trained = {frozenset((problem.left, problem.right)) for problem in training}
    assert not trained & {frozenset((problem.left, problem.right)) for problem in held_out}
    assert 256 <= len(held_out) < len(training) / 5


@pytest.mark.parametrize("digits", [2, 3])
def test_held_out_sums_need_carries_as_often_as_training_sums(digits: int) -> None:
    for problems in all_problems(digits):
        share = sum(problem.answer != problem.answer_without_carry for problem in problems) / len(problems)
        assert share == pytest.approx(1 / 2, abs=0.05)


def test_the_split_depends_on_no_setting() -> None:
    first = ArithmeticTask(ArithmeticData(), run_seed=0)
    second = ArithmeticTask(ArithmeticData(eval_problems=16, forgotten_carries=0.1), run_seed=7)
    assert [p.key for p in second.eval_prompts()] == [p.key for p in first.eval_prompts()][:16]
    assert second.training_size == first.training_size


def test_prompts_and_answers_are_framed_by_bos_and_eos() -> None:
    task = make_task(Config())
    prompt = task.training_prompt(0)
    assert prompt.tokens[0] == task.tokenizer.bos_token_id
    assert task.tokenizer.decode(prompt.tokens[1:]) == prompt.key
    demonstration = task.demonstrations(0, 1)[0]
    assert demonstration.answer[-1] == task.tokenizer.stop_token_ids[0]
    assert demonstration.answer.count(task.tokenizer.stop_token_ids[0]) == 1


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_worked_answers_forget_carries_as_often_as_asked(share: float) -> None:
    task = ArithmeticTask(ArithmeticData(forgotten_carries=share), run_seed=0)
    wrong = carrying = 0
    for prompt, answer in task.demonstrations(seed=1, count=3000):
        question, text = task.tokenizer.decode(prompt[1:]), task.tokenizer.decode(answer)
        problem = Sum(int(question[:2]), int(question[3:5]), 2)
        assert text in (problem.answer, problem.answer_without_carry)
        carrying += problem.answer != problem.answer_without_carry
        wrong += text != problem.answer
    assert wrong / carrying == pytest.approx(share, abs=0.04)


def test_demonstrations_follow_their_seed_and_come_from_training_problems() -> None:
    task = make_task(Config())
    assert task.demonstrations(5, 64) == task.demonstrations(5, 64) != task.demonstrations(6, 64)
    held_out = {prompt.tokens for prompt in task.eval_prompts()}
    assert not held_out & {prompt for prompt, _ in task.demonstrations(5, 5000)}
    assert not held_out & {prompt.tokens for prompt in task.draw(Cursor(), task.training_size)[0]}


def test_more_held_out_problems_than_there_are_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"data\.eval_problems=500 is more than the \d+ held-out .*data\.digits=2"):
        make_task(Config(data=ArithmeticData(eval_problems=500)))
