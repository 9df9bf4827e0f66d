"""Rewards: what an answer's text is worth. Built from the configuration's data section alone, without the data."""

import logging
import re
from collections.abc import Callable
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
_SENTENCE_END = re.compile(r"\.(\s|$)")


def reward_for(data: ArithmeticData | Gsm8kData) -> Reward:
    """The reward of a task."""
    return exact_reward if isinstance(data, ArithmeticData) else final_answer_reward(data.format_reward)


def exact_reward(text: str, reference: str) -> RewardResult:
    """1 for exactly the reference, else 0."""
    accuracy = float(text == reference)
    return RewardResult(accuracy, {"accuracy": accuracy})


def final_answer_reward(format_reward: float) -> Reward:
    """1 for the right final answer, plus ``format_reward`` for an answer in the asked-for form, right or wrong."""

    def reward(text: str, reference: str) -> RewardResult:
        accuracy, form = float(is_right(text, reference)), float(has_form(text))
        return RewardResult(accuracy + format_reward * form, {"accuracy": accuracy, "format": form})

    return reward


def has_form(text: str) -> bool:
    """Whether the text has one ``#### number`` and ends with it."""
    return text.count(_MARK) == 1 and _FORM.search(text) is not None


def is_right(text: str, reference: str) -> bool:
    """Whether math-verify finds the final answer of a text equal to the reference."""
    span = final_answer_span(text)
    if not _is_safe(span):
        return False
    return bool(verify(_parse_reference(reference), _parse(span), timeout_seconds=None))


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
    return span.replace("\\$", "").replace("$", "").strip(" *")


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
