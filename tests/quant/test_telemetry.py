"""Codes changed, flagged blocks, router flips."""

import pytest
import torch

from mxdist.quant.recipe import Fallback, Operand
from mxdist.quant.reference import quantise
from mxdist.quant.telemetry import codes_changed, flagged_fraction, router_flip_rate


def test_only_elements_whose_quantised_value_changed_are_counted() -> None:
    x = torch.tensor([[6.0, 0.0, *[1.0] * 30, 6.0, *[2.0] * 31]])
    before = quantise(x, Operand())
    assert codes_changed(before, before) == 0.0
    nudged = x.clone()
    nudged[0, 2] = 1.1  # still rounds to 1
    nudged[0, 3] = 1.4  # becomes 1.5
    assert codes_changed(before, quantise(nudged, Operand())) == 1 / 64
    doubled = x.clone()
    doubled[0, :32] *= 2  # same codes, another scale: all of the block but its zero
    assert codes_changed(before, quantise(doubled, Operand())) == 31 / 64
    with pytest.raises(ValueError, match="cannot be compared"):
        codes_changed(before, quantise(x[:, :32], Operand()))


def test_padding_does_not_count_as_unchanged() -> None:
    before, after = quantise(torch.full((1, 40), 3.0), Operand()), quantise(torch.full((1, 40), 5.9), Operand())
    assert codes_changed(before, after) == 1.0


def test_small_updates_reach_few_codes() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    moved = w + 1e-6 * torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).sign()
    assert 0 < codes_changed(quantise(w, Operand()), quantise(moved, Operand())) < 0.005


def test_fractions_of_flagged_and_nan_blocks() -> None:
    x = torch.ones(2, 64)
    assert flagged_fraction(quantise(x, Operand())) == 0.0
    assert flagged_fraction(quantise(x, Operand(fallback=Fallback()))) == 1.0


def test_router_flips_count_replaced_experts_whatever_their_order() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    quantised = torch.tensor([[3.0, 4.0, 2.0, 1.0], [4.0, 1.0, 2.0, 3.0]])  # order swapped; one expert replaced
    assert router_flip_rate(logits, quantised, top_k=2) == 0.25
    with pytest.raises(ValueError, match="top 5"):
        router_flip_rate(logits, quantised, top_k=5)
