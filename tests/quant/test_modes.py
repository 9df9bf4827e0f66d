"""The rarer modes: axis, squares, best scale, stochastic rounding, Hadamard, mean, flagged fallback."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxdist.quant.fallback import ThresholdController, choose_tiles, tile_maxima
from mxdist.quant.format import E2M1_VALUES, e8m0_decode
from mxdist.quant.hadamard import POINTS, hadamard, rotate, rotate_back
from mxdist.quant.philox import Draw, random_signs
from mxdist.quant.recipe import Fallback, Macro, Operand, ScaleRule
from mxdist.quant.reference import fake_quantise, quantise
from mxdist.quant.telemetry import flagged_fraction
from mxdist.quant.transform import Frozen
from tests.quant.strategies import bits, tensors

SQUARE = Operand(square=True)
STOCHASTIC = Operand(rounding="stochastic")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(tensors(), st.sampled_from((Operand(), Operand(macro=Macro(), fallback=Fallback()))))
def test_blocks_along_the_first_axis_are_blocks_of_the_transpose(x: Tensor, operand: Operand) -> None:
    assert torch.equal(fake_quantise(x, operand, axis=0), fake_quantise(x.T, operand).T)
    assert torch.equal(quantise(x, operand, axis=0).codes, quantise(x.T, operand).codes)


@pytest.mark.parametrize(
    "operand",
    [
        SQUARE,
        Operand(square=True, block=16),
        Operand(square=True, macro=Macro(method="search", bits=4)),
        Operand(square=True, macro=Macro(), fallback=Fallback(0.5)),
        Operand(square=True, scale_rule=ScaleRule.BEST),
    ],
)
@pytest.mark.parametrize("shape", [(256, 128), (70, 200), (33, 33)])
def test_with_square_blocks_a_matrix_and_its_transpose_quantise_identically(operand: Operand, shape: tuple) -> None:
    x = gaussian(*shape) * 2.0 ** (20 * torch.rand(shape, generator=torch.Generator().manual_seed(1)))
    values = fake_quantise(x, operand)
    assert torch.equal(values.T, fake_quantise(x.T, operand))
    assert torch.equal(bits(values), bits(quantise(x, operand).dequantise()))


def test_square_blocks_share_one_scale_from_their_largest_magnitude() -> None:
    x = gaussian(96, 160)
    scales = e8m0_decode(quantise(x, SQUARE).scales).view(3, 32, 5)
    assert torch.equal(scales, scales[:, :1].expand_as(scales))
    tops = x.view(3, 32, 5, 32).abs().amax((1, 3))
    assert ((tops / scales[:, 0] <= 6) & (tops / scales[:, 0] > 3)).all()


def test_squares_of_large_matrices_do_not_depend_on_the_chunks_they_are_computed_in() -> None:
    x = gaussian(384, 1536)
    pieces = [fake_quantise(piece, SQUARE) for piece in x.split(128)]
    assert torch.equal(fake_quantise(x, SQUARE), torch.cat(pieces))
    with pytest.raises(ValueError, match="cannot be cut into squares"):
        fake_quantise(x[:100].view(2, 50, 1536), SQUARE)


@given(tensors(max_rows=3))
def test_the_best_rule_takes_for_each_block_the_better_of_ceil_and_half(x: Tensor) -> None:
    x = x.clamp(-1e15, 1e15)
    x = torch.where(x.abs() < 1e-15, 0.0, x)  # keep squares within float32, and tiles within 14 binades
    x = torch.where(x.abs() < x.abs().amax() * 2.0**-10, 0.0, x)
    best = quantise(x, Operand(scale_rule="best"))
    ceil = quantise(x, Operand()).scales.int()
    chosen = best.scales.int()
    assert ((chosen == ceil) | (chosen == ceil - 1)).all()
    pad = (0, -x.shape[1] % 32)

    def error(values: Tensor) -> Tensor:
        return torch.nn.functional.pad((values.double() - x).square(), pad).unflatten(1, (-1, 32)).sum(-1)

    halved = error(_at_scales(x, ceil - 1))
    smallest = torch.minimum(error(fake_quantise(x, Operand())), halved)
    assert (error(best.dequantise()) <= smallest * (1 + 1e-5)).all()


def _at_scales(x: Tensor, codes: Tensor) -> Tensor:
    """Nearest grid values at given block scales, by looking at all of them."""
    scale = (2.0 ** (codes.double() - 127)).repeat_interleave(32, -1)[:, : x.shape[1]].unsqueeze(-1)
    grid = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    distance = (x.double().abs().unsqueeze(-1) - grid * scale).abs()
    return (distance.argmin(-1, keepdim=True) == torch.arange(8)).double().mul(grid * scale).sum(-1) * x.sign()


@given(tensors(), st.integers(0, 2**63 - 1))
def test_stochastic_rounding_picks_a_neighbour_and_leaves_grid_points_alone(x: Tensor, seed: int) -> None:
    x = x.clamp(-1e37, 1e37)
    packed = quantise(x, STOCHASTIC, seed=seed)
    values = packed.dequantise()
    scale = e8m0_decode(packed.scales).repeat_interleave(32, -1)[:, : x.shape[1]]
    ratio = (x / scale).abs().double()
    step = torch.where(ratio < 2, 0.5, torch.where(ratio < 4, 1.0, 2.0))
    lower = (ratio / step).floor() * step
    result = (values / scale).abs().double()
    assert ((result == lower) | ((result == lower + step) & (ratio > lower))).all()
    assert torch.equal(
        fake_quantise(values, STOCHASTIC, seed=seed + 1)[values.abs() > 0] != 0, values[values.abs() > 0] != 0
    )
    assert torch.equal(bits(values), bits(fake_quantise(x, STOCHASTIC, seed=seed)))


def test_stochastic_rounding_is_unbiased() -> None:
    x = gaussian(4, 256)
    mean = torch.stack([fake_quantise(x, STOCHASTIC, seed=s) for s in range(600)]).double().mean(0)
    scale = e8m0_decode(quantise(x, Operand()).scales).repeat_interleave(32, -1)
    z = (mean - x) / (scale * 600**-0.5)  # a step is at most 2 scales, its standard deviation at most 1
    assert z.abs().max() < 5
    assert abs((mean - x).sum() / x.abs().sum()) < 2e-3
    nearest = (fake_quantise(x, Operand()) - x).double()
    assert (mean - x).square().sum() < 0.02 * nearest.square().sum()


def test_stochastic_rounding_does_not_depend_on_tiling_or_sharding() -> None:
    x = gaussian(96, 320)
    whole = fake_quantise(x, STOCHASTIC, seed=11)
    assert torch.equal(
        torch.cat([fake_quantise(x[i : i + 7], STOCHASTIC, seed=Draw(11, row=i)) for i in range(0, 96, 7)]), whole
    )
    right = fake_quantise(x[:, 128:], STOCHASTIC, seed=Draw(11, column=128, columns=320))
    assert torch.equal(right, whole[:, 128:])
    assert not torch.equal(fake_quantise(x, STOCHASTIC, seed=12), whole)
    large = gaussian(1300, 256)  # more than one chunk
    tail = fake_quantise(large[1290:], STOCHASTIC, seed=Draw(11, row=1290))
    assert torch.equal(fake_quantise(large, STOCHASTIC, seed=11)[1290:], tail)


def test_the_residual_is_rounded_with_numbers_of_its_own() -> None:
    """With the first term's numbers the second would depend on the first one's outcome and be biased."""
    x = gaussian(4, 256)
    operand = Operand(rounding="stochastic", fallback=Fallback(1.0))
    draws = torch.stack([fake_quantise(x, operand, seed=s) for s in range(400)]).double()
    bias = (draws.mean(0) - x).square().mean()
    assert bias < 1.5 * draws.var(0).mean() / 400


def test_random_operands_ask_for_a_seed() -> None:
    for operand in (STOCHASTIC, Operand(hadamard="signed")):
        with pytest.raises(ValueError, match="dY draws random numbers: it needs a seed"):
            fake_quantise(gaussian(2, 64), operand, name="dY")
    with pytest.raises(ValueError, match="needs the seed"):
        quantise(gaussian(2, 64), Operand(hadamard="signed"), seed=1).dequantise()


def test_the_hadamard_transform_is_the_sylvester_matrix_and_its_own_inverse() -> None:
    matrix = torch.ones(1, 1)
    for _ in range(5):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = gaussian(6, 64)
    assert torch.allclose(hadamard(x), (x.view(6, 2, POINTS) @ matrix).view(6, 64), atol=1e-5)
    integers = torch.randint(-100, 100, (4, 96)).float()
    assert torch.equal(rotate_back(rotate(integers, None), None), integers)


@pytest.mark.parametrize("mode", ["plain", "signed"])
@pytest.mark.parametrize(("block", "k"), [(32, 96), (16, 80), (32, 50)])
def test_hadamard_quantises_the_rotated_tensor_and_turns_back(mode: str, block: int, k: int) -> None:
    x = gaussian(5, k)
    operand = Operand(block=block, hadamard=mode)
    values = fake_quantise(x, operand, seed=3)
    assert values.shape == x.shape
    packed = quantise(x, operand, seed=3)
    assert torch.equal(bits(packed.dequantise(seed=3)), bits(values))
    padded = torch.nn.functional.pad(x, (0, -k % 32))
    signs = None
    if mode == "signed":
        signs = random_signs(Draw(3), padded.shape[1], x.device)
    expected = rotate_back(fake_quantise(rotate(padded, signs), Operand(block=block)), signs)[:, :k]
    assert torch.equal(values, expected)


def test_hadamard_spreads_an_outlier() -> None:
    x = gaussian(64, 256)
    x[:, 5] += 20
    plain, rotated = (
        (fake_quantise(x, Operand(hadamard=mode))[:, 6:32] - x[:, 6:32]).square().mean() for mode in ("none", "plain")
    )
    assert rotated < 0.5 * plain


def test_products_do_not_need_both_operands_to_be_rotated() -> None:
    x, w = gaussian(32, 256), gaussian(48, 256, seed=1)
    exact = x @ w.T
    for left, right in (("plain", "none"), ("plain", "plain"), ("signed", "plain")):
        product = fake_quantise(x, Operand(hadamard=left), seed=1) @ fake_quantise(w, Operand(hadamard=right), seed=2).T
        assert (product - exact).square().sum() < 0.05 * exact.square().sum()


def test_a_nan_in_a_rotated_tensor_spoils_its_32_elements_and_is_reported_at_its_own_place() -> None:
    x = gaussian(2, 96)
    x[1, 40] = torch.nan
    operand = Operand(block=16, hadamard="plain")
    assert torch.equal(
        fake_quantise(x, operand, nonfinite="propagate").isnan(),
        (torch.arange(2)[:, None] == 1) & (torch.arange(96) // 32 == 1),
    )
    with pytest.raises(ValueError, match=r"at position \(1, 40\)"):
        fake_quantise(x, operand)


def test_mean_removal_quantises_the_rest_and_adds_the_mean_back() -> None:
    mean = 8 * gaussian(200)
    x = gaussian(64, 200, seed=1) + mean
    frozen = Frozen(mean=mean)
    values = fake_quantise(x, Operand(mean=True), frozen=frozen)
    assert torch.equal(values, fake_quantise(x - mean, Operand()) + mean)
    assert torch.equal(values, quantise(x, Operand(mean=True), frozen=frozen).dequantise(frozen=frozen))
    # What tells tokens apart is the centred part: it is kept far better.
    with_mean, without = ((v - x).square().sum() for v in (values, fake_quantise(x, Operand())))
    assert with_mean < 0.1 * without
    with pytest.raises(ValueError, match=r"frozen mean of shape \(200,\), but none was given"):
        fake_quantise(x, Operand(mean=True))
    with pytest.raises(ValueError, match=r"but it has shape \(100,\)"):
        fake_quantise(x, Operand(mean=True), frozen=Frozen(mean=mean[:100]))


def test_flagged_fallback_gives_a_residual_to_tiles_above_the_threshold_only() -> None:
    x = gaussian(40, 512)
    operand = Operand(fallback=Fallback(1.0, fraction=0.25))
    flagged = (tile_maxima(x) > 3.0).repeat_interleave(128, -1)
    assert 0.1 < flagged.float().mean() < 0.9
    values = fake_quantise(x, operand, frozen=Frozen(threshold=3.0))
    expected = torch.where(flagged, fake_quantise(x, Operand(fallback=Fallback(1.0))), fake_quantise(x, Operand()))
    assert torch.equal(values, expected)
    packed = quantise(x, operand, frozen=Frozen(threshold=3.0))
    assert torch.equal(packed.dequantise(), values)
    assert flagged_fraction(packed) == pytest.approx(flagged.float().mean().item())
    with pytest.raises(ValueError, match="flags tiles by a threshold"):
        fake_quantise(x, operand)
    with pytest.raises(ValueError, match="not by both"):
        fake_quantise(x, operand, frozen=Frozen(threshold=3.0, tiles=torch.tensor([1])))


def test_listed_tiles_get_a_residual_in_every_row_and_hold_the_channels_with_outliers() -> None:
    x, operand = gaussian(40, 1000), Operand(fallback=Fallback(1.0, fraction=0.25))
    x[:, 300], x[:, 990] = 30.0, -20.0
    tiles = choose_tiles(tile_maxima(x), 0.25)
    assert tiles.tolist() == [2, 7]
    values = fake_quantise(x, operand, frozen=Frozen(tiles=tiles))
    flagged = torch.isin(torch.arange(1000) // 128, tiles)
    expected = torch.where(flagged, fake_quantise(x, Operand(fallback=Fallback(1.0))), fake_quantise(x, Operand()))
    assert torch.equal(values, expected)


def test_the_threshold_controller_holds_the_flagged_share_while_the_data_drift() -> None:
    controller = ThresholdController(fraction=0.2)
    shares = [controller.update(tile_maxima(gaussian(128, 1024, seed=s) * math.exp(0.02 * s))) for s in range(60)]
    assert shares[0] == pytest.approx(0.2, abs=0.01)
    assert sum(shares[20:]) / 40 == pytest.approx(0.2, abs=0.05)
    settled = ThresholdController(fraction=0.2, threshold=1.0)  # starts far too low: everything is flagged
    shares = [settled.update(tile_maxima(gaussian(128, 1024, seed=s))) for s in range(40)]
    assert shares[0] == 1.0
    assert sum(shares[-10:]) / 10 == pytest.approx(0.2, abs=0.02)
    with pytest.raises(ValueError, match="at least one tile"):
        settled.update(torch.empty(0))
