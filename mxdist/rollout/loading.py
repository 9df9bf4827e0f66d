"""Loading whole sets of weights into slots: everything is checked, then everything is written, then what lies there is
summed for the parity gate. No vLLM here. This file writes the live weights.

What a manifest says is checked, and turned into operations on whole buckets, when it first comes; later ones are the
same. What a payload brings is checked every time. No step waits for the GPU more than once.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxdist.errors import ParityError
from mxdist.messages import (
    BroadcastBuckets,
    BucketKind,
    ChangedBlocks,
    Manifest,
    SharedBuckets,
    TensorPlace,
    WeightPayload,
)
from mxdist.model.recipes import ModelRecipes
from mxdist.quant.checksum import Spans, checksums
from mxdist.rollout.live_weight import LiveWeight
from mxdist.rollout.slot import Slot
from mxdist.sync.broadcast import Incoming, Receiver
from mxdist.sync.changes import KeptBuckets
from mxdist.sync.checks import DTYPES, all_finite, bucket_sums, summable, sums_of_bucket, typed, unit_of
from mxdist.sync.layout import VALUES
from mxdist.sync.payload import PartSums, as_tensor, refuse_repeats
from mxdist.sync.shared import Mappings


@dataclass(frozen=True)
class _Part:
    """A part of a tensor as it lies in a bucket. In elements of the bucket."""

    slot: Slot
    part: str
    start: int
    shape: tuple[int, ...]  # of the whole part
    dtype: torch.dtype  # as it was sent

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether its elements go to the live matrix as they are."""
        return self.slot.division.count == 1 and self.slot.matrix(self.part).dtype == self.dtype

    @property
    def may_not_fit(self) -> bool:
        """Whether the live matrix holds fewer numbers than were sent."""
        return self.dtype.itemsize > self.slot.matrix(self.part).element_size()

    def of(self, elements: Tensor) -> Tensor:
        """The part, out of the elements of its bucket."""
        return elements[self.start : self.start + self.count].view(self.shape)

    def fits(self, elements: Tensor) -> Tensor:
        sent = self.of(elements)
        return (sent.to(self.slot.matrix(self.part).dtype).to(self.dtype) == sent).all()


@dataclass
class _Copy:
    """Consecutive elements of a bucket that are consecutive elements of a live matrix."""

    slot: Slot  # any of the matrix
    part: str
    source: int
    target: int
    count: int


@dataclass(frozen=True)
class _BucketPlan:
    kind: BucketKind
    parts: list[_Part]
    copies: list[_Copy]
    cuts: list[_Part]  # that are divided or change their dtype, and so are copied alone


@dataclass(frozen=True)
class _LiveSums:
    """Checksums of rows of one live matrix, and their places in those of all payloads, one after the other."""

    slot: Slot  # any of the matrix
    part: str
    spans: Spans
    positions: np.ndarray  # int64


@dataclass
class _Plan:
    """What is done with payloads of certain manifests."""

    manifests: tuple[Manifest, ...]
    values: frozenset[int]  # packed weights that have live values beside their bytes, by ``id``
    buckets: list[list[_BucketPlan]] = field(default_factory=list)  # by payload
    live: list[_LiveSums] = field(default_factory=list)
    one_by_one: list[tuple[Slot, str, int]] = field(default_factory=list)  # sums: slot, part, position


@dataclass(frozen=True)
class Arrived:
    """A whole set of weights that has passed every check."""

    payloads: Sequence[WeightPayload]
    plan: _Plan
    buckets: "_Buckets"
    seconds: float  # that the checks took


