"""A cluster of simulated nodes on this machine, with Ray's token: the node that holds the rollout worker is lost,
and the one that takes its place stops."""

import re
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


def test_a_lost_and_a_stopped_node_of_rollout_workers_are_survived_when_another_has_room(
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
        "deadlines.rollout=10",
        "deadlines.sync=10",
        "run.restarts=10",  # the learner may have been on the lost node, too
    )
    read_until(process, f"/{STEPS}  reward")
    print("lose", file=cluster.stdin, flush=True)
    read_until(process, "rollout worker 0 died during")
    read_until(process, f"/{STEPS}  reward")
    print("stop", file=cluster.stdin, flush=True)
    late = read_until(process, "rollout worker 0 did not finish the").splitlines()[-1]  # before Ray gives the node up
    [report] = re.findall(r"stacks of all processes are in (\S+);", late)
    _, stacks = Path(report).read_text().split("=== rollout worker 0 (it is waited for)")
    assert "cannot be reached" in stacks
    seen, _ = process.communicate(timeout=300)
    assert process.returncode == 0, seen
    assert check_ledger(run_dir, max_lag=1) == Account(steps=STEPS, trained=STEPS * 8, dropped=0)
