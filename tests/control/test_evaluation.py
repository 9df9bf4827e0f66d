"""From scored answers to measures, the table and the file of answers; no engine needed."""

import json
from pathlib import Path

import numpy as np
import pytest

from mxdist.config.schema import ArithmeticData
from mxdist.control.batch import ScoredGroup
from mxdist.control.estimates import Estimate
from mxdist.control.eval_command import paired_differences, table
from mxdist.control.evaluation import Decoding, estimates
from mxdist.messages import Group, Sample
from mxdist.observe.evaluation_files import write_answers
from mxdist.tasks.arithmetic import ArithmeticTask
from mxdist.tasks.rewards import exact_reward

TASK = ArithmeticTask(ArithmeticData(eval_problems=4), run_seed=0)


def scored(answers: list[list[str]]) -> list[ScoredGroup]:
    """The answers to each held-out problem, in order; "right" stands for the reference."""
    groups = []
    for prompt, texts in zip(TASK.eval_prompts(), answers, strict=True):
        texts = [prompt.reference if text == "right" else text for text in texts]
        tokens = [np.array(answer) for answer in TASK.tokenizer.answers(texts)]
        samples = tuple(Sample(ids, np.zeros(len(ids), np.float32), finished=True) for ids in tokens)
        results = tuple(exact_reward(text, prompt.reference) for text in texts)
        accuracy = {"accuracy": float(np.mean([result.total for result in results]))}
        group = Group(prompt, samples, 0, 0.0)
        groups.append(ScoredGroup(group, tuple(result.total for result in results), accuracy, results))
    return groups


def test_greedy_accuracy_is_reported_by_kind_of_problem_too() -> None:
    found = estimates(TASK, scored([["right"], ["1"], ["right"], ["right"]]), Decoding())
    assert (found["accuracy"].value, found["accuracy"].problems) == (0.75, 4)
    assert found["accuracy"].error == pytest.approx((4 * 0.75 * 0.25 + 0.25) ** 0.5 / 5)
    kinds = [TASK.kind(prompt) for prompt in TASK.eval_prompts()]
    assert set(kinds) == {"carry", "no carry"}
    for kind in set(kinds):
        assert found[f"accuracy, {kind}"].problems == kinds.count(kind)
    by_kind = sum(found[f"accuracy, {kind}"].value * kinds.count(kind) for kind in set(kinds))
    assert by_kind == pytest.approx(3)


def test_sampled_answers_give_pass_at_k_and_the_majoritys_accuracy() -> None:
    answers = [["1", "right", "right", "2"], ["1", "1", "right", "1"], ["1", "2", "3", "0"], ["right"] * 4]
    found = estimates(TASK, scored(answers), Decoding(4, 1.0))
    assert [name for name in found if "," not in name] == ["pass@1", "pass@2", "pass@4", "maj@4"]
    assert found["pass@1"].value == pytest.approx((2 + 1 + 0 + 4) / 16)
    assert found["pass@2"].value == pytest.approx((5 / 6 + 1 / 2 + 0 + 1) / 4)
    assert found["pass@4"].value == 0.75
    assert found["pass@2"].error == pytest.approx(np.std([5 / 6, 1 / 2, 0, 1], ddof=1) / 2)
    assert found["maj@4"].value == 0.5
    assert found["maj@4"].error == pytest.approx((4 * 0.5 * 0.5 + 0.25) ** 0.5 / 5)


def test_recipes_are_compared_problem_by_problem() -> None:
    ours, plain = scored([["right"], ["1"], ["right"], ["1"]]), scored([["1"], ["1"], ["right"], ["1"]])
    found = paired_differences({"mxfp4": ours, "bf16": plain}, Decoding())["accuracy"]
    assert found.value == 0.25
    assert found.error == pytest.approx(np.std([1, 0, 0, 0], ddof=1) / 2)


@pytest.mark.parametrize("text", ["right", "1"])
def test_no_estimate_is_without_an_error_when_all_answers_are_right_or_none_is(text: str) -> None:
    answers = scored([[text] * 4] * 4)
    for decoding in (Decoding(), Decoding(4, 1.0)):
        found = estimates(TASK, answers, decoding)
        assert {estimate.value for estimate in found.values()} == {float(text == "right")}
        assert min(estimate.error for name, estimate in found.items() if "," not in name) == pytest.approx(0.1)
        for same in paired_differences({"mxfp4": answers, "bf16": answers}, decoding).values():
            assert (same.value, same.error) == (0, pytest.approx(0.2))


def test_a_carry_is_told_from_none() -> None:
    kinds = {prompt.key: TASK.kind(prompt) for prompt in ArithmeticTask(ArithmeticData(), 0).eval_prompts()}
    for key, kind in kinds.items():
        (left, right) = key.rstrip("=").split("+")
        carries = any(int(a) + int(b) > 9 for a, b in zip(left, right, strict=True))
        assert kind == ("carry" if carries else "no carry"), key


def test_the_table_fits_60_columns_and_pairs_the_recipes() -> None:
    one = {
        "pass@1": Estimate(0.5, 0.01, 9),
        "pass@16": Estimate(1.0, 0.0, 9),
        "pass@1, no carry": Estimate(0.1, 0.1, 9),
    }
    lines = table({"mxfp4_mbs_of_g4+overrides": one, "bf16": one}, {"pass@1": Estimate(-0.012, 0.004, 9)})
    assert max(map(len, lines)) <= 60
    assert lines[-2:] == [
        "mxfp4_mbs_of_g4+overrides less bf16, paired by problem",
        "  pass@1              -0.012 +- 0.004",
    ]
    assert not any("less" in line for line in table({"bf16": one}, {}))


def test_every_answer_is_kept_and_nothing_overwritten(tmp_path: Path) -> None:
    answers = scored([["right", "1"], ["2", "3"], ["4", "5"], ["6", "7"]])
    first = write_answers(tmp_path, 3, "bf16", 0.8, answers, TASK.tokenizer)
    before = first.read_bytes()
    second = write_answers(tmp_path, 3, "bf16", 0.8, answers[:1], TASK.tokenizer)
    assert [path.name for path in (first, second)] == ["step_3-bf16.jsonl", "step_3-bf16.2.jsonl"]
    assert first.read_bytes() == before
    line = json.loads(before.splitlines()[0])
    prompt = TASK.eval_prompts()[0]
    assert line == {
        "step": 3,
        "recipe": "bf16",
        "temperature": 0.8,
        "key": prompt.key,
        "prompt": prompt.key,
        "reference": prompt.reference,
        "answers": [prompt.reference, "1"],
        "extracted": [prompt.reference, "1"],
        "right": [True, False],
        "tokens": [3, 2],
        "finished": [True, True],
    }
