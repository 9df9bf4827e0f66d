"""The weights that one rank contributes to a new policy version: packed MXFP4 where quantised, plain elsewhere.

Buckets are filled on the device in few operations: what is sent from where is worked out once, and what lies in a row
on both sides is copied together. Tensors that ranks divide are gathered one by one.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mxdist.messages import Manifest, TensorPlace, Transport, WeightPayload
from mxdist.model.hf_tensors import HfTensor
from mxdist.model.quantised_weight import QuantisedWeight
from mxdist.model.recipes import ModelRecipes
from mxdist.quant.tensor import part_shapes
from mxdist.sync.checks import DTYPES
from mxdist.sync.layout import VALUES, Outline, arrange, bytes_kind, in_matrix_order
from mxdist.sync.outgoing import Copies, Outgoing
from mxdist.sync.payload import part_checksum

Base = TypeVar("Base", QuantisedWeight, nn.Parameter)


@dataclass(frozen=True)
class _Plan:
    """What this rank sends, and from where."""

    manifest: Manifest
    places: dict[str, TensorPlace]
    first_sums: dict[str, int]  # by tensor, the place of its first checksum
    packed: "_From[QuantisedWeight]"
    plain: "_From[nn.Parameter]"


@dataclass(frozen=True)
class _From(Generic[Base]):
    """What this rank holds whole of one kind, and the copies of its rows into buckets."""

    bases: list[Base]
    sources: list[tuple[int, str]]  # parts of the bases
    copies: Copies  # from these


class Exporter:
    """Makes the payloads of one rank.

    Args:
        owned: the tensors that this rank sends, or helps to put together; the same ones every time. Collective where
            ranks divide what each computes with.
        held: all that this rank has a part of. By these every rank decides alike whether ``owned`` is walked: one that
            sends nothing divided itself helps the others.
        tensor_parallel: the ranks that divide matrices, of which the first sends them whole.
        outgoing: holds the buckets.
    """

    def __init__(
        self,
        owned: Callable[[], Iterable[HfTensor]],
        held: Sequence[HfTensor],
        tensor_parallel: ProcessGroup | None,
        outgoing: Outgoing,
    ) -> None:
        self._owned, self._group, self._outgoing = owned, tensor_parallel, outgoing
        self._gathers = not all(_is_whole(tensor) for tensor in held)
        self._plan: _Plan | None = None

    @torch.no_grad()
    def export(self, recipes: ModelRecipes, version: int, transport: Transport) -> WeightPayload:
        """The payload of this rank's tensors. Collective, see ``owned``; outlives the next optimizer step."""
        plan = self._plan = self._plan or self._make_plan()
        buckets = self._outgoing.begin(plan.manifest, transport)
        # On a GPU, reading all master weights to see that none has changed would take longer than sending them.
        looks = self._outgoing.device.type == "cpu"
        packed = [module.quantised() if looks else module.packed() for module in plan.packed.bases]
        plan.packed.copies.run(buckets, [getattr(packed[number], part) for number, part in plan.packed.sources])
        plan.plain.copies.run(buckets, [plan.plain.bases[number] for number, _ in plan.plain.sources])
        values = np.zeros(len(plan.manifest.checked), dtype=np.uint64)
        if self._gathers or self._sends_values:
            self._gather(plan, buckets, values)
        return self._outgoing.finish(recipes.to_dict(), version, values)

    def again(self, version: int) -> WeightPayload:
        """See ``Outgoing.again``."""
        return self._outgoing.again(version)

    @property
    def _sends_values(self) -> bool:
        """Whether values are compared beside the bytes that they are made of: where engines keep them, on a CPU.

        On a GPU products read the bytes, by one kernel on both sides: values would prove nothing more.
        """
        return self._outgoing.device.type == "cpu"

    def _make_plan(self) -> _Plan:
        mine = []
        for tensor in self._owned():
            is_first = self._group is None or self._group.rank() == 0
            if is_first or (tensor.is_expert and tensor.division.count == 1):
                mine.append(tensor)
        mine = in_matrix_order(mine)
        manifest = arrange(self._outline(tensor) for tensor in mine)
        positions = itertools.accumulate((len(place.checked) for place in manifest.tensors), initial=0)
        first_sums = dict(zip((tensor.name for tensor in mine), positions, strict=False))
        places = {place.name: place for place in manifest.tensors}
        whole = [(tensor, place) for tensor, place in zip(mine, manifest.tensors, strict=True) if _is_whole(tensor)]
        packed = _copies(manifest, [(t.module, t.rows, place) for t, place in whole if t.module is not None], False)
        plain = _copies(manifest, [(t.parameter, t.rows, place) for t, place in whole if t.module is None], True)
        return _Plan(manifest, places, first_sums, packed, plain)

    def _outline(self, tensor: HfTensor) -> Outline:
        shape = tensor.whole_shape
        if tensor.module is None:
            kind = {dtype: kind for kind, dtype in DTYPES.items()}.get(tensor.parameter.dtype)
            if kind not in ("float32", "bfloat16"):
                raise TypeError(f"{tensor.name} is {tensor.parameter.dtype}; weights are sent as float32 or bfloat16")
            return Outline(tensor.name, "dense", shape, {VALUES: (kind, shape)}, (VALUES,))
        assert tensor.module.recipe is not None
        assert tensor.module.recipe.w is not None
        parts = part_shapes(shape, tensor.module.recipe.w)
        checked = (*parts, VALUES) if self._sends_values else tuple(parts)
        return Outline(tensor.name, "mx", shape, {part: (bytes_kind(part), s) for part, s in parts.items()}, checked)

    def _gather(self, plan: _Plan, buckets: list[Tensor], sums: np.ndarray) -> None:
        """Put together what ranks divide, and take the checksums of values."""
        for tensor in self._owned():
            place = plan.places.get(tensor.name)
            for part, held in self._parts_to_gather(tensor):
                whole = _whole(held, tensor, self._group)
                if whole is None:
                    continue
                assert place is not None
                if part in place.parts and not _is_whole(tensor):
                    at = place.parts[part]
                    data = whole.contiguous().view(-1).view(torch.uint8)
                    buckets[at.bucket][at.offset : at.offset + len(data)].copy_(data)
                if part == VALUES and tensor.module is not None:
                    position = plan.first_sums[tensor.name] + place.checked.index(VALUES)
                    sums[position] = part_checksum(VALUES, whole)

    def _parts_to_gather(self, tensor: HfTensor) -> Iterator[tuple[str, Tensor]]:
        if tensor.module is None:
            if not _is_whole(tensor):
                yield VALUES, tensor.read()
            return
        if _is_whole(tensor) and not self._sends_values:
            return
        packed, values = tensor.quantised()
        if not _is_whole(tensor):
            # Slices end where blocks and macro-blocks end (``config.layout``): their bytes in a row are the whole.
            yield from packed.parts().items()
        if self._sends_values:
            yield VALUES, values


