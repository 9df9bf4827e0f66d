"""Clusters for real on one machine: hosts of namespaces, and Slurm. Skipped where the machine does not allow it."""

import os
from pathlib import Path

import pytest

from tests.e2e.command import metrics_of
from tools import hosts, slurm

LONG = pytest.mark.skipif(
    "MXDIST_LONG_TESTS" not in os.environ, reason="takes minutes; MXDIST_LONG_TESTS=1 runs it, and so does its tool"
)
HOSTS = pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))


@HOSTS
@pytest.mark.timeout(900)
def test_three_hosts_train_together_and_the_learner_follows_them(tmp_path: Path) -> None:
    with hosts.network(list(hosts.CPUS), tmp_path) as net:
        hosts.start_ray(net, hosts.CPUS)
        lines = list(hosts.train(net, tmp_path / "run"))
    assert lines[-1] == "exit code 0", "\n".join(lines)
    assert "learner ranks 0-1 on node2 (10.77.0.2), ranks 2-3 on node3 (10.77.0.3)" in lines
    assert sorted(metrics_of(tmp_path / "run")) == [0, 1, 2, 3]


@LONG
@HOSTS
@pytest.mark.timeout(900)
def test_a_host_that_is_cut_off_is_named_and_the_run_goes_on_without_it(tmp_path: Path) -> None:
    with hosts.network(list(hosts.CPUS), tmp_path) as net:
        hosts.start_ray(net, dict.fromkeys(hosts.CPUS, 3), hosts.PATIENCE)
        lines = list(hosts.train(net, tmp_path / "run", cut=True))
    assert lines[-1] == "exit code 0", "\n".join(lines)
    cut = next(line.split()[-1] for line in lines if line.startswith("--- pulling the cable of"))
    assert any(f"node {cut} (" in line and "is lost; learner ranks" in line for line in lines), "\n".join(lines)
    assert sorted(metrics_of(tmp_path / "run")) == [0, 1, 2, 3]


@LONG
@HOSTS
@pytest.mark.timeout(900)
def test_a_host_that_is_cut_off_ends_a_run_for_which_there_is_no_room_left(tmp_path: Path) -> None:
    with hosts.network(list(hosts.CPUS), tmp_path) as net:
        hosts.start_ray(net, hosts.CPUS, hosts.PATIENCE)
        *lines, complaint, code = hosts.train(net, tmp_path / "run", cut=True)
    assert code == "exit code 1", "\n".join(lines)
    assert complaint.startswith("mxdist: node node3 (10.77.0.3) is lost; the learner's 4 ranks"), complaint


@LONG
@pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not()))
@pytest.mark.timeout(900)
def test_slurm_requeues_a_terminated_job_which_resumes(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "slurm").mkdir()
    with slurm.slurm(tmp_path / "slurm") as made:
        log = tmp_path / "out" / "log"
        job = slurm.submit(made, tmp_path / "out" / "run", log)
        lines = list(slurm.follow(made, job, log, terminate_after="step 2/"))
    assert lines[-1] == "job COMPLETED", "\n".join(lines)
    assert any(line.startswith("requeueing job") for line in lines)
    assert any(line.startswith("resumed from step") for line in lines)
    assert sorted(metrics_of(tmp_path / "out" / "run")) == list(range(7))