class WeightLoader:
    """Loads the slots of one engine process.

    Args:
        device: of the live weights.
    """

    def __init__(self, slots: dict[str, Slot], recipes: ModelRecipes, device: torch.device) -> None:
        self._slots, self._recipes, self._device = slots, recipes.to_dict(), device
        owners = {id(slot.owner): slot.owner for slot in slots.values()}.values()
        self._weights = [owner for owner in owners if isinstance(owner, LiveWeight)]
        self._plan: _Plan | None = None
        self._mappings = Mappings(device.index or 0) if device.type == "cuda" else None
        self._receiver = Receiver(device)
        self._kept = KeptBuckets()

    def checked(self, payloads: Sequence[WeightPayload]) -> Arrived:
        """Hold a whole set of weights against the slots and against its own checksums. Nothing is written.

        Raises:
            ParityError: naming the first thing wrong (another recipe or version on one rank; a tensor that is missing,
                unknown or sent twice; wrong kind, shape, parts or dtype; a NaN or Inf; bytes that changed on their
                way).
            ProcessDied, RunStopped: see ``Mappings.open``.
            SyncInterrupted: see ``Receiver`` and ``KeptBuckets``.
        """
        started = time.perf_counter()
        _check_headers(payloads, self._recipes)
        manifests = tuple(payload.manifest for payload in payloads)
        values = frozenset(id(weight) for weight in self._weights if weight.operand and weight.values is not None)
        if self._plan is None or (self._plan.manifests, self._plan.values) != (manifests, values):
            self._plan = None  # it is large
            self._plan = _make_plan(manifests, values, self._slots)
        payloads = self._kept.whole(payloads)
        buckets = _Buckets(payloads, self._device, self._mappings, self._receiver)
        _check_bytes(payloads, self._plan, buckets)
        return Arrived(payloads, self._plan, buckets, time.perf_counter() - started)

    def take(self, arrived: Arrived) -> PartSums:
        """Write the weights and sum what then lies in the live matrices; ``seconds`` says what took how long."""
        started = self._wait()
        self.write(arrived)
        written = self._wait()
        sums = self.checksums(arrived)
        if self._mappings is not None:
            self._mappings.keep(p.buckets for p in arrived.payloads if isinstance(p.buckets, SharedBuckets))
        sums.seconds |= {
            "check": arrived.seconds,
            "copy": written - started,
            "parity": time.perf_counter() - written,
        }
        return sums

    def cannot_map(self, probes: Sequence[SharedBuckets]) -> str | None:
        """Why what learner ranks share of their GPUs cannot be read here; None when it can."""
        return "the engine has no GPU" if self._mappings is None else self._mappings.cannot_open(probes)

    def release(self) -> None:
        """Let go of the learner's memory; it is mapped again when weights come from there."""
        if self._mappings is not None:
            self._mappings.keep(())

    def write(self, arrived: Arrived) -> None:
        """Copy a whole set of weights into the live matrices."""
        for payload, plans in enumerate(arrived.plan.buckets):
            for number, plan in enumerate(plans):
                elements = typed(plan.kind, arrived.buckets.raw(payload, number))
                for copy in plan.copies:
                    matrix = copy.slot.matrix(copy.part).view(-1)
                    source = elements[copy.source : copy.source + copy.count]
                    matrix[copy.target : copy.target + copy.count].copy_(source)
                for part in plan.cuts:
                    live = part.slot.matrix(part.part)[part.slot.rows]
                    live.copy_(part.of(elements)[part.slot.division.region(tuple(live.shape))])
        for weight in self._weights:
            weight.refresh()

    def checksums(self, arrived: Arrived) -> PartSums:
        """Of the live weights, those that the payloads have; of divided tensors the share of this process."""
        plan = arrived.plan
        counts = [len(live.positions) for live in plan.live]
        device = torch.zeros(sum(counts), dtype=torch.int64, device=self._device)
        for live, out in zip(plan.live, device.split(counts), strict=True):
            checksums(summable(live.part, live.slot.matrix(live.part).view(-1)), live.spans, out)
        lengths = [len(manifest.checked) for manifest in plan.manifests]
        found = np.zeros(sum(lengths), dtype=np.uint64)
        if plan.live:
            found[np.concatenate([live.positions for live in plan.live])] = device.cpu().numpy().view(np.uint64)
        for slot, part, position in plan.one_by_one:
            found[position] = slot.checksum(part)
        return PartSums(plan.manifests, np.split(found, np.cumsum(lengths)[:-1]))

    def _wait(self) -> float:
        """Until the device has done what was asked of it; the time then."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Buckets:
    """The buckets of payloads on the engine's device: brought there one at a time, mapped, or received and kept."""

    def __init__(
        self, payloads: Sequence[WeightPayload], device: torch.device, mappings: Mappings | None, receiver: Receiver
    ) -> None:
        self._device = device
        self._held: list[list[Tensor] | tuple[np.ndarray, ...] | Incoming] = []
        meetings = {payload.buckets.meeting for payload in payloads if isinstance(payload.buckets, BroadcastBuckets)}
        for meeting in meetings:
            receiver.meet(meeting)
        for payload in payloads:
            buckets = payload.buckets
            assert not isinstance(buckets, ChangedBlocks)
            if isinstance(buckets, BroadcastBuckets):
                self._held.append(receiver.buckets(buckets, payload.manifest))
            elif not isinstance(buckets, SharedBuckets):
                self._held.append(buckets)
            elif mappings is None:
                raise ParityError(
                    f"the weights stayed on the GPU of {buckets.owner}, and this engine has none; set "
                    f"sync.transport=host"
                )
            else:
                self._held.append(mappings.open(buckets, payload.version))

    def raw(self, payload: int, bucket: int) -> Tensor:
        """uint8 [bytes]."""
        held: Any = self._held[payload][bucket]
        return held if isinstance(held, Tensor) else as_tensor(held).to(self._device)


