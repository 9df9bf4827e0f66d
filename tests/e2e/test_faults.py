"""Kills for real, on the quickstart's model: what survives them ends with the very numbers of an undisturbed run."""

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mxdist.observe.ledger import Account, check_ledger
from tests.e2e.command import metrics_of, mxdist
from tests.e2e.test_interruptions import read_until, start

STEPS = 6
SETTINGS = [
    f"run.steps={STEPS}",
    "run.checkpoint_every=2",
    "warm_start.steps=20",
    "aqn.stages=3",
    "log.quant_every=3",
    "data.eval_problems=16",
]
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
    assert "rollout worker 0 died during the" in seen
    assert "learner rank 1 died during the" in seen
    assert "reward worker 0 died during the" in seen
    assert "resumed from step" in seen  # the newest checkpoint that was complete
    assert "raylet" not in seen
    assert results(run_dir) == results(undisturbed)
    assert check_ledger(run_dir, max_lag=0) == Account(steps=STEPS, trained=STEPS * 8, dropped=0)


def test_a_run_killed_with_all_its_processes_resumes_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, *SETTINGS)
    read_until(process, "step 3/6")
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()
    assert check_ledger(run_dir, max_lag=0).steps == 3
    outcome = mxdist("resume", run_dir, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert "resumed from step" in outcome.out
    assert results(run_dir) == results(undisturbed)
    assert check_ledger(run_dir, max_lag=0).steps == STEPS
    assert weights(run_dir) == weights(undisturbed)


def weights(run_dir: Path) -> dict[str, bytes]:
    """The final weights and the optimizer's state, bit for bit."""
    reader = FileSystemReader(run_dir / "checkpoints" / f"step_{STEPS}" / "learner")
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    assert len(state) > 20
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def test_a_hang_a_full_disk_a_scheduler_and_a_damaged_file_change_no_number(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    short = [f"deadlines.{wait}=20" for wait in ("update", "sync", "checkpoint")]
    process = start(run_dir, *SETTINGS, "run.checkpoint_every=1", *short)
    read_until(process, "step 1/6")
    stopped = pid(run_dir, "learner_rank_1")
    os.kill(stopped, signal.SIGSTOP)
    seen = read_until(process, "restarting the learner")
    assert "did not finish the" in seen
    assert "learner rank 1" in seen  # as its peer, which waits for it
    [report] = (run_dir / "stacks").glob("report_*.txt")
    assert f"the stacks of all processes are in {report}" in seen
    assert f"process {stopped} is stopped" in report.read_text()
    assert "distributed_c10d.py" in report.read_text()  # where the other rank waits for it

    seen = read_until(process, "step 2/6")
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
    assert seen.strip().splitlines()[-1].startswith("mxdist: asked to stop (SIGTERM) and stopped after step")

    newest = max((run_dir / "checkpoints").glob("step_?"))
    victim = max((newest / "learner").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    outcome = mxdist("resume", run_dir, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert f"checkpoint {newest} is passed over: the checksum of learner/{victim.name}" in outcome.out
    assert results(run_dir) == results(undisturbed)
    assert check_ledger(run_dir, max_lag=0).steps == STEPS
