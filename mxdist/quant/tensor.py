"""`MXTensor`: a quantised tensor as packed bytes, the form that is sent, saved and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxdist.quant.format import e2m1_decode_packed, e8m0_decode
from mxdist.quant.hadamard import POINTS
from mxdist.quant.layout import per_block
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand
from mxdist.quant.scaling import macro_factors
from mxdist.quant.transform import Frozen, leave

PART_NAMES = ("codes", "scales", "macro", "residual_codes", "residual_scales")

CHUNK = 1 << 17
"""Elements dequantised at a time, so that float32 temporaries stay in the cache."""


@dataclass(frozen=True, slots=True)
class MXTensor:
    """Packed MXFP4 of a logical tensor [..., K]; every row along K stands alone.

    codes            uint8 [..., ceil(K / block) * block / 2], two E2M1 codes a byte, low nibble first
    scales           uint8 [..., ceil(K / block)], E8M0
    macro            uint8 [..., ceil(K / macro.size)] or None
    residual_codes, residual_scales   like codes and scales, or None without outlier fallback; a residual scale of 0
                     marks a block whose tile was not flagged
    shape            the logical shape, K last
    operand          how it was quantised, hence how it is read
    """

    codes: Tensor
    scales: Tensor
    macro: Tensor | None
    residual_codes: Tensor | None
    residual_scales: Tensor | None
    shape: tuple[int, ...]
    operand: Operand

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor], shape: Sequence[int], operand: Operand) -> MXTensor:
        """Inverse of `parts`. ValueError when a part is missing, unexpected, or of the wrong shape or dtype."""
        shape = tuple(shape)
        wanted = part_shapes(shape, operand)
        if set(parts) != set(wanted):
            raise ValueError(f"an MXTensor of this operand has the parts {sorted(wanted)}, not {sorted(parts)}.")
        for key, part in parts.items():
            if part.dtype != torch.uint8 or tuple(part.shape) != wanted[key]:
                raise ValueError(
                    f"part {key} is {part.dtype} {tuple(part.shape)}; a tensor of shape {shape} needs "
                    f"uint8 {wanted[key]}."
                )
        return cls(
            parts["codes"],
            parts["scales"],
            parts.get("macro"),
            parts.get("residual_codes"),
            parts.get("residual_scales"),
            shape,
            operand,
        )

    def parts(self) -> dict[str, Tensor]:
        """The byte tensors by name, without those that are absent."""
        return {key: part for key in PART_NAMES if (part := getattr(self, key)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() for part in self.parts().values())

    def dequantise(
        self, dtype: torch.dtype = torch.float32, *, seed: int | Draw | None = None, frozen: Frozen | None = None
    ) -> Tensor:
        """Return x_hat of the logical shape: computed in float32, then rounded to `dtype`.

        The bytes do not hold the mean or the random signs of operands that use them: pass the `frozen` and `seed`
        that were given to `quantise`.
        """
        frozen, draw = frozen or Frozen(), Draw(seed) if isinstance(seed, int) else seed
        Frozen(frozen.mean, threshold=0.0).check(self.operand, self.shape[-1], "tensor")
        if self.operand.hadamard == "signed" and draw is None:
            raise ValueError("dequantising random signs needs the seed they were drawn from.")
        rows, k = math.prod(self.shape[:-1]), self.shape[-1]
        out = torch.empty(rows, k, dtype=dtype, device=self.codes.device)
        if out.numel() == 0:
            return out.view(self.shape)
        flat = {key: part.reshape(rows, part.shape[-1]) for key, part in self.parts().items()}
        step = max(1, CHUNK // k)
        for start in range(0, rows, step):
            piece = {key: part[start : start + step] for key, part in flat.items()}
            values = leave(_dequantise_rows(piece, self.operand), self.operand, frozen, draw)
            out[start : start + step] = values[:, :k]
        return out.view(self.shape)

    def __getitem__(self, rows: slice | int | Tensor | Sequence[int]) -> MXTensor:
        """Select along the first axis, as torch does. IndexError on a single row [K]: K cannot be cut."""
        if len(self.shape) < 2:
            raise IndexError("an MXTensor can be indexed along its leading axes only, and this one has none.")
        parts = {key: part[rows] for key, part in self.parts().items()}
        return MXTensor.from_parts(parts, (*parts["scales"].shape[:-1], self.shape[-1]), self.operand)

    def split(self, rows: int) -> list[MXTensor]:
        """Views of `rows` along the first axis each, the last of what is left."""
        parts = {key: part.split(rows) for key, part in self.parts().items()}
        views = [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]
        absent = dict.fromkeys(PART_NAMES)
        return [
            MXTensor(**absent | view, shape=(len(view["codes"]), *self.shape[1:]), operand=self.operand)  # type: ignore[arg-type]
            for view in views
        ]


def cat_rows(tensors: Sequence[MXTensor]) -> MXTensor:
    """Concatenate along the first axis: equal to quantising the concatenation of the originals.

    ValueError unless all have the same operand and the same shape behind the first axis.
    """
    first = tensors[0]
    for other in tensors[1:]:
        if other.operand != first.operand or other.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"only MXTensors of one operand and one trailing shape can be concatenated: {first.shape} "
                f"{first.operand} and {other.shape} {other.operand} differ."
            )
    if len(first.shape) < 2:
        raise ValueError("single rows [K] have no axis to concatenate along.")
    parts = {key: torch.cat([tensor.parts()[key] for tensor in tensors]) for key in first.parts()}
    return MXTensor.from_parts(parts, (sum(t.shape[0] for t in tensors), *first.shape[1:]), first.operand)


def part_shapes(shape: Sequence[int], operand: Operand) -> dict[str, tuple[int, ...]]:
    """Return the byte shape of every part of an `MXTensor` with this logical shape and operand."""
    *leading, k = shape
    unit = POINTS if operand.hadamard != "none" else operand.block  # a rotation fills its last 32 elements
    blocks = -(-k // unit) * unit // operand.block
    codes, scales = (*leading, blocks * operand.block // 2), (*leading, blocks)
    shapes = {"codes": codes, "scales": scales}
    if operand.macro is not None:
        shapes["macro"] = (*leading, -(-k // operand.macro.size))
    if operand.fallback is not None:
        shapes |= {"residual_codes": codes, "residual_scales": scales}
    return shapes


def combine(primary: Tensor, residual: Tensor | None, macro: Tensor | None, operand: Operand) -> Tensor:
    """Return (z1 + alpha z2) g for blocks [rows, blocks, block]; overwrites `primary` and `residual`.

    Each operation rounds once, in this order, so that every caller gets the same bits.
    """
    if residual is not None and operand.fallback is not None:
        primary.add_(residual.mul_(operand.fallback.alpha))
    if macro is not None and operand.macro is not None:
        g = macro_factors(operand.macro, macro)[1]
        primary.mul_(per_block(g, operand.macro.size, operand.block, primary.shape[1]).unsqueeze(-1))
    return primary


def _dequantise_rows(parts: dict[str, Tensor], operand: Operand) -> Tensor:
    """x_hat float32 [rows, padded K] from parts [rows, ...]."""
    primary = _decode(parts["codes"], parts["scales"])
    residual = _decode(parts["residual_codes"], parts["residual_scales"]) if "residual_codes" in parts else None
    return combine(primary, residual, parts.get("macro"), operand).flatten(1)


def _decode(codes: Tensor, scales: Tensor) -> Tensor:
    rows, blocks = scales.shape
    values = e2m1_decode_packed(codes).view(rows, blocks, 2 * codes.shape[1] // blocks)
    return values.mul_(e8m0_decode(scales).unsqueeze(-1))
