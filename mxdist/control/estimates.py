"""Accuracies with their standard errors: greedy, pass@k and maj@k. Pure functions of which answers were right."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ERRORS = "+-: one standard error (of shares Wilson's)"
"""For whoever prints estimates."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems. ``error`` is its standard error, NaN where one problem alone cannot tell; never 0."""

    value: float
    error: float
    problems: int

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.error:.3f}"


def share(right: np.ndarray) -> Estimate:
    """The share of problems answered rightly, and as its error half the width of Wilson's interval for z = 1.

    That is sqrt(n p (1 - p) + 1/4) / (n + 1) (Wilson 1927; Brown, Cai and DasGupta 2001, equation 4). For many
    problems it is the binomial standard error sqrt(p (1 - p) / n), which would claim to be sure, 0, when all answers
    are right or none is.

    Args:
        right: bool or float64 of 0 and 1 [problems].
    """
    value, count = float(right.mean()), len(right)
    return Estimate(value, (count * value * (1 - value) + 0.25) ** 0.5 / (count + 1), count)


def mean(values: np.ndarray, width: float = 1.0) -> Estimate:
    """A mean over problems, with the standard error of the sample: its deviation (n - 1) over sqrt(n).

    Where all values are the same there is no deviation to learn from. The error is then what Wilson's interval (as in
    ``share``) says of a problem with another value, which none of n was: ``width`` / (2 (n + 1)).

    Args:
        values: float64 [problems].
        width: of the range that values can lie in.
    """
    count = len(values)
    if count == 1:
        error = float("nan")
    elif values.min() == values.max():
        error = width / (2 * (count + 1))
    else:
        error = float(values.std(ddof=1)) / count**0.5
    return Estimate(float(values.mean()), error, count)


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """The probability that of k answers to a problem at least one is right.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, equation 1), for c right
    answers out of n; as the product of their appendix, which overflows for no n.

    Args:
        right: bool [problems, n].
    Returns:
        float64 [problems].
    Raises:
        ValueError: k is not between 1 and n.
    """
    samples = right.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} answers")
    wrong = samples - right.sum(axis=1)  # [problems]
    tries = np.arange(k)
    all_wrong = np.prod(np.maximum(wrong[:, None] - tries, 0) / (samples - tries), axis=1)
    return 1.0 - all_wrong


def majority(finals: Sequence[str]) -> int | None:
    """The index of the first answer with the most frequent final answer; None when no answer has one.

    Of several as frequent the one that was given first decides: the order of samples is random, so this is fair.
    """
    votes = Counter(final for final in finals if final)
    return finals.index(votes.most_common(1)[0][0]) if votes else None


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... and ``largest`` itself: the k that pass@k is reported for."""
    return sorted({1 << exponent for exponent in range(largest.bit_length())} | {largest})
