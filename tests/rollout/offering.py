"""Weights that come while an engine samples, before steps that a test chooses. Executed in the engine's process."""

from collections.abc import Callable

from mxdist.messages import RolloutRequest, RolloutResult, WeightPayload
from mxdist.rollout.arrivals import Arrivals
from mxdist.rollout.worker import RolloutWorker

Offers = list[tuple[int, list[WeightPayload]]]
"""(steps of the engine before it, payloads) of each push."""


class Scripted(Arrivals):
    """``also`` is called before every step, with the number of steps before it."""

    def __init__(self, offers: Offers, also: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self._offers, self._step, self._also = dict(offers), 0, also

    def take(self) -> tuple[int, list[WeightPayload]] | None:
        if self._also:
            self._also(self._step)
        if self._step in self._offers:
            self.offer(len(self._outcomes), self._offers[self._step])
        self._step += 1
        return super().take()


def generate_with_offers(worker: RolloutWorker, request: RolloutRequest, offers: Offers) -> RolloutResult:
    worker._arrivals = Scripted(offers)
    return worker.generate(request)
