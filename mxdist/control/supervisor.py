"""The one place that decides what follows when a process of the run dies or stops answering.

    a rollout or reward worker   replaced; its unfinished calls are made again on the new process
    weights that did not arrive  given to the engine again, and the calls behind them made again
    a learner rank               all ranks replaced, and the loop's state with them, from the newest checkpoint
    a guard that rolls back      the loop and the learner taken back to the newest checkpoint
    more than run.restarts such failures between two checkpoints, or any failure of another kind: the run stops

Before anything that did not answer is ended, the stacks of all processes are written into the run directory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from mxdist.config import Config
from mxdist.control.processes import LEARNER_NAME, ROLLOUT_NAME, Process
from mxdist.control.roster import Roster
from mxdist.control.waits import Pending, succeeded, wait_for
from mxdist.errors import DeadlineExceeded, ProcessFailure, RollBack, RunStopped, SyncInterrupted
from mxdist.sync.broadcast import Meetings


class Worker:
    """A place in a pool: a process that can be replaced, and the calls that make a new one what the old one was."""

    def __init__(self, start: Callable[[], Process]) -> None:
        """``start`` asks for a process; again whenever it has to be replaced."""
        self._start = start
        self._process = start()
        self._calls: list[Call] = []

    @property
    def name(self) -> str:
        return self._process.name

    def construct(self, path: str, *arguments: Any) -> "Call":
        """The first call: make the worker's object; see ``WorkerProcess.construct``."""
        return self.call(lambda process: process.construct(path, *arguments), "object")

    def call(self, send: Callable[[Process], Pending], lasting: str = "") -> "Call":
        """Make a call. Calls of one worker run in the order they were made.

        Args:
            send: makes it on a given process.
            lasting: what state the call sets, such as "weights", if any. A new process is given the state that the
                last finished call of each such name set.
        """
        call = Call(self, send, lasting, send(self._process))
        self._calls.append(call)
        return call

    def aside(self, send: Callable[[Process], None]) -> None:
        """Make a call that is of no use to a process that takes this one's place."""
        send(self._process)

    def replace(self, dismiss: Callable[[Process], None]) -> list["Call"]:
        """Start a new process and make the calls again. Returns those that had finished, under way once more."""
        dismiss(self._process)
        self._process = self._start()
        again = [call for call in self._calls if call.lasting or not succeeded(call.pending)]
        # State that the very next call sets anew is not needed, and what it was set from may be no more.
        again = [
            call
            for call, following in zip_longest(again, again[1:])
            if not (call.finished and following is not None and call.lasting and call.lasting == following.lasting)
        ]
        for call in again:
            call.pending = call.send(self._process)
        return [call for call in again if call.finished]

    def repeat(self) -> None:
        """Make the calls again that have not succeeded, on the same process, which has refused them or will."""
        for call in self._calls:
            if not succeeded(call.pending):
                call.pending = call.send(self._process)

    def forget(self, lasting: str) -> None:
        """A new process is not given such state any more: what it was set from may be no more."""
        self._calls = [call for call in self._calls if call.lasting != lasting]

    def forget_unfinished(self) -> None:
        """Calls under way are of no interest any more. They still run to their end, before any later one."""
        self._calls = [call for call in self._calls if call.finished]

    def has_finished(self, call: "Call") -> None:
        """The call's result is there: it need not be made again, unless its effect is to last."""
        before = self._calls[: self._calls.index(call)]
        for earlier in before:  # they ran before it
            earlier.finished |= bool(earlier.lasting)
        call.finished = True
        if not call.lasting:
            self._calls.remove(call)
            return
        if all(earlier.finished for earlier in before):  # else one of them may need the state it began with
            superseded = [earlier for earlier in before if earlier.lasting == call.lasting]
            self._calls = [kept for kept in self._calls if kept not in superseded]


