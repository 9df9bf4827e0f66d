"""Waiting for other processes: every wait has a name and a deadline, and a failure says who failed whom."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from mxdist.errors import DeadlineExceeded, OutOfMemory, ProcessDied, RunStopped, SyncInterrupted, UserError

GRACE_SECONDS = 5.0  # after one process failed, for Ray to learn that another has died
GONE = (RayActorError, ObjectLostError)  # the process, or the node that held what it returned


@dataclass(frozen=True)
class Pending:
    """A call under way in another process."""

    ref: "ray.ObjectRef"
    process: str  # such as "learner rank 1"
    doing: str  # such as "update of step 12"
    started: float  # time.monotonic()


def wait_for(pending: Sequence[Pending], deadline: float, deadline_key: str) -> list[Any]:
    """Return the results in order, or say which process kept the controller waiting.

    Args:
        deadline: seconds from now that all of them together may take.
        deadline_key: the configuration key that sets it, for the message.
    Raises:
        DeadlineExceeded: calls are still running at the deadline; all of them are named.
        ProcessDied: a process died, or its node.
        SyncInterrupted: weights did not reach a process.
        UserError: a process found a mistake of the user's; raised here as it was raised there.
    """
    expiry = time.monotonic() + deadline
    waiting = {call.ref: call for call in pending}
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=max(expiry - time.monotonic(), 0.0))
        if not done:
            raise _late(list(waiting.values()), deadline, deadline_key)
        for ref in done:
            call = waiting[ref]
            first = next(other for other in waiting.values() if other.process == call.process)
            del waiting[ref]
            _raise_if_failed(call, list(waiting.values()), first)
    return _fetch(pending, deadline, deadline_key)


def succeeded(call: Pending) -> bool:
    """Whether the result is here by now, and is no failure."""
    try:
        ray.get(call.ref, timeout=0)
    except (GetTimeoutError, RayError):
        return False
    return True


def _fetch(pending: Sequence[Pending], deadline: float, deadline_key: str) -> list[Any]:
    """The results, which are ready but may lie on another node."""
    results = []
    for call in pending:
        try:
            results.append(ray.get(call.ref, timeout=deadline))
        except GONE as error:
            raise _died(call, error) from error
        except GetTimeoutError:
            raise _late([call], deadline, deadline_key) from None
    return results


def _late(calls: Sequence[Pending], deadline: float, deadline_key: str) -> DeadlineExceeded:
    first, waited = calls[0], time.monotonic() - calls[0].started
    others = f" (nor did {', '.join(call.process for call in calls[1:])})" if len(calls) > 1 else ""
    return DeadlineExceeded(
        f"{first.process} did not finish the {first.doing} within {deadline:g} s{others}, {waited:.0f} s after it was "
        f"asked; raise deadlines.{deadline_key} if it is only slow",
        tuple(dict.fromkeys(call.process for call in calls)),
    )


def _raise_if_failed(call: Pending, others: Sequence[Pending], first: Pending) -> None:
    """``first``: the earliest call that the same process may have been at work on."""
    try:
        ray.get(call.ref, timeout=GRACE_SECONDS)
    except GetTimeoutError:  # a large result on its way from another node
        return
    except RayTaskError as error:
        if isinstance(error.cause, OutOfMemory):
            raise OutOfMemory(f"{call.process} {error.cause}") from None
        if isinstance(error.cause, SyncInterrupted):
            _raise_if_dead(others)
            raise SyncInterrupted(f"{call.process}: {error.cause}", error.cause.generation, (call.process,)) from None
        if isinstance(error.cause, UserError | RunStopped):
            raise error.cause from None
        # A rank whose peer is gone fails in its own collective: say who is gone rather than who noticed.
        _raise_if_dead(others)
        raise
    except GONE as error:
        raise _died(first, error) from error


def _raise_if_dead(calls: Sequence[Pending]) -> None:
    expiry = time.monotonic() + GRACE_SECONDS
    for call in calls:
        try:
            ray.get(call.ref, timeout=max(expiry - time.monotonic(), 0.0))
        except GONE as error:
            raise _died(call, error) from error
        except (RayTaskError, GetTimeoutError):
            continue


def _died(call: Pending, error: Exception) -> ProcessDied:
    said = str(error).strip().splitlines()[0]
    return ProcessDied(f"{call.process} died during the {call.doing}: {said}", (call.process,))
