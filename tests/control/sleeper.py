"""A worker that does what a test asks for. Imported by Ray's workers, so it stands in a file of its own."""

import os
import signal
import time

from mxdist.errors import OutOfMemory, ParityError, UserError
from mxdist.rollout.arrivals import Arrivals


class Sleeper:
    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def fail(self, kind: str) -> None:
        errors = {"user": UserError, "parity": ParityError, "memory": OutOfMemory, "bug": ZeroDivisionError}
        raise errors[kind]("what happened")

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def add(self, items: list[int]) -> int:
        return sum(items)

    def hear(self, word: str, items: list[int]) -> None:
        self.heard = (word, items)

    def listen(self, seconds: float) -> tuple[str, list[int]] | None:
        """What it hears meanwhile."""
        time.sleep(seconds)
        return getattr(self, "heard", None)


class Stateful:
    """Answers with the weights it was given and what it is asked."""

    def __init__(self, answers: list[str]) -> None:
        self.answers, self.weights, self.arrivals = answers, "none", Arrivals()

    def load_weights(self, weights: list[str]) -> list[str]:
        [self.weights] = weights
        return weights

    def offer_weights(self, ticket: int, weights: list[str]) -> None:
        self.arrivals.offer(ticket, weights)

    def load_offered(self, ticket: int, weights: list[str]) -> list[str]:
        taken = self.arrivals.close(ticket)
        return self.load_weights(weights) if taken is None else ["taken", *weights]

    def swap(self, die_in: str = "") -> str:
        """Wait for weights to come meanwhile, and take them; then die, unless it has once."""
        before = self.weights
        while not (die_in and os.path.exists(die_in)) and (offered := self.arrivals.take()) is None:
            time.sleep(0.01)
        if not (die_in and os.path.exists(die_in)):
            self.load_weights(offered[1])
            self.arrivals.settle(offered[0], self.weights)
            self.answer("", die_in)
        return f"{before} to {self.weights}"

    def answer(self, question: str, die_in: str = "") -> str:
        if die_in and not os.path.exists(die_in):
            open(die_in, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{self.answers[0]} {self.weights} {question}"

    def pid(self) -> int:
        return os.getpid()
