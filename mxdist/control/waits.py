"""Waiting for other processes: every wait has a name and a deadline, and a failure says who failed whom."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from mxdist.errors import DeadlineExceeded, RunStopped, UserError

GRACE_SECONDS = 5.0  # after one process failed, for Ray to learn that another has died


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
        RunStopped: a process died.
        UserError: a process found a mistake of the user's; raised here as it was raised there.
    """
    expiry = time.monotonic() + deadline
    waiting = {call.ref: call for call in pending}
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=max(expiry - time.monotonic(), 0.0))
        if not done:
            raise _late(list(waiting.values()), deadline, deadline_key)
        for ref in done:
            _raise_if_failed(waiting.pop(ref), list(waiting.values()))
    return ray.get([call.ref for call in pending])


def _late(calls: Sequence[Pending], deadline: float, deadline_key: str) -> DeadlineExceeded:
    first, waited = calls[0], time.monotonic() - calls[0].started
    others = f" (nor did {', '.join(call.process for call in calls[1:])})" if len(calls) > 1 else ""
    return DeadlineExceeded(
        f"{first.process} did not finish the {first.doing} within {deadline:g} s{others}, {waited:.0f} s after it was "
        f"asked; raise deadlines.{deadline_key} if it is only slow"
    )


def _raise_if_failed(call: Pending, others: Sequence[Pending]) -> None:
    try:
        ray.get(call.ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunStopped):
            raise error.cause from None
        # A rank whose peer is gone fails in its own collective: say who is gone rather than who noticed.
        _raise_if_dead(others)
        raise
    except RayActorError as error:
        raise _died(call, error) from error


def _raise_if_dead(calls: Sequence[Pending]) -> None:
    expiry = time.monotonic() + GRACE_SECONDS
    for call in calls:
        try:
            ray.get(call.ref, timeout=max(expiry - time.monotonic(), 0.0))
        except RayActorError as error:
            raise _died(call, error) from error
        except (RayTaskError, GetTimeoutError):
            continue


def _died(call: Pending, error: RayActorError) -> RunStopped:
    return RunStopped(f"{call.process} died during the {call.doing}: {str(error).strip().splitlines()[0]}")
