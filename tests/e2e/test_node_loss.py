"""A cluster of simulated nodes on this machine, with Ray's token: the node that holds the rollout worker is lost."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from mxdist.observe.ledger import Account, check_ledger
from tests.e2e.test_interruptions import read_until, start

STEPS = 4


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1.5, "include_dashboard": False})
    yield cluster
    cluster.shutdown()
    del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]


def test_a_lost_node_of_rollout_workers_is_survived_when_another_has_room(cluster: Cluster, tmp_path: Path) -> None:
    lost = cluster.add_node(num_cpus=2)
    run_dir = tmp_path / "run"
    process = start(
        run_dir,
        f"run.steps={STEPS}",
        f"cluster.address={cluster.address}",
        "rollout.cpus_per_worker=2",  # which fits on no node with the learner
        "rollout.max_lag=1",
        "data.eval_problems=16",
    )
    read_until(process, "step 1/")
    cluster.add_node(num_cpus=2)
    cluster.remove_node(lost, allow_graceful=False)
    seen, _ = process.communicate(timeout=300)
    assert process.returncode == 0, seen
    assert "rollout worker 0 died during" in seen
    assert check_ledger(run_dir, max_lag=1) == Account(steps=STEPS, trained=STEPS * 8, dropped=0)
