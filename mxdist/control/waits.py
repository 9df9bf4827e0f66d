"""Waiting for other processes: every wait has a name and a deadline, and a failure says who failed whom."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from mxdist.errors import DeadlineExceeded, RunStopped, UserError


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
        DeadlineExceeded: a call is still running at the deadline.
        RunStopped: a process died.
        UserError: a process found a mistake of the user's; raised here as it was raised there.
    """
    expiry = time.monotonic() + deadline
    return [_result(call, max(expiry - time.monotonic(), 0.0), deadline, deadline_key) for call in pending]


def _result(call: Pending, timeout: float, deadline: float, deadline_key: str) -> Any:
    try:
        return ray.get(call.ref, timeout=timeout)
    except GetTimeoutError:
        waited = time.monotonic() - call.started
        raise DeadlineExceeded(
            f"{call.process} did not finish the {call.doing} within {deadline:g} s (running for {waited:.0f} s); "
            f"raise deadlines.{deadline_key} if it is only slow, and see log.txt in the run directory if it is stuck"
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunStopped):
            raise error.cause from None
        raise
    except RayActorError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunStopped(f"{call.process} died during the {call.doing}: {reason}") from error
