"""Weights of several recipes that two learner ranks broadcast to two engines, or send as changes: either way an engine
that missed a version needs it whole. Parity at every sync, whoever dies.

One run shows both: what modules with recipes of their own need (printed, agreed on by both sides, watched) is none of
the transport's business.
"""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from mxdist.observe.ledger import Account, check_ledger
from tests.e2e.command import metrics_of
from tests.e2e.faults import pid
from tests.e2e.test_interruptions import read_until, start

STEPS = 5
SETTINGS = [
    'recipe_overrides=[{modules: "*.0.self_attn.*", recipe: bf16}, {modules: "*.down_proj", recipe: mxfp4_g4}]',
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
WAYS = {
    "broadcast": "weights go through broadcasts to all engines (gloo)",
    "delta": "weights go through Ray's object store, as blocks that changed since the version before",
}


@dataclass(frozen=True)
class Done:
    run_dir: Path
    said: str


@pytest.fixture(scope="module", params=WAYS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """An engine dies, then a learner rank."""
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    process = start(run_dir, f"sync.transport={request.param}", *SETTINGS)
    seen = read_until(process, "step 1/5")
    assert WAYS[request.param] in seen
    os.kill(pid(run_dir, "rollout_worker_1"), signal.SIGKILL)
    seen += read_until(process, "step 3/5")
    os.kill(pid(run_dir, "learner_rank_1"), signal.SIGKILL)
    rest, _ = process.communicate(timeout=200)
    seen += rest
    assert process.returncode == 0, seen
    return Done(run_dir, seen)


def test_engines_and_learner_ranks_that_die_leave_the_run_going(done: Done) -> None:
    assert "rollout worker 1 died during the" in done.said
    assert re.search(r"learner rank 1 died during the .*; restart", done.said)
    steps = metrics_of(done.run_dir)
    assert steps[STEPS]["parity/checked_tensors"] > 0
    assert all(steps[step]["off_policy/staleness/max"] <= 1 for step in range(1, STEPS + 1))
    assert check_ledger(done.run_dir, max_lag=1) == Account(steps=STEPS, trained=STEPS * 8, dropped=0)


def test_recipes_by_module_name_are_those_of_both_sides_and_are_watched(done: Done) -> None:
    lists = {line.split(": ")[1] for line in done.said.splitlines() if "linears in" in line}
    assert lists == {"36 linears in mxfp4_mbs_of", "16 linears in mxfp4_g4"}
    metrics = metrics_of(done.run_dir)
    for kind in ("weights", "activations", "gradients"):  # watched in steps 1, 11, ...
        nmse = metrics[1][f"quant/nmse/{kind}"]
        # A model this fresh earns no reward: its gradients are zero, and so is what quantising them could lose.
        assert nmse is None if kind == "gradients" else 0 < nmse < 0.1
        assert f"quant/nmse/{kind}" not in metrics[2]
