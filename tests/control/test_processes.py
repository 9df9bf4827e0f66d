"""Real Ray processes: how the controller waits for them, and what it says when one fails."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from mxdist.config import Config
from mxdist.control.processes import Process, cpus_wanted, start_ray
from mxdist.control.roster import Roster
from mxdist.control.waits import wait_for
from mxdist.errors import DeadlineExceeded, OutOfMemory, ParityError, RunStopped, UserError

ONE_RANK = {"ranks": 1, "expert_parallel": 1}


pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def roster(tmp_path: Path) -> Iterator[Roster]:
    roster = Roster(tmp_path)
    yield roster
    for process in roster.named(""):
        roster.dismiss(process)


def started(roster: Roster, name: str) -> Process:
    process = roster.start(name, 0.1, 0)
    wait_for([process.construct("tests.control.sleeper:Sleeper")], 60, "start")
    return process


@pytest.fixture
def sleeper(roster: Roster) -> Process:
    return started(roster, "learner rank 7")


def test_results_come_in_the_order_of_the_calls(sleeper: Process) -> None:
    pending = [sleeper.call("nap", "sleep", seconds) for seconds in (0.2, 0.0, 0.1)]
    assert wait_for(pending, 30, "update") == [0.2, 0.0, 0.1]


def test_what_is_said_aside_is_heard_during_a_call_and_calls_stay_in_order(roster: Roster) -> None:
    process = roster.start("rollout worker 0", 0.1, 0, aside=True)
    wait_for([process.construct("tests.control.sleeper:Sleeper")], 60, "start")
    listening = [process.call("work", "listen", seconds) for seconds in (1.0, 0.0)]
    added = process.call_with_list("sum", "add", [ray.put(1), ray.put(2)])
    process.call_aside("hear", [ray.put(3)], "word")
    assert wait_for([*listening, added], 30, "rollout") == [("word", [3]), ("word", [3]), 3]


def test_an_expired_deadline_names_the_process_the_work_and_the_key(sleeper: Process) -> None:
    with pytest.raises(DeadlineExceeded, match=r"learner rank 7 .* long nap .* deadlines\.rollout"):
        wait_for([sleeper.call("long nap", "sleep", 5)], 0.3, "rollout")


@pytest.mark.parametrize(("kind", "error"), [("user", UserError), ("parity", ParityError)])
def test_what_a_worker_has_to_say_arrives_as_it_was_said(sleeper: Process, kind: str, error: type) -> None:
    with pytest.raises(error, match=r"^what happened$"):
        wait_for([sleeper.call("work", "fail", kind)], 30, "update")


def test_a_bug_in_a_worker_keeps_its_traceback(sleeper: Process) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        wait_for([sleeper.call("work", "fail", "bug")], 30, "update")
    assert "in fail" in str(caught.value)


def test_a_killed_process_is_named(sleeper: Process) -> None:
    with pytest.raises(RunStopped, match="learner rank 7 died during the last act"):
        wait_for([sleeper.call("last act", "die")], 30, "update")


def test_the_process_that_died_is_named_and_not_the_one_that_noticed(sleeper: Process, roster: Roster) -> None:
    gone = started(roster, "learner rank 8")
    noticed = sleeper.call("work", "fail", "bug")  # as a rank does whose peer closed the connection
    with pytest.raises(RunStopped, match="learner rank 8 died during the work"):
        wait_for([noticed, gone.call("work", "die")], 30, "update")


def test_all_processes_that_are_late_are_named(sleeper: Process, roster: Roster) -> None:
    other = started(roster, "learner rank 8")
    pending = [process.call("long nap", "sleep", 3) for process in (sleeper, other)]
    with pytest.raises(DeadlineExceeded, match=r"learner rank 7 .*nor did learner rank 8"):
        wait_for(pending, 0.3, "rollout")


def test_references_in_a_list_reach_the_worker_as_values(sleeper: Process) -> None:
    references = [ray.put(value) for value in (1, 2, 3)]
    assert wait_for([sleeper.call_with_list("sum", "add", references)], 30, "sync") == [6]


def test_the_rendezvous_takes_a_free_port_or_says_that_the_wanted_one_is_taken(sleeper: Process) -> None:
    [address] = wait_for([sleeper.rendezvous(0)], 30, "start")
    host, port = address.removeprefix("tcp://").split(":")
    assert host == ray.util.get_node_ip_address()
    with socket.socket() as taken:
        taken.bind((host, int(port)))
        taken.listen()
        assert wait_for([sleeper.rendezvous(int(port))], 30, "start") == [None]


def test_a_layout_that_the_cluster_cannot_hold_is_refused_with_both_numbers() -> None:
    config = Config.model_validate({"rollout": {"gpus_per_worker": 1, "workers": 3}})
    ray.shutdown()
    try:
        with pytest.raises(UserError, match="asks for 3 GPUs but Ray has 0 free"):
            start_ray(config)
    finally:
        start_ray(Config())


def test_a_ray_that_is_too_slow_to_start_is_started_once_more_and_then_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts = []

    def too_slow(**options: object) -> None:
        attempts.append(options)
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("mxdist.control.processes.ray.init", too_slow)
    monkeypatch.setattr("mxdist.control.processes.ray.shutdown", lambda: None)  # Ray is in use here
    with pytest.raises(UserError, match=r"Ray did not start here within its 30 s, 2 times over \(load \d+ on"):
        start_ray(Config())
    assert len(attempts) == 2


def test_a_cluster_that_does_not_answer_is_named() -> None:
    ray.shutdown()
    try:
        with pytest.raises(UserError, match=r"cluster\.address=127\.0\.0\.1:1"):
            start_ray(Config.model_validate({"cluster": {"address": "127.0.0.1:1"}}))
    finally:
        start_ray(Config())


def test_a_full_gpu_is_reported_with_the_name_of_the_process(sleeper: Process) -> None:
    with pytest.raises(OutOfMemory, match=r"^learner rank 7 what happened$"):
        wait_for([sleeper.call("work", "fail", "memory")], 30, "update")


def test_a_process_that_asks_for_no_gpu_sees_none(sleeper: Process) -> None:
    assert wait_for([sleeper.call("look", "environment", "CUDA_VISIBLE_DEVICES")], 30, "update") == [""]


def test_learner_ranks_that_may_share_a_gpu_are_refused_before_anything_starts() -> None:
    config = Config.model_validate({"learner": {"gpus_per_rank": 0.5}})
    with pytest.raises(UserError, match=r"learner\.gpus_per_rank=0\.5 .* more than 0\.5, or learner\.ranks=1"):
        start_ray(config)


def test_processors_wanted_add_up_over_all_workers() -> None:
    config = Config.model_validate({"learner": {"ranks": 4, "cpus_per_rank": 2}, "rollout": {"cpus_per_worker": 3}})
    assert cpus_wanted(config) == 4 * 2 + 3 + 0.25
