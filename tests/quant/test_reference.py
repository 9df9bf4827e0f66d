"""quantise and fake_quantise: agreement with an independent table look-up, invariances, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxdist.quant.format import E2M1_VALUES, e8m0_decode
from mxdist.quant.recipe import PRESETS, Fallback, Macro, Operand, ScaleRule, get_recipe
from mxdist.quant.reference import fake_quantise, quantise
from tests.quant.strategies import bits, operands, tensors


def table_round(x: Tensor, scale: Tensor) -> Tensor:
    """Nearest grid point by comparing the distances to all eight, in float64; ties to the even code."""
    grid = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    ratio = (x.double() / scale.double()).abs().unsqueeze(-1)
    distance = (ratio - grid).abs()
    odd = torch.arange(8) % 2
    nearest = (distance + odd * 1e-300).eq(distance.amin(-1, keepdim=True))
    tied = distance.eq(distance.amin(-1, keepdim=True))
    choice = torch.where(tied.sum(-1) > 1, (tied & (odd == 0)).int().argmax(-1), nearest.int().argmax(-1))
    return (grid[choice] * x.sign() * scale).float() + 0.0


@given(tensors(), st.sampled_from((16, 32)), st.sampled_from((ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN)))
def test_values_are_the_nearest_grid_points_of_their_block_scales(x: Tensor, block: int, rule: ScaleRule) -> None:
    q = quantise(x, Operand(block=block, scale_rule=rule))
    scale = e8m0_decode(q.scales).repeat_interleave(block, -1)[..., : x.shape[-1]]
    assert torch.equal(bits(q.dequantise()), bits(table_round(x, scale)))


@given(tensors(), operands())
def test_fake_quantising_is_quantising_and_dequantising_bit_for_bit(x: Tensor, operand: Operand) -> None:
    packed = quantise(x, operand)
    assert torch.equal(bits(fake_quantise(x, operand)), bits(packed.dequantise()))


@given(tensors(), operands())
def test_the_fast_rounding_gives_the_bytes_of_the_plain_one(x: Tensor, operand: Operand) -> None:
    fast, plain = quantise(x, operand).parts(), quantise(x, operand, plain=True).parts()
    assert fast.keys() == plain.keys()
    assert all(torch.equal(fast[key], plain[key]) for key in fast)


@given(tensors(max_rows=4), operands(), st.data())
def test_rows_do_not_influence_one_another(x: Tensor, operand: Operand, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, x.shape[0] - 1))
    assert torch.equal(fake_quantise(x, operand)[row], fake_quantise(x[row], operand))


@given(tensors(), operands(), st.integers(1, 130))
def test_zeros_appended_to_the_last_axis_change_nothing_and_leave_no_trace(
    x: Tensor, operand: Operand, extra: int
) -> None:
    longer = torch.cat((x, torch.zeros(x.shape[0], extra)), -1)
    values = fake_quantise(longer, operand)
    assert torch.equal(values[:, : x.shape[1]], fake_quantise(x, operand))
    assert not values[:, x.shape[1] :].any()


@given(tensors(), operands())
def test_no_value_is_minus_zero(x: Tensor, operand: Operand) -> None:
    values = fake_quantise(x, operand)
    assert not ((values == 0) & torch.signbit(values)).any()


@given(tensors(max_k=400), st.sampled_from((16, 32)))
def test_scale_codes_of_a_tile_span_at_most_fourteen_binades(x: Tensor, block: int) -> None:
    scales = quantise(x, Operand(block=block)).scales.int()
    for tile in scales.split(128 // block, dim=-1):
        assert (tile.amax(-1) - tile.amin(-1)).max() <= 14


def test_a_block_of_zeros_takes_the_largest_code_of_its_tile() -> None:
    x = torch.zeros(1, 256)
    x[0, 0], x[0, 96] = 6.0, 6.0 * 2**-20
    assert quantise(x, Operand()).scales.tolist() == [[127, 127, 127, 113, 1, 1, 1, 1]]


@given(tensors())
def test_under_the_ceil_rule_nothing_saturates(x: Tensor) -> None:
    x = x.clamp(-(2.0**126), 2.0**126)
    q = quantise(x, Operand())
    scale = e8m0_decode(q.scales).repeat_interleave(32, -1)[..., : x.shape[-1]]
    assert (x.abs() <= 6 * scale).all()


@given(tensors())
def test_static_macro_scaling_puts_each_macro_maximum_at_the_top_of_its_grid(x: Tensor) -> None:
    x = torch.where(x.abs() < 1e-11, 0.0, x).clamp(-1e37, 1e37)
    q = quantise(x, Operand(macro=Macro(128, "static")))
    assert q.macro is not None
    for index, macro_block in enumerate(x.split(128, dim=-1)):
        top = macro_block.abs().amax(-1)
        scaled = top * (1 + q.macro[:, index] / 256)
        scale = e8m0_decode(q.scales[:, 4 * index : 4 * index + 4]).amax(-1)
        ratio = (scaled / scale)[top > 0]
        assert (ratio <= 6).all()
        assert (ratio >= 6 / (1 + 1 / 256) * (1 - 2**-22)).all()  # delta of the maximum's block <= .0056 binades


def test_searched_factors_are_the_best_of_sixteen() -> None:
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    q = quantise(x, Operand(macro=Macro(128, "search", 4)))
    errors = []
    for byte in range(0, 256, 16):
        f = 1 + byte / 256
        errors.append(((fake_quantise(x * f, Operand()) / f - x) ** 2).view(8, 2, 128).sum(-1))
    assert torch.equal(q.macro, (torch.stack(errors).argmin(0) * 16).to(torch.uint8))


def test_the_first_of_equally_good_factors_wins() -> None:
    x = torch.zeros(1, 128)
    x[0, 0] = 4.0  # exact with f = 1, and with f = 1.5
    assert quantise(x, Operand(macro=Macro(method="search", bits=4))).macro.item() == 0


@pytest.mark.parametrize("method", ["static", "search"])
def test_macro_blocks_near_the_end_of_float32_keep_the_factor_one(method: str) -> None:
    x = torch.full((1, 128), 2.0**127)
    x[0, 1] = 1.6 * 2.0**127  # times the factor it would get it is infinite
    operand = Operand(macro=Macro(method=method, bits=4))
    assert quantise(x, operand).macro.item() == 0
    assert torch.equal(fake_quantise(x, operand), fake_quantise(x, Operand()))


def test_the_fallback_adds_alpha_times_the_quantised_residual() -> None:
    x = torch.randn(16, 320, generator=torch.Generator().manual_seed(1))
    first = fake_quantise(x, Operand())
    for alpha in (0.0, 0.25, 0.5, 1.0):
        expected = first + alpha * fake_quantise(x - first, Operand())
        assert torch.equal(fake_quantise(x, Operand(fallback=Fallback(alpha))), expected)


def test_macro_scaling_and_fallback_share_one_factor() -> None:
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(2))
    operand = Operand(macro=Macro(), fallback=Fallback(0.5))
    f = (1 + quantise(x, operand).macro / 256).repeat_interleave(128, -1)
    z1 = fake_quantise(f * x, Operand())
    z2 = fake_quantise(f * x - z1, Operand())
    assert torch.equal(fake_quantise(x, operand), (z1 + 0.5 * z2) * (1 / f))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,), (2, 0, 96), (1,), (2, 3, 5, 33)])
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "bf16"])
def test_every_shape_keeps_its_shape(shape: tuple[int, ...], name: str) -> None:
    operand = get_recipe(name).w
    x = torch.ones(shape)
    assert fake_quantise(x, operand).shape == shape
    assert torch.equal(quantise(x, operand).dequantise(), fake_quantise(x, operand))


def test_tensors_larger_than_a_chunk_are_quantised_like_their_rows() -> None:
    x = torch.randn(700, 384, generator=torch.Generator().manual_seed(3))
    operand = get_recipe("mxfp4_mbs_of").x_fwd
    assert torch.equal(fake_quantise(x, operand), torch.stack([fake_quantise(row, operand) for row in x]))


def test_bfloat16_and_strided_input_are_read_by_value() -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(4))
    assert torch.equal(fake_quantise(x.bfloat16(), Operand()), fake_quantise(x.bfloat16().float(), Operand()))
    assert torch.equal(fake_quantise(x.t(), Operand()), fake_quantise(x.t().contiguous(), Operand()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_reported_with_name_and_first_position(value: float) -> None:
    x = torch.ones(4, 70)
    x[2, 65] = x[3, 1] = value
    for function in (quantise, fake_quantise):
        with pytest.raises(ValueError, match=rf"layers.0.w of shape \(4, 70\) holds {value} at position \(2, 65\)"):
            function(x, Operand(), name="layers.0.w")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@given(operand=operands())
def test_propagated_nan_and_inf_spoil_their_block_and_nothing_else(value: float, operand: Operand) -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(5))
    x[1, 65] = value
    values = fake_quantise(x, operand, nonfinite="propagate")
    assert torch.equal(bits(values), bits(quantise(x, operand, nonfinite="propagate").dequantise()))
    first = 65 // operand.block * operand.block
    spoiled = torch.zeros(3, 200, dtype=torch.bool)
    spoiled[1, first : first + operand.block] = True
    assert torch.equal(values.isnan(), spoiled)
    clean = torch.where(spoiled, 0.0, x)
    assert torch.equal(values[~spoiled], fake_quantise(clean, operand)[~spoiled])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_integer_and_complex_tensors_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"tokens has dtype .* only real floating-point"):
        quantise(torch.ones(4, 32, dtype=dtype), Operand(), name="tokens")
    with pytest.raises(ValueError, match="scalar"):
        fake_quantise(torch.tensor(1.0), Operand())