@dataclass(eq=False)
class Call:
    """One call of a worker; ``pending`` is that of the process that now works on it."""

    worker: Worker
    send: Callable[[Process], Pending]
    lasting: str
    pending: Pending
    finished: bool = False
    result: Any = None  # kept only where the effect lasts


class Supervisor:
    """Counts failures, has what failed replaced, and says so; or stops the run."""

    def __init__(self, config: Config, roster: Roster, note: Callable[[str], None]) -> None:
        self.roster = roster
        self._limit = config.run.restarts
        self._start_deadline = config.deadlines.start
        self._note = note
        self._since_checkpoint = 0
        self.meetings: Meetings | None = None  # at which weights are broadcast

    def checkpoint_written(self) -> None:
        """The run has made progress that lasts: count failures anew."""
        self._since_checkpoint = 0

    def results(self, calls: Sequence[Call], deadline: float, deadline_key: str) -> list[Any]:
        """Results of calls of replaceable workers, in order.

        Raises:
            RunStopped: a worker failed and may not be replaced once more.
            UserError: as ``wait_for``.
        """
        while True:
            try:
                found = wait_for([call.pending for call in calls], deadline, deadline_key)
            except SyncInterrupted as failure:
                self._repeat(failure, {call.worker for call in calls})
                continue
            except ProcessFailure as failure:
                self._replace(failure, {call.worker for call in calls})
                continue
            for call, result in zip(calls, found, strict=True):
                if call.lasting:
                    call.result = result
                call.worker.has_finished(call)
            return found

    def take(self, failure: ProcessFailure | RollBack) -> None:
        """Note a failure that will be recovered from. RunStopped when there have been too many."""
        said = self._said(failure)
        if self._since_checkpoint >= self._limit:
            used_up = f"; run.restarts={self._limit} is used up" if self._limit else ""
            raise RunStopped(f"{said}{used_up}") from failure
        if self.meetings is not None and _takes_part_in_syncs(failure):
            self.meetings.end(said)  # whoever waits for that process there need not
        self._since_checkpoint += 1
        self._note(f"{said}; restart {self._since_checkpoint} of at most {self._limit} until the next checkpoint")

    def stop(self, failure: ProcessFailure) -> RunStopped:
        """What to raise for a failure that nothing recovers from."""
        return RunStopped(self._said(failure))

    def _said(self, failure: RunStopped) -> str:
        if not isinstance(failure, DeadlineExceeded):
            return str(failure)
        return f"{failure}; the stacks of all processes are in {self.roster.report(failure)}"

    def _repeat(self, failure: SyncInterrupted, workers: set[Worker]) -> None:
        """Give weights again. Counted once for all engines, and not where a process failed before."""
        for worker in workers:
            if worker.name in failure.processes:
                worker.repeat()
        if self.meetings is not None and self.meetings.is_open(failure.generation):
            self.take(failure)

    def _replace(self, failure: ProcessFailure, workers: set[Worker]) -> None:
        failed = [worker for worker in workers if worker.name in failure.processes]
        if not failed:
            raise failure
        self.take(failure)
        for worker in failed:
            self._renew(worker)

    def _renew(self, worker: Worker) -> None:
        """Replace a worker and wait until it is where the old one was."""
        while True:
            again = worker.replace(self.roster.dismiss)
            try:
                results = wait_for([call.pending for call in again], self._start_deadline, "start")
            except ProcessFailure as failure:
                self.take(failure)
                continue
            for call, result in zip(again, results, strict=True):
                if call.lasting == "weights" and call.result is not None and call.result != result:
                    raise RunStopped(f"{worker.name} was given the weights again and holds other bytes than before")
            return


def _takes_part_in_syncs(failure: ProcessFailure | RollBack) -> bool:
    """Whether one of those that failed may be waited for at a meeting; a reward worker never is."""
    return isinstance(failure, ProcessFailure) and any(
        name.startswith((LEARNER_NAME, ROLLOUT_NAME)) for name in failure.processes
    )
