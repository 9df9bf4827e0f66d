"""Long lists of module names in a line a person can read."""

from collections.abc import Sequence
from math import prod


def compact_names(names: Sequence[str]) -> str:
    """Names with their numbers folded: ``model.layers.{0-3}.mlp.experts.{0-7}.up_proj``, comma-separated.

    Names of one pattern are folded only when every combination of their numbers is there; otherwise the pattern is
    followed by how many of them there are.
    """
    patterns: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts = name.split(".")
        pattern = tuple("#" if part.isdigit() else part for part in parts)
        patterns.setdefault(pattern, []).append(tuple(int(part) for part in parts if part.isdigit()))
    return ", ".join(_fold(pattern, numbers) for pattern, numbers in patterns.items()) or "none"


def _fold(pattern: tuple[str, ...], numbers: list[tuple[int, ...]]) -> str:
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    ranges = iter(_ranges(column) for column in columns)
    text = ".".join(next(ranges) if part == "#" else part for part in pattern)
    complete = prod(len(column) for column in columns) == len(set(numbers))
    return text if complete else f"{text} ({len(numbers)} of them)"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    text = ",".join("-".join(str(end) for end in run) for run in runs)
    return text if text.isdigit() else f"{{{text}}}"
