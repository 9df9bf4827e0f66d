"""Buckets that learner ranks broadcast to all processes of all engines at once: NCCL between GPUs, gloo between CPUs.

    meeting     one version's broadcast. Nothing is sent before every receiver has come to it, so that no GPU is held by
                a collective that waits for somebody; then each rank in turn sends its buckets, in manifest order.
    generation  the process groups that consecutive meetings share: for each sending rank one, of itself and all
                receivers. As soon as anyone fails it is over for all of them, within their deadlines, and the
                controller begins another, with whatever processes there are then.

They find each other in a store that the controller holds. torch's own default group is left alone.
"""

import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from mxdist.errors import SyncInterrupted
from mxdist.messages import BroadcastBuckets, Manifest, Meeting

LOOK_SECONDS = 0.5  # how soon a process sees that a generation is over
POLL_SECONDS = 0.0002
WATCHDOG = timedelta(hours=1)  # NCCL's own, which would end the process: far behind the deadlines here


class Meetings:
    """The controller's side: it calls meetings, and ends generations.

    Args:
        host: address of this process that all others can reach.
        receivers: processes of all engines together.
        arrival, transfer: see ``Meeting``.
    """

    def __init__(self, host: str, receivers: int, arrival: float, transfer: float) -> None:
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listener.getsockname()[1]
        self._store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        self._address, self._receivers, self._arrival, self._transfer = f"{host}:{port}", receivers, arrival, transfer
        self._generation = self._number = 0

    def call(self) -> Meeting:
        """The next meeting."""
        self._number += 1
        return Meeting(self._address, self._generation, self._number, self._receivers, self._arrival, self._transfer)

    def is_open(self, generation: int) -> bool:
        return generation == self._generation

    def end(self, why: str) -> None:
        """Meetings under way are over; those called from now on are of a new generation."""
        self._store.set(_over(self._generation), why)
        self._generation += 1


class Sender:
    """The sending side of one learner rank. A thread of its own sends, so that the rank goes on meanwhile."""

    def __init__(self, device: torch.device, owner: str) -> None:
        self._device, self._owner = device, owner
        self._generation: object = None
        self._queue: queue.SimpleQueue[tuple[Meeting, Sequence[Tensor]] | None] = queue.SimpleQueue()

    def send(self, meeting: Meeting, buckets: Sequence[Tensor]) -> None:
        """Send buckets, uint8 each, that are filled and stay as they are until all have them."""
        if _generation(meeting) != self._generation:
            self._queue.put(None)
            self._generation, self._queue = _generation(meeting), queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(self._queue,), name="broadcasts", daemon=True).start()
        self._queue.put((meeting, buckets))

    def _serve(self, jobs: "queue.SimpleQueue[tuple[Meeting, Sequence[Tensor]] | None]") -> None:
        """Send what comes, until the generation is over; receivers say why it is."""
        stream = None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            stream = torch.cuda.Stream(self._device)  # else a broadcast would wait for what the rank computes by then
        party = None
        while (job := jobs.get()) is not None:
            meeting, buckets = job
            try:
                party = party or _Party(meeting, self._device, 0)
                with party.taking_part(), torch.cuda.stream(stream):
                    party.wait_for_all(meeting)
                    group = party.group(self._owner, meeting)
                    party.finish(_broadcast(group, buckets), meeting)
            except SyncInterrupted:
                return
        if party is not None:
            party.leave()


