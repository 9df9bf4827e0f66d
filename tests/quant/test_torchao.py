"""torchao's MX quantiser as an independent oracle, for the scale rules that both implement."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxdist.quant.format import e2m1_encode, unpack_nibbles
from mxdist.quant.recipe import Operand, ScaleRule
from mxdist.quant.reference import quantise
from tests.quant.strategies import tensors

mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")

RULES = {
    ScaleRule.FLOOR: mx_tensor.ScaleCalculationMode.FLOOR,
    ScaleRule.EVEN: mx_tensor.ScaleCalculationMode.EVEN,
    ScaleRule.CEIL: mx_tensor.ScaleCalculationMode.RCEIL,  # torchao's CEIL is ceil(log2 m) - 2, another rule
}


def torchao_quantise(x: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """Codes 0..15 [rows, K] and E8M0 codes [rows, K / 32] by torchao, with minus zero as code 0."""
    scales, packed = mx_tensor.to_mx(x, torch.float4_e2m1fn_x2, 32, RULES[rule])
    codes = unpack_nibbles(packed.view(torch.uint8))
    return torch.where(codes == 8, 0, codes), scales.view(torch.uint8)


@given(tensors(max_k=300), st.sampled_from(list(RULES)))
def test_codes_and_scales_are_torchaos(x: Tensor, rule: ScaleRule) -> None:
    """Compared where the rules coincide: blocks not all zero, exponents in range, tile span at most 14."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 32))
    x = torch.where(x.abs() < 2.0**-120, 0.0, x).clamp(-(2.0**120), 2.0**120)
    codes, scales = torchao_quantise(x, rule)
    ours = quantise(x, Operand(scale_rule=rule))
    alive = x.unflatten(1, (-1, 32)).abs().amax(-1) > 0
    raised = ours.scales.int() > scales.int()  # by the E4M3 clamp
    compared = alive & ~raised
    assert torch.equal(ours.scales[compared], scales[compared])
    same = unpack_nibbles(ours.codes) == codes
    assert same.unflatten(1, (-1, 32))[compared].all()
    for tile_scales, tile_raised in zip(scales.int().split(4, -1), (raised & alive).split(4, -1), strict=True):
        assert (~tile_raised | (tile_scales < tile_scales.amax(-1, keepdim=True) - 14)).all()


def test_the_comparison_covers_every_code_and_rule() -> None:
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    for rule in RULES:
        codes, scales = torchao_quantise(x, rule)
        ours = quantise(x, Operand(scale_rule=rule))
        assert torch.equal(unpack_nibbles(ours.codes), codes)
        assert torch.equal(ours.scales, scales)
        assert codes.unique().numel() == 15


def test_torchao_decodes_our_bytes_to_our_values() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    ours = quantise(x, Operand())
    scales = ours.scales.view(torch.float8_e8m0fnu)
    values = mx_tensor.to_dtype(ours.codes, scales, torch.float4_e2m1fn_x2, 32, torch.float32)
    assert torch.equal(values, ours.dequantise())
    assert torch.equal(e2m1_encode(torch.tensor([0.5, 6.0])), torch.tensor([1, 7], dtype=torch.uint8))
