"""Runs ``mxdist`` as a user does, in a process of its own."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
# The quickstart's model and layout, with as little work as shows everything.
SHORT = ["warm_start.steps=4", "run.steps=2", "algorithm.prompts_per_step=8", "algorithm.samples_per_prompt=4"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def mxdist(*arguments: object, cwd: Path, timeout: float = 300) -> Outcome:
    command = [sys.executable, "-m", "mxdist", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def metrics_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}
