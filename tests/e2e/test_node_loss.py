"""A cluster of simulated nodes on this machine, with Ray's token: the node that holds the rollout worker is lost."""

import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxdist.observe.ledger import Account, check_ledger
from tests.e2e.command import ROOT
from tests.e2e.test_interruptions import read_until, start

STEPS = 60  # more than are done before the loss is noticed


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator["subprocess.Popen[str]"]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # inherited by the run
    command = [sys.executable, "-m", "tests.e2e.cluster_process"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def test_a_lost_node_of_rollout_workers_is_survived_when_another_has_room(
    cluster: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    assert cluster.stdout is not None
    assert cluster.stdin is not None
    run_dir = tmp_path / "run"
    process = start(
        run_dir,
        f"run.steps={STEPS}",
        f"cluster.address={cluster.stdout.readline().strip()}",
        "rollout.cpus_per_worker=5",  # which fits on no node with the learner
        "rollout.max_lag=1",
        "data.eval_problems=16",
        "run.restarts=10",  # the learner may have been on the lost node, too
    )
    read_until(process, f"/{STEPS}  reward")
    print(file=cluster.stdin, flush=True)
    seen, _ = process.communicate(timeout=300)
    assert process.returncode == 0, seen
    assert "rollout worker 0 died during" in seen
    assert check_ledger(run_dir, max_lag=1) == Account(steps=STEPS, trained=STEPS * 8, dropped=0)
