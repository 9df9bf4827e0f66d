"""A run of two learner ranks that broadcast weights to two engines: parity at every sync, whoever dies on the way."""

import os
import re
import signal
from pathlib import Path

from mxdist.observe.ledger import Account, check_ledger
from tests.e2e.command import metrics_of
from tests.e2e.faults import pid
from tests.e2e.test_interruptions import read_until, start

STEPS = 5
SETTINGS = [
    "sync.transport=broadcast",
    "rollout.workers=2",
    "rollout.max_lag=1",
    f"run.steps={STEPS}",
    "run.checkpoint_every=1",
    "run.restarts=10",
    "warm_start.steps=4",
    "aqn.mode=disabled",
    "data.eval_problems=16",
    "deadlines.sync=40",
]


def test_engines_and_learner_ranks_that_die_leave_a_run_that_broadcasts_its_weights_going(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, *SETTINGS)
    seen = read_until(process, "step 1/5")
    assert "weights go through broadcasts to all engines (gloo)" in seen
    os.kill(pid(run_dir, "rollout_worker_1"), signal.SIGKILL)
    seen += read_until(process, "step 3/5")
    os.kill(pid(run_dir, "learner_rank_1"), signal.SIGKILL)
    rest, _ = process.communicate(timeout=200)
    seen += rest
    assert process.returncode == 0, seen
    assert "rollout worker 1 died during the" in seen
    assert re.search(r"learner rank 1 died during the .*; restart", seen)
    steps = metrics_of(run_dir)
    assert steps[STEPS]["parity/checked_tensors"] > 0
    assert all(steps[step]["off_policy/staleness/max"] <= 1 for step in range(1, STEPS + 1))
    assert check_ledger(run_dir, max_lag=1) == Account(steps=STEPS, trained=STEPS * 8, dropped=0)
