"""Kills for real, on the quickstart's model: what survives them ends with the very numbers of an undisturbed run."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import metrics_of
from tests.e2e.test_interruptions import read_until, start

STEPS = 6
SETTINGS = [f"run.steps={STEPS}", "run.checkpoint_every=2", "warm_start.steps=20", "aqn.stages=3", "log.quant_every=3"]
UNCERTAIN = ("timing_s/", "perf/", "sync/seconds")  # what another run measures otherwise


def pid(run_dir: Path, process: str) -> int:
    return int(json.loads((run_dir / "stacks" / f"{process}.txt").read_text().splitlines()[0])["pid"])


def results(run_dir: Path) -> dict[int, dict[str, Any]]:
    """All metrics of all steps that do not depend on the machine, and what was sampled."""
    found = {}
    for step, line in metrics_of(run_dir).items():
        found[step] = {name: value for name, value in line.items() if not name.startswith(UNCERTAIN)}
        if step:
            found[step]["rollouts"] = (run_dir / "rollouts" / f"step_{step}.jsonl").read_text()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(run_dir, *SETTINGS)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return run_dir


def test_killed_workers_and_ranks_are_replaced_and_no_number_changes(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, *SETTINGS)
    seen = read_until(process, "step 1/6")
    os.kill(pid(run_dir, "rollout_worker_0"), signal.SIGKILL)
    seen += read_until(process, "step 3/6")
    os.kill(pid(run_dir, "learner_rank_1"), signal.SIGKILL)
    seen += read_until(process, "step 5/6")
    os.kill(pid(run_dir, "reward_worker_0"), signal.SIGKILL)
    rest, _ = process.communicate(timeout=120)
    seen += rest
    assert process.returncode == 0, seen
    assert "rollout worker 0 died during the rollout of step" in seen
    assert "learner rank 1 died during the" in seen
    assert "reward worker 0 died during the reward of step" in seen
    assert "resumed from step 2" in seen
    assert "raylet" not in seen
    assert results(run_dir) == results(undisturbed)
