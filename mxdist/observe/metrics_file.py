"""metrics.jsonl: one JSON object a step, in the order of steps."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends to ``metrics.jsonl``; every line is on its way to the disk before ``append`` returns."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """Open the file. ``resume_step``: the step to go on from; later lines are dropped. None: begin anew."""
        if resume_step is not None and path.exists():
            rewrite(path, [line for line in read_metrics(path) if line["step"] <= resume_step])
        self._stream = open(path, "w" if resume_step is None else "a", encoding="utf-8")  # noqa: SIM115  (see close)
        self._last = -1 if resume_step is None else resume_step

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a step's line. What is not a finite number becomes null: JSON has no other word for it.

        Raises:
            ValueError: the step already has its line, or an earlier one comes late.
        """
        if step <= self._last:
            raise ValueError(f"metrics of step {step} come after those of step {self._last}")
        self._last = step
        values = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file. A last line that a killed process left half-written is passed over.

    Raises:
        ValueError: any other line is malformed.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        if not line.endswith("\n") and line is lines[-1]:
            return
        yield json.loads(line)


def rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replace a file of JSON lines; readers see the old one or the new one."""
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
