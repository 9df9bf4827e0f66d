"""Rewards: what an answer's text is worth. Built from the configuration's data section alone, without the data."""

import logging
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from math_verify import parse, verify

from mxdist.config.schema import ArithmeticData, Gsm8kData
from mxdist.tasks.base import RewardResult

Reward = Callable[[str, str], RewardResult]  # (the model's text, the reference answer)

# Its timeouts use SIGALRM, which only a main thread may set and which cannot interrupt big-integer arithmetic anyway.
# They are off; what may take long is kept from it instead (see _is_safe). The warning about that would be a line each.
logging.getLogger("math_verify").setLevel(logging.ERROR)

LONGEST_SPAN = 100  # characters of a final answer handed to the parser
_MARK = "####"
_NUMBER = r"-?\$?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?"
_FORM = re.compile(rf"^{_MARK} {_NUMBER}\s*\Z", re.MULTILINE)
_ANSWER_IS = re.compile(r"\banswer\s*(?:is\b|:|=)\s*:?", re.IGNORECASE)
_PLAIN_NUMBER = re.compile(r"-?\d*\.?\d+")
_REWRITTEN = (("\\$", ""), ("$", ""), ("{,}", ","), ("\\!", ""), ("\N{MINUS SIGN}", "-"))  # what math-verify misreads
_SENTENCE_END = re.compile(r"\.(\s|$)")


def reward_for(data: ArithmeticData | Gsm8kData) -> Reward:
    """The reward of a task."""
    return exact_reward if isinstance(data, ArithmeticData) else final_answer_reward(data.format_reward)


def exact_reward(text: str, reference: str) -> RewardResult:
    """1 for exactly the reference, else 0."""
    accuracy = float(text == reference)
    return RewardResult(accuracy, {"accuracy": accuracy}, text)


def final_answer_reward(format_reward: float) -> Reward:
    """1 for the right final answer, plus ``format_reward`` for an answer in the asked-for form, right or wrong."""

    def reward(text: str, reference: str) -> RewardResult:
        right, final = _judged(text, reference)
        accuracy, form = float(right), float(has_form(text))
        return RewardResult(accuracy + format_reward * form, {"accuracy": accuracy, "format": form}, final)

    return reward


def has_form(text: str) -> bool:
    """Whether the text has one ``#### number`` and ends with it."""
    return text.count(_MARK) == 1 and _FORM.search(text) is not None


def is_right(text: str, reference: str) -> bool:
    """Whether math-verify finds the final answer of a text equal to the reference."""
    return _judged(text, reference)[0]


def _judged(text: str, reference: str) -> tuple[bool, str]:
    """Whether a text's final answer is right, and that answer as ``_as_read`` writes it."""
    span = final_answer_span(text)
    if not _is_safe(span):
        return False, span[:LONGEST_SPAN].casefold()
    parsed = _parse(span)
    return bool(verify(_parse_reference(reference), parsed, timeout_seconds=None)), _as_read(span, parsed)


def _as_read(span: str, parsed: list) -> str:
    """A final answer in one form for all ways to write a number: 1,234.50 is 1234.5; what is no number stays."""
    if not parsed:
        return span.casefold()
    text = str(parsed[-1]).replace(",", "")  # math-verify's second reading: the text of the number, without units
    if not _PLAIN_NUMBER.fullmatch(text):
        text = str(parsed[0].doit() if hasattr(parsed[0], "doit") else parsed[0])  # 18/3 is 6
    try:
        number = Fraction(text)
    except ValueError:
        return text.casefold()
    decimal = Decimal(number.numerator) / Decimal(number.denominator)
    return f"{decimal.normalize():f}" if Fraction(decimal) == number else str(number)


def final_answer_span(text: str) -> str:
    """The part of a text that states its final answer.

    In this order: after the last ``####``; inside the last ``\\boxed{}``; after the last "answer is" or "answer:"; the
    last line.
    """
    if _MARK in text:
        span = text.rsplit(_MARK, 1)[1].strip("\n ").split("\n", 1)[0]
    elif "\\boxed{" in text:
        span = _inside_braces(text.rsplit("\\boxed{", 1)[1])
    else:
        lines = text.strip().splitlines()
        span = lines[-1] if lines else ""
        for match in _ANSWER_IS.finditer(text):
            span = text[match.end() :].strip().split("\n", 1)[0]
        if sentence_end := _SENTENCE_END.search(span):
            span = span[: sentence_end.start()]
    for written, meant in _REWRITTEN:
        span = span.replace(written, meant)
    return span.strip(" *").removeprefix("+")


def _inside_braces(text: str) -> str:
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index]
    return text


def _is_safe(span: str) -> bool:
    """Powers and factorials of what a model writes can take the age of the universe."""
    return 0 < len(span) <= LONGEST_SPAN and not any(sign in span for sign in ("^", "**", "!"))


def _parse(span: str) -> list:
    return parse(span, parsing_timeout=None)


@lru_cache(maxsize=4096)
def _parse_reference(reference: str) -> list:
    return _parse(reference)