def _check_headers(payloads: Sequence[WeightPayload], ours: dict[str, Any]) -> None:
    if not payloads:
        raise ParityError("a weight sync came without payloads")
    for rank, payload in enumerate(payloads):
        if payload.recipes != ours:
            raise ParityError(
                f"payload {rank} is of {_in_words(payload.recipes)}, the engine is of {_in_words(ours)}, or the two "
                f"differ in what a recipe means"
            )
        if payload.version != payloads[0].version:
            raise ParityError(f"payload {rank} has version {payload.version}, payload 0 has {payloads[0].version}")


def _in_words(recipes: dict[str, Any]) -> str:
    policy = recipes["policy"]
    exceptions = [f"{recipe} for {modules}" for modules, recipe in policy["overrides"]]
    exceptions += [f"bf16 for the {end} {policy[end]} layers" for end in ("first", "last") if policy[end]]
    return f"recipe {policy['default']}" + (f" ({', '.join(exceptions)})" if exceptions else "")


# What manifests say ----------------------------------------------------------------------------------------------


def _make_plan(manifests: tuple[Manifest, ...], values: frozenset[int], slots: dict[str, Slot]) -> _Plan:
    refuse_repeats(manifests)
    sent = {tensor.name for manifest in manifests for tensor in manifest.tensors}
    if extra := sorted(sent - slots.keys()):
        raise ParityError(f"the learner sent {extra[0]}, which the model does not have ({len(extra)} such tensors)")
    if missing := sorted(slots.keys() - sent):
        raise ParityError(f"the learner did not send {missing[0]} ({len(missing)} such tensors)")
    plan = _Plan(manifests, values)
    live: dict[tuple[int, str, str], list[tuple[int, ...]]] = {}
    any_slot: dict[tuple[int, str, str], Slot] = {}
    position = 0  # among the checksums of all payloads
    for manifest in manifests:
        parts: list[list[_Part]] = [[] for _ in manifest.buckets]
        for tensor in manifest.tensors:
            slot = slots[tensor.name]
            _check_place(slot, tensor, manifest)
            for part, place in tensor.parts.items():
                dtype = DTYPES[manifest.buckets[place.bucket].kind]
                parts[place.bucket].append(_Part(slot, part, place.offset // dtype.itemsize, place.shape, dtype))
            for part in tensor.checked:
                if part == VALUES and slot.kind == "mx" and id(slot.owner) not in values:
                    plan.one_by_one.append((slot, part, position))
                else:
                    key = (id(slot.owner), slot.attribute, part)
                    any_slot.setdefault(key, slot)
                    live.setdefault(key, []).append((*_live_range(slot, part), position))
                position += 1
        plan.buckets.append(
            [
                _BucketPlan(
                    bucket.kind, of_bucket, _merged(of_bucket), [part for part in of_bucket if not part.is_plain]
                )
                for bucket, of_bucket in zip(manifest.buckets, parts, strict=True)
            ]
        )
    plan.live.extend(_live_sums(any_slot[key], key[2], np.array(rows, dtype=np.int64)) for key, rows in live.items())
    return plan


def _check_place(slot: Slot, tensor: TensorPlace, manifest: Manifest) -> None:
    """Raise ParityError unless the manifest describes what the slot holds."""
    name = tensor.name
    if tensor.kind != slot.kind:
        raise ParityError(f"{name} was sent as {tensor.kind}; the engine holds it as {slot.kind}")
    if tuple(tensor.shape) != slot.shape:
        raise ParityError(f"{name} was sent with shape {tuple(tensor.shape)}; the engine's is {slot.shape}")
    if tensor.parts.keys() != set(slot.part_names):
        raise ParityError(
            f"{name} was sent with the parts {sorted(tensor.parts)}; the engine's are {sorted(slot.part_names)}"
        )
    for part, live in slot.parts().items():
        place = tensor.parts[part]
        bucket = manifest.buckets[place.bucket]
        sent, shape = DTYPES[bucket.kind], slot.division.whole(tuple(live.shape))
        if tuple(place.shape) != shape or sent.is_floating_point != live.is_floating_point():
            raise ParityError(
                f"{name}, part {part}, was sent as {sent} {tuple(place.shape)}; the engine's is {live.dtype} {shape}"
            )
        if part not in tensor.checked:
            raise ParityError(f"{name}, part {part}, was sent without a checksum")
        if place.offset < 0 or place.offset + prod(shape) * sent.itemsize > bucket.nbytes:
            raise ParityError(f"{name}, part {part}, lies outside bucket {place.bucket} of {bucket.nbytes} bytes")


def _merged(parts: Sequence[_Part]) -> list[_Copy]:
    """As few copies as bring the plain ones of these parts, which are in the order of their bucket, to their places."""
    copies: list[_Copy] = []
    for part in parts:
        if not part.is_plain:
            continue
        target = part.slot.rows.start * prod(part.slot.matrix(part.part).shape[1:])
        last = copies[-1] if copies else None
        if (
            last is not None
            and (last.slot.owner, last.slot.attribute, last.part) == (part.slot.owner, part.slot.attribute, part.part)
            and (last.source + last.count, last.target + last.count) == (part.start, target)
        ):
            last.count += part.count
        else:
            copies.append(_Copy(part.slot, part.part, part.start, target, part.count))
    return copies


def _row_width(slot: Slot, part: str) -> int:
    """Elements in a row of the live matrix, as ``summable`` makes them of it."""
    matrix = slot.matrix(part)
    return prod(matrix.shape[1:]) // (unit_of(part) if matrix.dtype == torch.uint8 else 1)


def _live_range(slot: Slot, part: str) -> tuple[int, int, int]:
    """Of what is summed: start and number of elements in the live matrix, place of the first in the whole tensor."""
    width, division = _row_width(slot, part), slot.division
    count = (slot.rows.stop - slot.rows.start) * width
    return slot.rows.start * width, count, division.index * (count if division.dimension == 0 else width)


def _live_sums(slot: Slot, part: str, table: np.ndarray) -> _LiveSums:
    """``table``: start, number, place and position of each checksum of one live matrix."""
    width = _row_width(slot, part) if slot.division.dimension and slot.division.count > 1 else 0
    spans = Spans(table[:, 0], table[:, 1], table[:, 2], width, width * slot.division.count)
    return _LiveSums(slot, part, spans, table[:, 3])


# What payloads bring ---------------------------------------------------------------------------------------------


def _check_bytes(payloads: Sequence[WeightPayload], plan: _Plan, buckets: "_Buckets") -> None:
    """Raise ParityError for a NaN or Inf, a number that the engine cannot hold, or bytes that are not the learner's."""
    flags: list[Tensor] = []
    about: list[tuple[int, int, _Part | None]] = []
    sums: list[Tensor] = []
    for number, payload in enumerate(payloads):
        if len(payload.checksums) != len(payload.manifest.checked):
            raise ParityError(f"payload {number} has {len(payload.checksums)} checksums, not those of its manifest")
        wanted = bucket_sums(payload.manifest)
        for index, planned in enumerate(plan.buckets[number]):
            raw = buckets.raw(number, index)
            if raw.numel() != payload.manifest.buckets[index].nbytes:
                raise ParityError(
                    f"bucket {index} of payload {number} came with {raw.numel()} of its "
                    f"{payload.manifest.buckets[index].nbytes} bytes"
                )
            elements = typed(planned.kind, raw)
            if (finite := all_finite(planned.kind, elements)) is not None:
                flags.append(finite)
                about.append((number, index, None))
            for part in planned.cuts:
                if part.may_not_fit:
                    flags.append(part.fits(elements))
                    about.append((number, index, part))
            sums.append(sums_of_bucket(planned.kind, raw, wanted[index]))
    good = torch.stack(flags).tolist() if flags else []
    for fine, (number, index, unfit) in zip(good, about, strict=True):
        if not fine:
            planned = plan.buckets[number][index]
            raise _unfit(planned, unfit, typed(planned.kind, buckets.raw(number, index)))
    arrived = torch.cat(sums).cpu().numpy().view(np.uint64)
    start = 0
    for payload in payloads:
        for wanted_here in bucket_sums(payload.manifest):
            stop = start + len(wanted_here.positions)
            differing = np.flatnonzero(arrived[start:stop] != payload.checksums[wanted_here.positions])
            if len(differing):
                name, part_name = payload.manifest.checked[wanted_here.positions[differing[0]]]
                raise ParityError(f"{name}, part {part_name}, changed on its way: its checksum is not the learner's")
            start = stop


def _unfit(planned: _BucketPlan, part: _Part | None, elements: Tensor) -> ParityError:
    """What to say of a bucket that is not finite, or of a part that the engine cannot hold."""
    if part is not None:
        live = part.slot.matrix(part.part).dtype
        return ParityError(
            f"{part.slot.name}, part {part.part}, was sent as {part.dtype} with values that the engine's {live} cannot "
            f"hold"
        )
    for one in planned.parts:
        finite = all_finite(planned.kind, one.of(elements))
        if finite is not None and not finite:
            return ParityError(f"{one.slot.name}, part {one.part}, holds a NaN or Inf")
    return ParityError("a bucket holds a NaN or Inf between its parts")
