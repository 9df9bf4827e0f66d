"""One of the learner's tensors as rows of a live matrix: its parts, its values, its checksums. No vLLM here."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxdist.model.division import Division
from mxdist.quant.checksum import checksum
from mxdist.rollout.live_weight import LiveWeight
from mxdist.rollout.products import live_values
from mxdist.sync.checks import unit_of
from mxdist.sync.layout import VALUES
from mxdist.sync.payload import part_checksum

UNDIVIDED = Division()


@dataclass(frozen=True)
class Slot:
    """One Hugging Face tensor inside the live model. Views are taken anew on every call, never kept."""

    name: str  # Hugging Face tensor name, ends in .weight or .bias
    owner: LiveWeight | nn.Module  # of a linear only the bias: its weight is a LiveWeight
    rows: slice  # of the owner's matrix
    attribute: str = "weight"  # of an owner that is no LiveWeight: where its values are
    division: Division = UNDIVIDED  # of the tensor over the processes of one engine

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def kind(self) -> str:
        return "mx" if isinstance(self.owner, LiveWeight) and self.owner.operand is not None else "dense"

    @property
    def part_names(self) -> tuple[str, ...]:
        """What a payload carries: packed bytes, or plain values."""
        return tuple(self.owner.parts()) if isinstance(self.owner, LiveWeight) else (VALUES,)

    @property
    def device(self) -> torch.device:
        return self.matrix(self.part_names[0]).device

    def matrix(self, part: str) -> Tensor:
        """The live buffer of which ``rows`` are this tensor's."""
        if isinstance(self.owner, LiveWeight):
            return self.owner.get_buffer(part)
        plain: Tensor = getattr(self.owner, self.attribute)
        return plain.detach()

    def parts(self) -> dict[str, Tensor]:
        """What this process holds of each part, live."""
        return {part: self.matrix(part)[self.rows] for part in self.part_names}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        if isinstance(self.owner, LiveWeight):
            return self.division.whole((self.rows.stop - self.rows.start, self.owner.shape[1]))
        return self.division.whole(tuple(self.matrix(VALUES)[self.rows].shape))

    def values(self) -> Tensor:
        """What the forward pass multiplies: live, or made from the bytes where they are all that is kept."""
        return live_values(self.owner, self.rows) if isinstance(self.owner, LiveWeight) else self.parts()[VALUES]

    def checksums(self) -> dict[str, int]:
        """By part, of the live buffers; "values" is what the forward pass multiplies, in float32 form."""
        return {part: self.checksum(part) for part in (*(set(self.part_names) - {VALUES}), VALUES)}

    def checksum(self, part: str) -> int:
        """Of one part; of a divided tensor the share of this process, and those of all add up."""
        held = self.values().float() if part == VALUES else self.matrix(part)[self.rows]
        if self.division.count == 1:
            return part_checksum(part, held)
        return _share(held, self.division, unit_of(part))


def _share(held: Tensor, division: Division, unit: int) -> int:
    if division.dimension == 0:
        return checksum(held, division.index * held.nbytes, unit=unit)
    width = held.shape[-1] * held.element_size()
    return checksum(held, division.index * width, row_stride=division.count * width, unit=unit)
