"""MXFP4 in E4M3 tiles: exact while block codes span at most 14 binades, and for whatever the quantiser writes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxdist.quant.e4m3 import to_e4m3
from mxdist.quant.format import E2M1_VALUES, TILE
from mxdist.quant.recipe import Fallback, Macro, Operand
from mxdist.quant.reference import quantise
from mxdist.quant.tensor import MXTensor
from tests.quant.strategies import tensors


def decoded(mx: MXTensor) -> Tensor:
    stored, scales = to_e4m3(mx)
    return stored.float() * scales.repeat_interleave(TILE, -1)


def tile_with_spread(spread: int, top: int = 140) -> MXTensor:
    """One tile: a block of all 16 codes at the tile's top exponent, the other blocks all 16 codes `spread` below."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(8)
    packed = codes[0::2] | codes[1::2] << 4
    scales = torch.tensor([[top, top - spread, top - spread, top - spread]], dtype=torch.uint8)
    return MXTensor.from_parts({"codes": packed.view(1, 64), "scales": scales}, (1, 128), Operand())


@pytest.mark.parametrize("spread", range(15))
def test_all_sixteen_codes_are_exact_up_to_a_spread_of_14(spread: int) -> None:
    mx = tile_with_spread(spread)
    assert torch.equal(decoded(mx), mx.dequantise())


@pytest.mark.parametrize("spread", range(15, 25))
def test_beyond_14_the_loss_is_counted_zeros_stay_zero_and_errors_stay_small(spread: int) -> None:
    mx = tile_with_spread(spread)
    exact, approximate = mx.dequantise(), decoded(mx)
    lost = exact != approximate
    assert not lost[:, :32].any()
    # Multiples of the smallest subnormal number survive; each magnitude occurs four times in each of three blocks.
    assert lost.sum() == 3 * 4 * sum(value * 2.0 ** (15 - spread) % 1 > 0 for value in E2M1_VALUES)
    assert not approximate[exact == 0].any()  # a known converter turns these into +-448
    assert (approximate - exact).abs().max() <= exact.abs().max() * 2.0**-10 / 384
    assert (approximate.sign() * exact.sign() >= 0).all()


@given(tensors(max_k=400), st.sampled_from((16, 32)), st.sampled_from((None, Macro(), Macro(method="folded"))))
def test_whatever_the_quantiser_writes_is_exact_in_e4m3(x: Tensor, block: int, macro: Macro | None) -> None:
    mx = quantise(x, Operand(block=block, macro=macro))
    scale_is_normal = (mx.scales >= 8).all()  # below, tile scale times macro factor is a subnormal float32
    if macro is None or scale_is_normal:
        values = decoded(mx)
        assert torch.equal(values[:, : x.shape[1]], mx.dequantise())
        assert not values[:, x.shape[1] :].any()


def test_folded_factors_fit_the_byte_itself() -> None:
    mx = quantise(torch.randn(4, 256), Operand(macro=Macro(method="folded")))
    values = mx.dequantise() * 2.0**-2
    assert torch.equal(values.to(torch.float8_e4m3fn).float(), values)


def test_tensors_that_do_not_fit_one_byte_are_refused() -> None:
    x = torch.ones(2, 128)
    with pytest.raises(ValueError, match="outlier fallback does not fit"):
        to_e4m3(quantise(x, Operand(fallback=Fallback())))
    with pytest.raises(ValueError, match="one scale for 128 elements"):
        to_e4m3(quantise(x, Operand(macro=Macro(64))))
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN blocks"):
        to_e4m3(quantise(x, Operand(), nonfinite="propagate"))
