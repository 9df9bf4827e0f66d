"""Rewards: right answers get 1, wrong ones 0, however they are written down."""

import time
from collections.abc import Iterator

import pytest

from mxdist.config.schema import ArithmeticData, Gsm8kData
from mxdist.tasks.gsm8k import final_answer
from mxdist.tasks.question_files import Question, read_questions
from mxdist.tasks.rewards import final_answer_span, has_form, is_right, reward_for
from tests.tasks.data import gsm8k_config, gsm8k_folder

SOLUTION = "She sells 16 - 3 = <<16-3=13>>13 eggs.\nThat makes 9 * 2 = $18.\n#### 18"


@pytest.mark.parametrize(
    "text",
    [
        SOLUTION,
        "#### 18",
        "#### $18",
        "#### 18.0",
        "#### 18 dollars",
        "#### 18\nQuestion: and now 20?",
        "#### 17\nNo.\n#### 18",
        "So we have \\boxed{18}.",
        "So we have $\\boxed{\\frac{36}{2}}$, not 17.",
        "The answer is 18.",
        "The final answer is: $18. It was not 20.",
        "**Answer:** 18",
        "17 eggs at first.\nThat leaves 18 eggs.",
        "  18  ",
    ],
)
def test_a_right_answer_is_found(text: str) -> None:
    assert is_right(text, "18")


@pytest.mark.parametrize(
    "text",
    [
        "#### 19",
        "#### 180",
        "#### 1.8",
        "#### -18",
        "#### 118",
        "#### 1,818",
        "#### 18\n#### 19",
        "\\boxed{18} or rather \\boxed{19}",
        "The answer is 18. No, the answer is 19.",
        "18\n20",
        "####",
        "#### eighteen",
        "",
        "\n \n",
    ],
)
def test_a_wrong_answer_is_not(text: str) -> None:
    assert not is_right(text, "18")


@pytest.mark.parametrize(
    ("written", "reference"),
    [("1000", "1,000"), ("1,000", "1000"), ("-$5", "-5"), ("$-5", "-5"), ("0.5", "1/2"), ("2,125,000", "2,125,000")],
)
def test_the_same_number_written_otherwise_is_right(written: str, reference: str) -> None:
    assert is_right(f"so\n#### {written}", reference)


@pytest.mark.parametrize("number", ["18", "-7", "2,125,000", "0.5"])
@pytest.mark.parametrize(
    "form",
    [
        "so\n#### {}",
        "#### ${}",
        "#### {} dollars",
        "#### {}%",
        "#### {}.",
        "#### **{}**",
        "#### +{}",
        "\\boxed{{{}}}",
        "\\boxed{{\\${}}}",
        "\\boxed{{{} \\text{{ kg}}}}",
        "The answer is {}.",
        "the final answer is: €{}",
        "**Answer:** {} eggs per day.",
        "first 999\nx = {}",
    ],
)
def test_every_usual_form_of_a_right_answer_is_read_and_of_a_wrong_one_is_not(form: str, number: str) -> None:
    if number.startswith("-") and "+" in form:
        return
    wrong = "5,118" if "," in number else "118"
    written = {number, number.replace(",", ""), number.replace(",", "{,}"), number.replace("-", "\N{MINUS SIGN}")}
    written |= set() if "." in number or "%" in form else {f"{number}.00"}  # 18.00% is 0.18 to math-verify
    for text in written:
        assert is_right(form.format(text), number), text
    assert not is_right(form.format(wrong), number)


GOLD = [  # in the form of GSM8K, with the calculator's marks
    ("Tom has 3*4=<<3*4=12>>12 apples.\nHe eats 2, so 12-2=<<12-2=10>>10 are left.\n#### 10", "10"),
    ("The car costs 1200*2=$<<1200*2=2400>>2400.\n#### 2,400", "2,400"),
    ("It falls by 5 degrees.\n#### -5", "-5"),
    ("Each gets 1/2=<<1/2=.5>>.5 of it.\n#### 0.5", "0.5"),
]


@pytest.mark.parametrize(("solution", "reference"), GOLD)
def test_a_gold_solution_is_right_and_wrong_once_changed(solution: str, reference: str) -> None:
    assert final_answer(Question("?", solution, "here", "train/1"), "data") == reference
    assert is_right(solution, reference)
    assert has_form(solution)
    work = solution.rpartition("####")[0]
    number = float(reference.replace(",", ""))
    for other in (number + 1, -number, number * 10 + 3):
        assert not is_right(f"{work}#### {other:,}", reference)


