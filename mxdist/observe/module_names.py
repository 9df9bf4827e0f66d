"""Long lists of module names in a line a person can read."""

from collections.abc import Sequence
from math import prod


def compact_names(names: Sequence[str]) -> str:
    """Names folded where only numbers or the last part differ, comma-separated:

        model.layers.{0-3}.mlp.experts.{0-7}.{down_proj,gate_proj,up_proj}

    Numbers are folded only when every combination of them is there; otherwise the pattern is followed by how many of
    them there are.
    """
    patterns: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts = name.split(".")
        pattern = tuple("#" if part.isdigit() else part for part in parts)
        patterns.setdefault(pattern, []).append(tuple(int(part) for part in parts if part.isdigit()))
    lasts: dict[tuple[str, str], list[str]] = {}  # (everything before the last part, remark) -> last parts
    for pattern, numbers in patterns.items():
        text, remark = _fold(pattern, numbers)
        before, _, last = text.rpartition(".")
        lasts.setdefault((before, remark), []).append(last)
    folded = [_join(before, last) + remark for (before, remark), last in lasts.items()]
    return ", ".join(folded) or "none"


def _fold(pattern: tuple[str, ...], numbers: list[tuple[int, ...]]) -> tuple[str, str]:
    """The pattern with its numbers as ranges, and a remark when not every combination of them is there."""
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    ranges = iter(_ranges(column) for column in columns)
    text = ".".join(next(ranges) if part == "#" else part for part in pattern)
    complete = prod(len(column) for column in columns) == len(set(numbers))
    return text, "" if complete else f" ({len(numbers)} of them)"


def _join(before: str, lasts: list[str]) -> str:
    last = lasts[0] if len(lasts) == 1 else f"{{{','.join(lasts)}}}"
    return f"{before}.{last}" if before else last


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    text = ",".join("-".join(str(end) for end in run) for run in runs)
    return text if text.isdigit() else f"{{{text}}}"
