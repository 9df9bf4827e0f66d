"""ledger.jsonl: which groups of the training order each step was trained on, and proof that it was each once.

A group's place is "epoch:position". Steps that a resumed run takes again replace their lines, as their updates do.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mxdist.observe.metrics_file import read_metrics, rewrite

FILE_NAME = "ledger.jsonl"


class Ledger:
    """Appends to the ledger of a run."""

    def __init__(self, run_dir: Path, resume_step: int | None, passed_over: Sequence[str] = ()) -> None:
        """
        Args:
            resume_step: the step to go on from; later lines are dropped. None: begin anew.
            passed_over: places that the run will not come to again; they are given up in the next line.
        """
        self._path = run_dir / FILE_NAME
        self._passed_over = list(passed_over)
        old = list(read_metrics(self._path)) if self._path.exists() and resume_step is not None else []
        rewrite(self._path, [line for line in old if line["step"] <= (resume_step or 0)])

    def append(self, step: int, trained: Sequence[str], dropped: Sequence[str], versions: Sequence[int]) -> None:
        """The line of a step: places trained on, the versions of the weights that sampled them, and places given up.

        Groups are given up by dynamic sampling (DAPO), which replaces those that teach nothing, and by rolling back.
        """
        given_up, self._passed_over = [*dropped, *self._passed_over], []
        line = {"step": step, "trained": list(trained), "versions": list(versions), "dropped": given_up}
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def places_after(run_dir: Path, step: int) -> list[str]:
    """Places of the groups in the lines after that of ``step``."""
    lines = [line for line in read_metrics(run_dir / FILE_NAME) if line["step"] > step]
    return [place for line in lines for place in line["trained"] + line["dropped"]]


@dataclass(frozen=True)
class Account:
    """A ledger that adds up."""

    steps: int
    trained: int
    dropped: int


def check_ledger(run_dir: Path, max_lag: int) -> Account:
    """Hold a finished run's ledger to its promise: every step once, every group drawn once, none left out, none stale.

    Raises:
        ValueError: says what was trained on twice, or lost.
    """
    lines = list(read_metrics(run_dir / FILE_NAME))
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)):
        raise ValueError(f"the steps of the ledger are {[line['step'] for line in lines]}, not 1, 2, 3, ...")
    seen: dict[str, int] = {}
    for line in lines:
        for place in line["trained"] + line["dropped"]:
            if place in seen:
                raise ValueError(f"group {place} is in step {seen[place]} and in step {line['step']}")
            seen[place] = line["step"]
        stale = [version for version in line["versions"] if line["step"] - 1 - version > max_lag]
        if stale:
            raise ValueError(f"step {line['step']} was trained on groups of version {min(stale)}")
    for epoch, positions in _by_epoch(seen):
        if missing := set(range(max(positions) + 1)) - positions:
            raise ValueError(f"groups {sorted(missing)} of epoch {epoch} were drawn and are nowhere")
    trained = sum(len(line["trained"]) for line in lines)
    return Account(len(lines), trained, len(seen) - trained)


def _by_epoch(places: dict[str, int]) -> Iterator[tuple[int, set[int]]]:
    epochs: dict[int, set[int]] = {}
    for place in places:
        epoch, position = map(int, place.split(":"))
        epochs.setdefault(epoch, set()).add(position)
    yield from sorted(epochs.items())