@pytest.mark.parametrize(
    "same",
    [
        ("#### 1,234.50", "\\boxed{1234.5}", "The answer is $1234.50.", "#### 1234.5 dollars"),
        ("#### 18", "#### 18.0", "#### 36/2", "\\boxed{\\frac{36}{2}}", "#### 18%"),
        ("#### eggs", "#### Eggs"),
        ("#### \N{MINUS SIGN}5", "#### -5"),
        ("", "####", "\n"),
    ],
)
def test_one_number_is_one_final_answer_however_written(same: tuple[str, ...]) -> None:
    reward = reward_for(Gsm8kData(train="a", eval="b"))
    assert len({reward(text, "7").final for text in same}) == 1
    assert reward("#### 18", "18").final == "18" != reward("#### 81", "18").final


@pytest.mark.parametrize("text", ["#### 9^9^9^9", "#### 9**9**9**9", "#### 99999!!", "#### " + "12 " * 20000])
def test_a_hostile_answer_costs_no_time(text: str) -> None:
    started = time.process_time()
    assert not is_right(text, "18")
    assert time.process_time() - started < 1


def test_the_span_is_all_that_decides() -> None:
    assert final_answer_span("The answer is 3.5 kg. Really.") == "3.5 kg"
    assert final_answer_span("x \\boxed{\\frac{1}{2}} y") == "\\frac{1}{2}"
    assert final_answer_span("####  7 \nmore") == "7"
    assert final_answer_span("\\boxed{3}, so #### 4") == "4"
    assert final_answer_span("The answer is \\boxed{5}, not 6.") == "5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SOLUTION, True),
        ("#### -1,000.50", True),
        ("#### 18\n", True),
        ("#### 18 eggs", False),
        ("#### 18\nand more", False),
        ("#### 18\n#### 18", False),
        ("so 18 #### 18", False),
        ("18", False),
    ],
)
def test_the_form_is_one_marked_number_on_the_last_line(text: str, expected: bool) -> None:
    assert has_form(text) is expected


def test_the_format_reward_is_separate_and_configurable() -> None:
    reward = reward_for(Gsm8kData(train="a", eval="b", format_reward=0.25))
    assert reward(SOLUTION, "18").total == 1.25
    assert reward(SOLUTION, "19").total == 0.25
    assert reward("The answer is 18", "18").total == 1.0
    assert reward(SOLUTION, "19").parts == {"accuracy": 0.0, "format": 1.0}
    assert reward_for(Gsm8kData(train="a", eval="b", format_reward=0))(SOLUTION, "18").total == 1.0


def test_arithmetic_wants_exactly_the_reference() -> None:
    reward = reward_for(ArithmeticData())
    assert reward("07", "07").total == reward("07", "07").parts["accuracy"] == 1.0
    assert {reward(text, "07").total for text in ("7", "07 ", "", "077", "0<bos>7")} == {0.0}


def changed(answer: str) -> Iterator[str]:
    number = int(answer.replace(",", ""))
    yield f"{number + 1}"
    yield f"{number * 10 + 3:,}"


def gold_solutions() -> list[Question]:
    folder = gsm8k_folder()
    train = read_questions(str(folder / "train.jsonl"), "data.train", "train")
    return train + read_questions(str(folder / "test.jsonl"), "data.eval", "test")


def test_all_gold_solutions_of_gsm8k_are_right_and_wrong_once_changed() -> None:
    questions = gold_solutions()
    assert len(questions) == 8792
    for question in questions:
        reference = final_answer(question, "data")
        work = question.solution.rpartition("####")[0]
        assert is_right(question.solution, reference), question
        assert has_form(question.solution), question
        for answer in changed(reference):
            assert not is_right(f"{work}#### {answer}", reference), (question, answer)


def test_a_reward_process_scores_in_order_and_off_the_main_thread() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from mxdist.tasks.reward_worker import RewardWorker

    worker = RewardWorker(gsm8k_config("train.jsonl", "test.jsonl"))
    answers = [("#### 18", "18"), ("#### 19", "18"), ("\\boxed{1/2}", "0.5")]
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(worker.score, answers).result()
    assert [result.parts["accuracy"] for result in results] == [1, 0, 1]
    assert [result.total for result in results] == [1.1, 0.1, 1.0]
