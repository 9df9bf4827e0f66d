"""Faults for real, on the quickstart's model: what survives them ends with the very numbers of an undisturbed run.

Processes take longer to start than steps to train, so one run suffers many faults.
"""

import math
import os
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mxdist.observe.ledger import Account, check_ledger
from tests.e2e.command import metrics_of, mxdist
from tests.e2e.faults import caught_at, flip_a_bit, kill_everything, pid, results, soon, weights
from tests.e2e.test_interruptions import read_until, start

STEPS = 12
SETTINGS = [
    f"run.steps={STEPS}",
    "run.checkpoint_every=2",
    "run.restarts=10",
    "warm_start.steps=20",
    "aqn.stages=3",
    "log.quant_every=3",
    "data.eval_problems=16",
]
EVERY_GROUP_ONCE = Account(steps=STEPS, trained=STEPS * 8, dropped=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(run_dir, *SETTINGS)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return run_dir


def test_a_run_killed_with_all_its_processes_resumes_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    """The checkpoint of step 4 is being written when everything dies, and that of step 2 turns out damaged."""
    run_dir = tmp_path / "run"
    process = start(run_dir, *SETTINGS)
    checkpoints = run_dir / "checkpoints"
    read_until(process, "step  3/12")
    soon(lambda: next(checkpoints.glob("step_4.partial*"), None), "the checkpoint of step 4")
    kill_everything(process.pid)
    process.communicate()
    assert {path.name.partition(".")[0] for path in checkpoints.glob("*.partial*")} == {"step_4"}
    assert not (checkpoints / "step_4").exists()
    victim = max((checkpoints / "step_2" / "learner").glob("*.distcp"))
    flip_a_bit(victim)
    outcome = mxdist("resume", run_dir, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert f"step_2 is passed over: the checksum of learner/{victim.name}" in outcome.out
    assert "resumed from step 0" in outcome.out
    assert not list(checkpoints.glob("*.partial*"))
    assert results(run_dir) == results(undisturbed)
    assert check_ledger(run_dir, max_lag=0) == EVERY_GROUP_ONCE
    assert weights(run_dir, STEPS) == weights(undisturbed, STEPS)


def test_kills_one_by_one_at_every_stage_change_no_number(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, *SETTINGS)
    seen = read_until(process, "starting learner")
    for starting in ("rollout_worker_0", "learner_rank_1"):
        os.kill(pid(run_dir, starting), signal.SIGKILL)
    seen += read_until(process, "step  1/12")
    os.kill(caught_at(run_dir, "rollout_worker_0", "generate"), signal.SIGKILL)
    seen += read_until(process, "step  3/12")
    os.kill(caught_at(run_dir, "learner_rank_1", "export"), signal.SIGKILL)
    seen += read_until(process, "resumed from step 2")
    soon(lambda: next((run_dir / "checkpoints").glob("step_6.partial*"), None), "the checkpoint of step 6")
    os.kill(pid(run_dir, "learner_rank_0"), signal.SIGKILL)
    seen += read_until(process, "resumed from step 4")
    seen += read_until(process, "step  7/12")
    os.kill(pid(run_dir, "reward_worker_0"), signal.SIGKILL)
    rest, _ = process.communicate(timeout=120)
    seen += rest
    assert process.returncode == 0, seen
    for died in (
        "learner rank 1 died during the start",
        "rollout worker 0 died during the start",
        "rollout worker 0 died during the rollout of step 1",
        "learner rank 1 died during the export of weights version",
        "learner rank 0 died during the",
        "reward worker 0 died during the reward of step 7",
    ):
        assert died in seen
    assert seen.count("died during") == 6
    assert "ray" not in seen  # of its own accord it would show tracebacks of what is recovered from
    assert results(run_dir) == results(undisturbed)
    assert check_ledger(run_dir, max_lag=0) == EVERY_GROUP_ONCE


@dataclass(frozen=True)
class Preempted:
    """A run that a scheduler ended."""

    run_dir: Path
    step: int
    results: dict[int, dict[str, Any]]
    account: Account


@pytest.fixture(scope="module")
def preempted(tmp_path_factory: pytest.TempPathFactory) -> Preempted:
    """A rank hangs, an engine stops answering, the disk is full, and then SIGTERM."""
    run_dir = tmp_path_factory.mktemp("preempted") / "run"
    short = [f"deadlines.{wait}=10" for wait in ("rollout", "update", "sync", "checkpoint")]
    process = start(run_dir, *SETTINGS, "run.checkpoint_every=1", *short)
    read_until(process, "step  1/12")
    _stop(process, run_dir, "learner_rank_1")
    read_until(process, "step  3/12")
    _stop(process, run_dir, "rollout_worker_0")
    read_until(process, "step  4/12")
    writers = [psutil.Process(pid(run_dir, f"learner_rank_{rank}")) for rank in (0, 1)]
    for learner in writers:  # the disk is full: no file grows beyond so many bytes
        learner.rlimit(psutil.RLIMIT_FSIZE, (1_100_000, psutil.RLIM_INFINITY))
    seen = read_until(process, "no checkpoint of step")
    assert "could not be written" in seen
    for learner in writers:
        learner.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))

    process.terminate()
    seen, _ = process.communicate(timeout=120)
    assert process.returncode == 75, seen
    last = seen.strip().splitlines()[-1]
    assert last.startswith("mxdist: asked to stop (SIGTERM) and stopped after step")
    step = max(metrics_of(run_dir))
    assert f"after step {step};" in last
    return Preempted(run_dir, step, results(run_dir), check_ledger(run_dir, max_lag=0))


