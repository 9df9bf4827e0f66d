"""Weights that reach an engine while it samples. Neither torch nor vLLM here."""

from collections import deque
from threading import Lock
from typing import TYPE_CHECKING

from mxdist.messages import WeightPayload

if TYPE_CHECKING:
    from mxdist.sync.payload import PartSums


class Arrivals:
    """Handed in by one thread, taken by the engine's own between two of its steps.

    Every push to an engine has a ticket, a number above those of earlier pushes. It is offered here at once, and it
    is closed when all that was asked of the engine before it is done: so nothing of an earlier push stays behind.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: deque[tuple[int, list[WeightPayload]]] = deque()
        self._closed = -1
        self._outcomes: dict[int, PartSums | Exception] = {}

    def offer(self, ticket: int, payloads: list[WeightPayload]) -> None:
        """From any thread. Nothing happens when it comes after ``close``."""
        with self._lock:
            if ticket > self._closed:
                self._waiting.append((ticket, payloads))

    def take(self) -> tuple[int, list[WeightPayload]] | None:
        """The oldest that waits, if any. Its ``settle`` is to follow."""
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def settle(self, ticket: int, outcome: "PartSums | Exception") -> None:
        """What came of one that was taken."""
        self._outcomes[ticket] = outcome

    def close(self, ticket: int) -> "PartSums | Exception | None":
        """What came of a push; None when it was not taken, and it will not be any more.

        Who gets None loads it now, perhaps over weights of a later push (a process that replaced another was offered
        that one alone): what came of later ones is then forgotten, so that they are loaded again in their turn.
        """
        with self._lock:
            self._closed = ticket
            self._waiting = deque(waiting for waiting in self._waiting if waiting[0] > ticket)
        found = self._outcomes.pop(ticket, None)
        if found is None:
            self._outcomes.clear()
        return found
