"""Quantise along rows with every macro method and with outlier fallback: to values, or to packed bytes.

For products that no single E4M3 byte holds, and for what is sent and saved. Both equal the reference in every bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels import terms
from mxdist.quant.kernels.device import INTERPRETED, power_of_two
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Random, TermOptions
from mxdist.quant.layout import as_rows, check_dtype
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import NonFinite
from mxdist.quant.tensor import MXTensor, part_shapes
from mxdist.quant.transform import Frozen

SHAPE = (32, 4)
"""Rows of a program's piece, which is a tile wide, and its warps."""


@triton.jit(do_not_specialize=["rows"])
def _quantise_terms_kernel(
    x, stride, rows, columns, flag, threshold, listed, alpha,
    values, codes, code_width, scales, scale_width, macro, macro_width, residual_codes, residual_scales,
    seed, stream, draw_row, first_call, calls_per_row,
    ROWS: tl.constexpr, PACK: tl.constexpr, METHOD: tl.constexpr, BITS: tl.constexpr, CARRY: tl.constexpr,
    SATURATE: tl.constexpr, RANDOM: tl.constexpr, FALLBACK: tl.constexpr, THRESHOLD: tl.constexpr,
    LISTED: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(1) * ROWS, tl.program_id(0)
    r, c = row + tl.arange(0, ROWS), tile * 128 + tl.arange(0, 128)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    loaded = tl.load(x + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    noise, noise_2 = 0.0, 0.0
    if RANDOM:
        noise = terms.tile_noise(seed, stream, 0, draw_row + row, tile, first_call, calls_per_row, ROWS)
        if FALLBACK:
            noise_2 = terms.tile_noise(seed, stream, 1, draw_row + row, tile, first_call, calls_per_row, ROWS)
    blocks = tl.reshape(loaded, [ROWS, 1, 4, 32])
    left, y, code, unit, byte, g, bad, tile_max = terms.first_term(blocks, noise, METHOD, BITS, CARRY, SATURATE, RANDOM)
    if CHECK and tl.max(tl.reshape(bad.to(tl.int32), [ROWS * 4])) > 0:
        tl.atomic_or(flag, 1)
    if FALLBACK:
        flagged = tile_max >= 0.0
        if THRESHOLD:
            flagged = tile_max > threshold
        if LISTED:
            flagged = flagged & (tl.load(listed + tile) > 0)
        y_2, code_2, unit_2 = terms.second_term(left, unit, noise_2, CARRY, SATURATE, RANDOM)
        y_2 = tl.where(flagged[:, :, None, None], y_2, 0.0)
    if PACK:
        n = tile * 64 + tl.arange(0, 64)
        b, t = tile * 4 + tl.arange(0, 4), tile + tl.arange(0, 1)
        far = r.to(tl.int64)
        to_codes, code_inside = far[:, None] * code_width + n[None, :], (r < rows)[:, None] & (n < code_width)[None, :]
        to_scales = far[:, None] * scale_width + b[None, :]
        scale_inside = (r < rows)[:, None] & (b < scale_width)[None, :]
        tl.store(codes + to_codes, tl.reshape(terms.nibbles(y, code, unit), [ROWS, 64]), mask=code_inside)
        stored = tl.where(bad, 255, code)
        tl.store(scales + to_scales, tl.reshape(stored, [ROWS, 4]).to(tl.uint8), mask=scale_inside)
        if METHOD != terms.NO_FACTOR:
            tl.store(macro + far[:, None] * macro_width + t[None, :], byte.to(tl.uint8), mask=(r < rows)[:, None])
        if FALLBACK:
            packed = tl.reshape(terms.nibbles(y_2, code_2, unit_2), [ROWS, 64])
            tl.store(residual_codes + to_codes, packed, mask=code_inside)
            stored = tl.where(flagged[:, :, None], code_2, 0)
            tl.store(residual_scales + to_scales, tl.reshape(stored, [ROWS, 4]).to(tl.uint8), mask=scale_inside)
    else:
        z = y * power_of_two(unit)[:, :, None, None]
        if FALLBACK:
            z += y_2 * power_of_two(unit_2)[:, :, None, None] * alpha
        if METHOD != terms.NO_FACTOR:
            z = z * g[:, :, None, None]
        z = tl.where(bad[:, :, :, None], float("nan"), z)
        tl.store(values + r.to(tl.int64)[:, None] * columns + c[None, :], tl.reshape(z, [ROWS, 128]), mask=inside)


def fake_quantise(
    x: Tensor,
    operand: Operand,
    *,
    seed: int | Draw | None = None,
    frozen: Frozen | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return x_hat of x's shape, computed in float32 and rounded to `dtype`; `reference.fake_quantise` otherwise.

    Raises `UnsupportedOperandError` for operands these kernels do not do; `options.missing_in_terms` lists what.
    """
    # The interpreter casts to bfloat16 by cutting bits off.
    out = torch.empty(x.shape, dtype=torch.float32 if INTERPRETED.value else dtype, device=x.device)
    _launch(x, operand, seed, frozen, name, nonfinite, values=out)
    return out.to(dtype)


def quantise(
    x: Tensor,
    operand: Operand,
    *,
    seed: int | Draw | None = None,
    frozen: Frozen | None = None,
    name: str = "tensor",
    nonfinite: NonFinite | Tensor = "error",
) -> MXTensor:
    """Return x packed: nibbles, E8M0 codes and macro bytes; arguments and bytes as of `reference.quantise`.

    nonfinite  also a tensor to be set where x has NaN or Inf, see `Flag`.
    """
    shapes = part_shapes(x.shape, operand)
    parts = {key: torch.empty(shape, dtype=torch.uint8, device=x.device) for key, shape in shapes.items()}
    _launch(x, operand, seed, frozen, name, nonfinite, parts=parts)
    return MXTensor.from_parts(parts, x.shape, operand)


def _listed(operand: Operand, frozen: Frozen, k: int, device: torch.device) -> Tensor | None:
    """int32 [tiles]: 1 where `frozen` lists the tile; None without a list."""
    if operand.fallback is None or operand.fallback.fraction is None or frozen.tiles is None:
        return None
    listed = torch.zeros(-(-k // TILE), dtype=torch.int32, device=device)
    return listed.index_fill_(0, frozen.tiles.to(device=device, dtype=torch.int64), 1)


def _launch(
    x: Tensor, operand: Operand, seed: int | Draw | None, frozen: Frozen | None, name: str,
    nonfinite: NonFinite | Tensor, values: Tensor | None = None, parts: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    options = TermOptions.of(operand)
    check_dtype(x, name)
    frozen = frozen or Frozen()
    frozen.check(operand, x.shape[-1], name)
    random = Random.of(seed, x.shape[-1], options.stochastic)
    if not x.numel():
        return
    source = as_rows(x.detach())
    if source.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        source = source.float()
    if source.stride(-1) != 1:
        source = source.contiguous()
    rows, k = source.shape
    flag, listed, parts = Flag(x.device, nonfinite), _listed(operand, frozen, k, x.device), parts or {}
    height, warps = SHAPE
    codes, scales, macro = parts.get("codes"), parts.get("scales"), parts.get("macro")
    _quantise_terms_kernel[(triton.cdiv(k, 128), triton.cdiv(rows, height))](
        source, source.stride(0), rows, k, flag.pointer, frozen.threshold or 0.0, listed, options.alpha,
        values, codes, 0 if codes is None else codes.shape[-1], scales, 0 if scales is None else scales.shape[-1],
        macro, 0 if macro is None else macro.shape[-1], parts.get("residual_codes"), parts.get("residual_scales"),
        random.seed, random.stream, random.row, random.first_call, random.calls_per_row,
        ROWS=height, PACK=values is None, METHOD=options.method, BITS=options.bits, CARRY=options.carry,
        SATURATE=options.saturate, RANDOM=options.stochastic, FALLBACK=options.fallback,
        THRESHOLD=options.flagged and listed is None, LISTED=listed is not None, CHECK=flag.checked,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    flag.raise_if_set(source, name)