def _stop(process: "subprocess.Popen[str]", run_dir: Path, name: str) -> None:
    """SIGSTOP a process, and read the report of the deadline that passes."""
    stopped = pid(run_dir, name)
    os.kill(stopped, signal.SIGSTOP)
    line = read_until(process, "did not finish the").splitlines()[-1]
    head, *parts = Path(re.findall(r"stacks of all processes are in (\S+);", line)[0]).read_text().split("\n=== ")
    stacks = dict(part.split("\n", 1) for part in parts)
    assert head.startswith("The controller waited for")
    assert f"process {stopped} is stopped" in stacks.pop(f"{name.replace('_', ' ')} (it is waited for)")
    assert "in train" in stacks["controller"]
    assert len(stacks) == 4  # of all the others
    assert all("hread 0x" in stack for stack in stacks.values())
    if name.startswith("learner"):
        assert "distributed_c10d.py" in stacks["learner rank 0 (it is waited for)"]  # where it waits for the other


def test_a_hang_a_stopped_engine_a_full_disk_and_a_scheduler_change_no_number(
    undisturbed: Path, preempted: Preempted
) -> None:
    expected = results(undisturbed)
    assert 4 < preempted.step < STEPS
    assert preempted.results == {step: expected[step] for step in range(preempted.step + 1)}
    assert preempted.account == Account(steps=preempted.step, trained=preempted.step * 8, dropped=0)


def test_a_run_whose_entropy_collapses_is_rolled_back_and_goes_on_with_other_groups(
    undisturbed: Path, preempted: Preempted, tmp_path: Path
) -> None:
    """The bound is passed at one step, which an undisturbed run tells beforehand."""
    run_dir, before = preempted.run_dir, preempted.step
    entropy = {step: line["actor/entropy"] for step, line in metrics_of(undisturbed).items() if step > before}
    lowest = min(entropy, key=lambda step: entropy[step])
    bound = math.nextafter(entropy[lowest], math.inf)
    outcome = mxdist("resume", run_dir, f"guards.min_entropy={bound!r}", "guards.then=roll_back", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert f"resumed from step {before}" in outcome.out
    assert f"step {lowest}: actor/entropy {bound:.4g} has fallen below guards.min_entropy" in outcome.out
    _, *later = re.findall(r"resumed from step (\d+)", outcome.out)
    assert later
    base = int(later[0])
    assert before <= base < lowest
    found, expected = results(run_dir), results(undisturbed)
    assert all(found[step] == expected[step] for step in range(base + 1))
    assert found[lowest] != expected[lowest]
    assert all(found[step]["actor/entropy"] >= bound for step in range(before + 1, STEPS + 1))
    account = check_ledger(run_dir, max_lag=0)
    assert (account.steps, account.trained) == (STEPS, STEPS * 8)
    assert account.dropped >= 8 * (lowest - base)
