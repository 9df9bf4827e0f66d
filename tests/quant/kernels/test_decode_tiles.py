"""Products with packed weights in FP8: to the rounding of their output, and what they quantise rows to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl

from mxdist.quant.kernels import decode, decode_tiles
from mxdist.quant.kernels.decode_tiles import TileShape, multiply_tiles
from mxdist.quant.kernels.options import runs_in_tiles
from mxdist.quant.kernels.quant_lanes import quantise_lanes
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.recipe import Fallback, Operand, get_recipe
from mxdist.quant.reference import fake_quantise, quantise
from mxdist.quant.tensor import MXTensor
from tests.quant.kernels.data import DEVICE, matrix


def operands(recipe: str) -> tuple[Operand, Operand]:
    """Of rows and of weights."""
    chosen = get_recipe(recipe)
    assert chosen.x_fwd is not None
    assert chosen.w is not None
    return chosen.x_fwd, chosen.w


def packed(rows: int, k: int, operand: Operand) -> MXTensor:
    """With every nibble in it, and blocks far below their tile's largest."""
    return quantise(matrix(rows, k, spread=2.0, seed=1, dtype=torch.float32), operand)


def in_order(tiles: Tensor) -> Tensor:
    """Rows [rows, K] whose elements lie in the lanes' order, as they were."""
    rows, k = tiles.shape
    return tiles.view(rows, k // 128, 4, 2, 4, 4).permute(0, 1, 4, 2, 3, 5).reshape(rows, k)


@triton.jit
def _store_tables(out):  # type: ignore[no-untyped-def]
    shift = tl.arange(0, 16)
    low, high = decode_tiles.tables(tl.minimum(shift - 8, 6))
    tl.store(out + 2 * shift, low)
    tl.store(out + 2 * shift + 1, high)


def test_magnitudes_are_looked_up_in_every_binade_that_e4m3_has() -> None:
    out = torch.zeros(16, 2, dtype=torch.int32, device=DEVICE)
    _store_tables[(1,)](out)
    got = out[:15].cpu().view(torch.uint8).view(torch.float8_e4m3fn).float()
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert torch.equal(got, magnitudes * 2.0 ** torch.arange(-8.0, 7.0)[:, None])


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4_mbs"])
@pytest.mark.parametrize("rows", [3, 40])
def test_rows_are_quantised_as_for_other_products_in_fp8(recipe: str, rows: int) -> None:
    x, (operand, _) = matrix(rows, 384, spread=2.0), operands(recipe)
    x[1, 200] = float("nan")
    values, scales = quantise_lanes(x, operand, 16)
    wanted, _ = quantise_tiles(x, operand, nonfinite="propagate")
    assert wanted is not None
    assert values.shape == (-(-rows // 16) * 16, 384)
    assert torch.equal(scales[:rows], wanted.scale)
    torch.testing.assert_close(in_order(values[:rows].float()), wanted.data.float(), rtol=0, atol=0, equal_nan=True)


SHAPES = [
    ("mxfp4", 3, (80, 256), TileShape(16, 64, 4, 2, 1, 1)),
    ("mxfp4", 33, (130, 640), TileShape(16, 64, 4, 2, 2, 3)),
    ("mxfp4", 17, (70, 1024), TileShape(16, 64, 4, 2, 4, 2)),
    ("mxfp4_mbs", 20, (64, 512), TileShape(32, 128, 4, 2, 2, 2)),
    ("mxfp4_mbs", 9, (64, 512), TileShape(16, 64, 4, 2, 4, 1)),
    ("mxfp4_mbs", 9, (64, 640), TileShape(16, 64, 4, 2, 4, 2)),
]


@pytest.mark.parametrize(("recipe", "rows", "size", "shape"), SHAPES)
def test_products_are_those_of_the_references_values(
    recipe: str, rows: int, size: tuple[int, int], shape: TileShape
) -> None:
    (operand, own), (outputs, k) = operands(recipe), size
    x, weight = matrix(rows, k), packed(outputs, k, own)
    assert runs_in_tiles(own, k, operand)
    x_q, values = fake_quantise(x, operand).double(), weight.dequantise(torch.float32).double()
    # Float32 sums of tiles. Hopper adds 32 products in 14 bits, of the largest: blocks here are far apart.
    sums = (2.0**-11 if DEVICE.type == "cuda" else 2.0**-20) * (x_q.abs() @ values.abs().t())
    for bias in (None, torch.randn(outputs, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)):
        got, wanted = multiply_tiles(x, weight, bias, operand, shape), x_q @ values.t()
        wanted = wanted if bias is None else wanted + bias.double()
        assert got.dtype == torch.bfloat16
        assert ((got.double() - wanted).abs() <= sums + wanted.abs() * 2.0**-8).all()


def test_two_terms_partial_tiles_and_rotated_rows_are_left_to_others() -> None:
    plain = Operand()
    assert runs_in_tiles(plain, 256, plain)
    assert not runs_in_tiles(Operand(fallback=Fallback(alpha=0.3)), 256, plain)
    assert not runs_in_tiles(Operand(block=16), 256, plain)
    assert not runs_in_tiles(plain, 320, plain)
    assert not runs_in_tiles(plain, 256, None)
    assert not runs_in_tiles(plain, 256, Operand(hadamard="plain"))


def test_rows_that_an_engine_multiplies_go_in_tiles_where_fp8_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "device_lacks", lambda _device: None)
    (operand, own), rows = operands("mxfp4"), decode.HALVES_ROWS + 1
    x, weight = matrix(rows, 256), packed(96, 256, own)
    shape = decode_tiles.tile_shape_of(rows, 96, 2, decode._multiprocessors(DEVICE))
    wanted = multiply_tiles(x, weight, None, operand, shape)
    assert torch.equal(decode.multiply(x, weight, operand=operand), wanted)


def test_a_product_is_cut_so_that_it_fills_the_gpu_and_tiles_hold_its_rows() -> None:
    for rows in (9, 16, 40, 64, 100, 256):
        for outputs, k in ((2560, 2048), (2048, 2048), (22016, 2048), (2048, 11008)):
            shape = decode_tiles.tile_shape_of(rows, outputs, k // 128, 132)
            programs = -(-outputs // shape.width) * -(-rows // shape.height) * shape.split
            assert programs >= 64, (rows, outputs, k, shape)
            assert programs <= 3 * 132 or shape.split == 1, (rows, outputs, k, shape)
            assert rows <= shape.height or shape.height >= 64
            assert shape.width >= 16 * shape.warps  # a warp group has 64 outputs