def _is_whole(tensor: HfTensor) -> bool:
    """Whether this rank holds all of a tensor, and can read it without the others."""
    return tensor.division.count == 1 and (tensor.module is not None or type(tensor) is HfTensor)


def _copies(
    manifest: Manifest, tensors: list[tuple[Base, tuple[slice, ...], TensorPlace]], lasting: bool
) -> _From[Base]:
    """Copies of tensors, each of which is some rows of a base."""
    bases: dict[int, Base] = {}
    sources: dict[tuple[int, str], int] = {}
    pieces: list[tuple[int, int, int, int, int]] = []
    for base, rows, place in tensors:
        bases.setdefault(id(base), base)
        for part, at in place.parts.items():
            number = sources.setdefault((id(base), part), len(sources))
            width = prod(at.shape[1:]) * DTYPES[manifest.buckets[at.bucket].kind].itemsize
            offset = at.offset
            for run in rows:
                size = (run.stop - run.start) * width
                pieces.append((number, run.start * width, size, at.bucket, offset))
                offset += size
    numbers = {key: number for number, key in enumerate(bases)}
    copies = Copies(np.array(pieces, dtype=np.int64).reshape(-1, 5), lasting)
    return _From(list(bases.values()), [(numbers[key], part) for key, part in sources], copies)


def _whole(part: Tensor, tensor: HfTensor, group: ProcessGroup | None) -> Tensor | None:
    """The slices of all tensor-parallel ranks together, on the first of them; None on the others."""
    division = tensor.division
    is_first = group is None or group.rank() == 0
    if division.count == 1:
        return part if is_first or tensor.is_expert else None
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(division.count)] if is_first else None
    torch.distributed.gather(part, parts, group=group, group_dst=0)
    return None if parts is None else torch.cat(parts, division.dimension)
