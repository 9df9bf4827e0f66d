"""pass@k, maj@k and standard errors, against brute force."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxdist.control.estimates import majority, mean, pass_at_k, powers_of_two, share

ANSWERS = st.lists(st.booleans(), min_size=1, max_size=9)


@given(ANSWERS, st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_right_one(
    right: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(right)))
    choices = list(combinations(right, k))
    expected = sum(any(choice) for choice in choices) / len(choices)
    assert pass_at_k(np.array([right]), k)[0] == pytest.approx(expected, abs=1e-12)


@given(ANSWERS)
def test_pass_at_1_is_the_mean_and_more_tries_never_hurt(right: list[bool]) -> None:
    estimates = [pass_at_k(np.array([right]), k)[0] for k in range(1, len(right) + 1)]
    assert estimates[0] == pytest.approx(np.mean(right), abs=1e-12)
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(estimates))
    assert estimates[-1] == float(any(right))


def test_pass_at_k_is_unbiased() -> None:
    random, chance, k = np.random.default_rng(0), 0.2, 3
    estimate = pass_at_k(random.random((20_000, 7)) < chance, k)
    assert mean(estimate).value == pytest.approx(1 - (1 - chance) ** k, abs=4 * mean(estimate).error)


def test_pass_at_k_of_many_answers_does_not_overflow_and_wants_enough_of_them() -> None:
    right = np.zeros((1, 2000), dtype=bool)
    right[0, 0] = True
    assert pass_at_k(right, 1000)[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pass@4 cannot be estimated from 3 answers"):
        pass_at_k(np.zeros((1, 3), dtype=bool), 4)


@given(st.lists(st.sampled_from(["", "1", "2", "3"]), min_size=1, max_size=9))
def test_the_majority_is_among_the_most_frequent_and_the_first_of_those(finals: list[str]) -> None:
    index = majority(finals)
    voting = [final for final in finals if final]
    if not voting:
        assert index is None
        return
    assert index is not None
    most = max(voting.count(final) for final in voting)
    assert finals.count(finals[index]) == most
    assert all(finals.count(final) < most for final in finals[:index] if final)


def test_answers_without_a_final_answer_do_not_vote() -> None:
    assert majority(["", "", "", "7"]) == 3
    assert majority(["5", "7", "7"]) == 1


def wilson(share: float, count: int) -> tuple[float, float]:
    """Those p from which the observed share is one standard error of p away, on a fine grid."""
    grid = np.linspace(0, 1, 1_000_001)
    inside = grid[(share - grid) ** 2 <= grid * (1 - grid) / count + 1e-12]
    return float(inside.min()), float(inside.max())


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("count", [1, 9, 256])
def test_all_or_no_answers_right_leave_a_doubt(right: bool, count: int) -> None:
    found = share(np.full(count, right))
    low, high = wilson(found.value, count)
    assert found.value == float(right)
    assert found.error == pytest.approx((high - low) / 2, rel=1e-3)
    if count > 1:
        assert mean(np.full(count, float(right))).error == found.error
        assert mean(np.zeros(count), width=2).error == pytest.approx(2 * found.error)  # between -1 and 1


def test_standard_errors_are_the_textbooks() -> None:
    right = np.array([True] * 30 + [False] * 10)
    assert (share(right).value, share(right).problems) == (0.75, 40)
    low, high = wilson(0.75, 40)
    assert share(right).error == pytest.approx((high - low) / 2)
    assert share(right).error == pytest.approx(math.sqrt(0.75 * 0.25 / 40), rel=0.01)
    assert str(share(right)) == "0.750 +- 0.068"
    values = np.array([0.0, 0.5, 1.0, 0.5])
    assert mean(values).error == pytest.approx(np.std(values, ddof=1) / 2)
    assert math.isnan(mean(np.array([0.5])).error)


def test_pass_is_reported_for_powers_of_two_and_for_all_answers() -> None:
    assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
