"""Real processes: what fails is replaced and brought to where it was, and who is late is shown with its stacks."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray

from mxdist.config import Config
from mxdist.control.groups import RolloutPool
from mxdist.control.processes import Process
from mxdist.control.roster import Roster
from mxdist.control.supervisor import Call, Supervisor, Worker
from mxdist.control.waits import Pending, wait_for
from mxdist.errors import DeadlineExceeded, ProcessDied, ProcessFailure, RollBack, RunStopped
from mxdist.sync.broadcast import Meetings

pytestmark = pytest.mark.usefixtures("local_ray")


class Pool:
    """One replaceable worker, and the notes of what became of it."""

    def __init__(self, folder: Path, restarts: int = 3) -> None:
        self.notes: list[str] = []
        self.roster = Roster(folder)
        config = Config.model_validate({"run": {"restarts": restarts}})
        self.supervisor = Supervisor(config, self.roster, self.notes.append)
        self.worker = Worker(partial(self.roster.start, "rollout worker 0", 0.1, 0))
        self.results([self.worker.construct("tests.control.sleeper:Stateful", ["yes"])])

    def load(self, weights: str) -> Call:
        return self.worker.call(lambda p: p.call_with_list("sync", "load_weights", [ray.put(weights)]), "weights")

    def ask(self, question: str, *arguments: object) -> Call:
        return self.worker.call(lambda p: p.call("rollout", "answer", question, *arguments))

    def results(self, calls: list[Call], deadline: float = 60) -> list[object]:
        return self.supervisor.results(calls, deadline, "rollout")

    def pid(self) -> int:
        [pid] = self.results([self.worker.call(lambda p: p.call("look", "pid"))])
        assert isinstance(pid, int)
        return pid


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(tmp_path)
    yield pool
    for process in pool.roster.named(""):
        pool.roster.dismiss(process)


def test_a_worker_killed_at_work_is_replaced_given_its_weights_and_asked_again(pool: Pool, tmp_path: Path) -> None:
    pool.results([pool.load("v1")])
    calls = [pool.ask("a"), pool.ask("b", str(tmp_path / "died")), pool.load("v2"), pool.ask("c")]
    assert pool.results(calls) == ["yes v1 a", "yes v1 b", ["v2"], "yes v2 c"]
    assert len(pool.notes) == 1
    assert "rollout worker 0 died during the rollout" in pool.notes[0]
    assert "restart 1 of at most 3" in pool.notes[0]


def test_a_worker_that_dies_before_anyone_has_asked_for_its_first_result_is_made_anew(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    worker = Worker(partial(pool.roster.start, "rollout worker 1", 0.1, 0))
    made = worker.construct("tests.control.sleeper:Stateful", ["here"])
    wait_for([made.pending], 60, "start")
    dying = worker.call(lambda p: p.call("rollout", "answer", "a", str(tmp_path / "died")))
    assert pool.results([dying]) == ["here none a"]
    for process in pool.roster.named(""):
        pool.roster.dismiss(process)


def test_weights_stay_with_the_answers_that_were_asked_for_under_them(pool: Pool) -> None:
    pool.results([pool.load("v1")])
    first, newer, second = pool.ask("a"), pool.load("v2"), pool.ask("b")
    pool.results([newer])  # as an evaluation waits for the newest weights while older answers are not fetched yet
    os.kill(pool.pid(), signal.SIGKILL)
    assert pool.results([pool.ask("c")]) == ["yes v2 c"]
    assert pool.results([first, second]) == ["yes v1 a", "yes v2 b"]


@pytest.mark.parametrize("dies", [False, True])
def test_weights_are_taken_in_flight_or_in_their_turn_by_who_takes_the_place_of_one_that_died_of_them(
    pool: Pool, tmp_path: Path, dies: bool
) -> None:
    roster = pool.roster
    worker = Worker(partial(roster.start, "rollout worker 1", 0.1, 0, aside=True))
    engines = RolloutPool([worker], pool.supervisor)
    first = [worker.construct("tests.control.sleeper:Stateful", ["yes"]), *engines.load_weights([ray.put("v1")], 1)]
    engines.wait(first, 60, "start")
    die_in = str(tmp_path / "died") if dies else ""
    sampling = worker.call(lambda process: process.call("rollout", "swap", die_in))
    loads = engines.load_weights_in_flight([ray.put("v2")], 2)
    after = worker.call(lambda process: process.call("rollout", "answer", "a"))
    found = engines.wait([sampling, *loads, after], 60, "rollout")
    assert found == (["v1 to v1", ["v2"], "yes v2 a"] if dies else ["v1 to v2", ["taken", "v2"], "yes v2 a"])
    assert len(pool.notes) == dies


def test_weights_that_newer_ones_follow_at_once_are_not_given_again(pool: Pool) -> None:
    sent = []

    def send(process: Process) -> Pending:
        sent.append("v1")
        return process.call_with_list("sync", "load_weights", [ray.put("v1")])

    pool.results([pool.worker.call(send, "weights")])
    os.kill(pool.pid(), signal.SIGKILL)
    assert pool.results([pool.load("v2"), pool.ask("a")]) == [["v2"], "yes v2 a"]
    assert sent == ["v1"]


def test_an_engine_that_is_stopped_is_reported_ended_and_replaced(pool: Pool, tmp_path: Path) -> None:
    pool.results([pool.load("v1")])
    stopped = pool.pid()
    os.kill(stopped, signal.SIGSTOP)
    assert pool.results([pool.ask("a")], deadline=2) == ["yes v1 a"]
    [report] = (tmp_path / "stacks").glob("report_*.txt")
    assert str(report) in pool.notes[0]
    text = report.read_text()
    assert "=== rollout worker 0 (it is waited for)" in text
    assert f"process {stopped} is stopped" in text
    assert "=== controller" in text
    assert "test_supervisor.py" in text  # the controller's own stack
    assert not Path(f"/proc/{stopped}").exists() or "State:\tZ" in Path(f"/proc/{stopped}/status").read_text()


def test_restarts_are_bounded_until_progress_is_made(tmp_path: Path) -> None:
    pool = Pool(tmp_path, restarts=1)
    for attempt in (1, 2):
        os.kill(pool.pid(), signal.SIGKILL)
        assert pool.results([pool.ask("a")]) == ["yes none a"]
        if attempt == 1:
            pool.supervisor.checkpoint_written()
    os.kill(pool.pid(), signal.SIGKILL)
    with pytest.raises(RunStopped, match=r"rollout worker 0 died .*; run\.restarts=1 is used up") as caught:
        pool.results([pool.ask("a")])
    assert not isinstance(caught.value, ProcessFailure)


def test_roll_backs_count_as_failures_and_are_bounded_like_them(tmp_path: Path) -> None:
    notes: list[str] = []
    config = Config.model_validate({"run": {"restarts": 2}})
    supervisor = Supervisor(config, Roster(tmp_path), notes.append)
    supervisor.take(RollBack("step 3: entropy"))
    supervisor.take(RollBack("step 3: entropy"))
    assert "step 3: entropy; restart 2 of at most 2" in notes[-1]
    with pytest.raises(RunStopped, match=r"^step 3: entropy; run\.restarts=2 is used up") as caught:
        supervisor.take(RollBack("step 3: entropy"))
    assert not isinstance(caught.value, RollBack)


@pytest.mark.parametrize(
    ("dead", "takes_part"), [("reward worker 0", False), ("rollout worker 1", True), ("learner rank 0", True)]
)
def test_a_broadcast_under_way_is_over_only_if_who_died_takes_part_in_it(
    tmp_path: Path, dead: str, takes_part: bool
) -> None:
    supervisor = Supervisor(Config(), Roster(tmp_path), note=lambda _: None)
    supervisor.meetings = Meetings("127.0.0.1", receivers=2, arrival=60, transfer=60)
    under_way = supervisor.meetings.call()
    supervisor.take(ProcessDied(f"{dead} died", (dead,)))
    assert supervisor.meetings.is_open(under_way.generation) == (not takes_part)


def test_the_report_of_a_deadline_holds_the_stacks_of_every_process(tmp_path: Path) -> None:
    roster = Roster(tmp_path)
    processes = [roster.start(name, 0.1, 0) for name in ("learner rank 0", "learner rank 1")]
    wait_for([process.construct("tests.control.sleeper:Sleeper") for process in processes], 60, "start")
    with pytest.raises(DeadlineExceeded) as late:
        wait_for([processes[1].call("update of step 3", "sleep", 600)], 0.5, "update")
    text = roster.report(late.value).read_text()
    assert text.startswith("The controller waited for learner rank 1: learner rank 1 did not finish the update of step")
    idle, waited_for = text.split("=== learner rank 1 (it is waited for)")
    assert "sleeper.py" not in idle
    assert "sleeper.py" in waited_for
    assert "in sleep" in waited_for
    for process in processes:
        roster.dismiss(process)