class Receiver:
    """The receiving side of one process of an engine.

    Args:
        device: where buckets are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._party: _Party | None = None

    def meet(self, meeting: Meeting) -> None:
        """Come to a meeting, and wait until all have.

        Raises:
            SyncInterrupted: it is over before, or this process is one too many.
        """
        if self._party is None or self._party.of != _generation(meeting):
            if self._party is not None:
                self._party.leave()
            self._party = _Party(meeting, self._device)
        with self._party.taking_part():
            self._party.come(meeting)
            self._party.wait_for_all(meeting)

    def buckets(self, source: BroadcastBuckets, manifest: Manifest) -> "Incoming":
        """What one rank sends at the meeting come to. Ranks are to be read in the same order by all receivers."""
        assert self._party is not None
        return Incoming(self._party, source, manifest, self._device)


class Incoming:
    """Buckets of one rank on their way to this process: all that follow one are received while it is worked on."""

    def __init__(self, party: "_Party", source: BroadcastBuckets, manifest: Manifest, device: torch.device) -> None:
        self._party, self._source, self._manifest, self._device = party, source, manifest, device
        self._tensors: list[Tensor] = []
        self._works: list[Any] = []

    def __getitem__(self, index: int) -> Tensor:
        """uint8 [bytes], all of it there. Read them in order.

        Raises:
            SyncInterrupted: it has not come whole within the deadline, or the generation is over.
        """
        if not self._tensors:
            sizes = [bucket.nbytes for bucket in self._manifest.buckets]
            self._tensors = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
            with self._party.taking_part(self._tensors):
                group = self._party.group(self._source.owner, self._source.meeting)
                self._works = _broadcast(group, self._tensors)
        if self._works[index] is not None:
            with self._party.taking_part(self._tensors):
                self._party.finish(self._works[index : index + 1], self._source.meeting)
            self._works[index] = None
        return self._tensors[index]


class _Party:
    """One process's part in one generation: the sender's (``number`` 0), or a receiver's, who is given a number."""

    def __init__(self, meeting: Meeting, device: torch.device, number: int | None = None) -> None:
        self.of, self.generation = _generation(meeting), meeting.generation
        self._device = device
        host, _, port = meeting.address.rpartition(":")
        patience = timedelta(seconds=meeting.transfer)
        try:
            self._store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=patience)
            self._number = self._store.add(f"{self.generation}/receivers", 1) if number is None else number
        except RuntimeError as error:
            raise SyncInterrupted(f"the controller's store at {meeting.address}: {_first_line(error)}") from error
        self._groups: dict[str, Any] = {}

    def come(self, meeting: Meeting) -> None:
        self._look()
        if self._number > meeting.receivers:
            raise _Failed(f"one process too many came to a broadcast for {meeting.receivers}")
        if self._store.add(f"meeting {meeting.number}", 1) == meeting.receivers:
            self._store.set(_complete(meeting), "")

    def wait_for_all(self, meeting: Meeting) -> None:
        """Until every receiver has come."""
        started = time.monotonic()
        while not self._store.check([_complete(meeting)]):  # not its wait, which writes warnings
            self._look()
            waited = time.monotonic() - started
            time.sleep(min(0.001 + waited / 10, LOOK_SECONDS))
            if waited > meeting.arrival:
                came = self._store.add(f"meeting {meeting.number}", 0)
                raise _Failed(
                    f"{came} of {meeting.receivers} engine processes came to the broadcast within "
                    f"{meeting.arrival:g} s; raise deadlines.sync if they are only slow"
                )

    def group(self, owner: str, meeting: Meeting) -> Any:
        """Of one sending rank and all receivers, made when it is first needed; all of them are at this point."""
        if owner not in self._groups:
            store = PrefixStore(f"{self.generation}/{owner}", self._store)
            size = meeting.receivers + 1
            self._groups[owner] = _new_group(store, self._number, size, self._device, meeting.transfer)
        return self._groups[owner]

    def finish(self, works: Sequence[Any], meeting: Meeting) -> None:
        """Until the collectives of buckets are done, one after another. Each has the deadline to itself, which begins
        when the one before is done; a sender's first waits until the receivers come to it as well.
        """
        looked = time.monotonic()
        for work in works:
            started = time.monotonic()
            while not work.is_completed():
                now = time.monotonic()
                if now - started > meeting.transfer:
                    raise _Failed(
                        f"a bucket took longer than {meeting.transfer:g} s; raise deadlines.sync if the network is slow"
                    )
                if now - looked > LOOK_SECONDS:
                    self._look()
                    looked = now
                time.sleep(POLL_SECONDS)
            work.wait()  # raises what went wrong; on a GPU the present stream then waits for it

    @contextmanager
    def taking_part(self, received: Sequence[Tensor] = ()) -> Iterator[None]:
        """Around everything that the others wait for.

        Args:
            received: what collectives that are cut short may still write to.
        Raises:
            SyncInterrupted: instead of an error of torch's; after any error the generation is over for all.
        """
        try:
            yield
        except Exception as error:
            why = _first_line(error)
            with suppress(RuntimeError):  # the store may be gone with the controller
                if not self._store.check([_over(self.generation)]):
                    self._store.set(_over(self.generation), why)
                why = self._store.get(_over(self.generation)).decode()
            self.leave(received)
            if not isinstance(error, RuntimeError | _Failed):
                raise
            raise SyncInterrupted(f"a broadcast of weights was broken off: {why}", self.generation) from error

    def leave(self, received: Sequence[Tensor] = ()) -> None:
        """Give the groups up. What is under way in them may take until its own deadline to end."""
        groups, self._groups = list(self._groups.values()), {}
        threading.Thread(target=_close, args=(groups, self._store, received), daemon=True).start()

    def _look(self) -> None:
        if self._store.check([_over(self.generation)]):
            raise _Failed("")  # why it is over stands in the store


class _Failed(Exception):
    """Something that ends a generation."""


def _new_group(store: PrefixStore, rank: int, size: int, device: torch.device, transfer: float) -> Any:
    """A process group that torch.distributed does not know of."""
    if device.type == "cpu":
        return ProcessGroupGloo(store, rank, size, timedelta(seconds=transfer))
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = WATCHDOG
    return ProcessGroupNCCL(store, rank, size, options)


def _broadcast(group: Any, buckets: Sequence[Tensor]) -> list[Any]:
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    options.asyncOp = True
    return [group.broadcast([bucket], options) for bucket in buckets]


def _close(groups: list[Any], store: TCPStore, received: Sequence[Tensor]) -> None:
    """``received`` and ``store`` are held until nothing can use them any more."""
    for group in groups:
        if group.name() == "nccl":
            group.abort()
    groups.clear()  # gloo's waits for its threads
    del store, received


def _generation(meeting: Meeting) -> tuple[str, int]:
    """Which it is of all that a process may ever see."""
    return meeting.address, meeting.generation


def _over(generation: int) -> str:
    return f"{generation}/over"


def _complete(meeting: Meeting) -> str:
    return f"meeting {meeting.number} complete"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
