"""Payloads: arrays read without a copy, exact round trips, checksums of what the learner computes with."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxdist.errors import ParityError
from mxdist.messages import WeightPayload
from mxdist.quant.checksum import checksum
from mxdist.quant.recipe import get_recipe
from mxdist.quant.reference import quantise
from mxdist.quant.tensor import MXTensor
from mxdist.sync.payload import as_tensor, learner_checksums, refuse_repeats
from tests.sync.entries import as_array, dense_entry, mx_entry, payload_of

RECIPES = ["mxfp4", "mxfp4_mbs", "mxfp4_of", "mxfp4_mbs_of"]


def payload(*entries: object) -> WeightPayload:
    return payload_of(1, get_recipe("mxfp4").to_dict(), entries)  # type: ignore[arg-type]


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), st.integers(0, 2**31), st.integers(1, 70))
def test_tensors_hold_the_arrays_bits(dtype: torch.dtype, seed: int, size: int) -> None:
    raw = torch.randint(0, 256, (3, size * 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    tensor = raw.view(dtype)
    array = as_array(tensor)
    assert as_tensor(array).dtype == dtype
    assert torch.equal(as_tensor(array).view(torch.uint8), raw)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_nothing_is_copied_on_the_way_back(dtype: type) -> None:
    array = np.ones((8, 32), dtype)
    tensor = as_tensor(array)
    array[2, 0] = 0
    assert tensor[2, 0] == 0


def test_read_only_arrays_as_ray_delivers_them_are_read_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    array = np.arange(8, dtype=np.float32)
    array.setflags(write=False)
    assert as_tensor(array).sum() == 28
    assert not recwarn.list


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_row_range_arrives_as_the_values_the_learner_multiplies(recipe: str, dtype: torch.dtype) -> None:
    operand = get_recipe(recipe).w
    whole = quantise(torch.randn(24, 96, generator=torch.Generator().manual_seed(0)), operand)
    values = whole.dequantise(dtype)
    entry = mx_entry("k_proj.weight", whole[8:16], values[8:16])
    parts = {part: as_tensor(array) for part, array in entry.parts.items()}
    arrived = MXTensor.from_parts(parts, entry.shape, operand).dequantise(dtype)
    assert torch.equal(arrived, values[8:16])
    sums = {part: checksum(tensor, unit=4 if "codes" in part else 1) for part, tensor in parts.items()}
    assert entry.checksums == sums | {"values": checksum(arrived.float(), unit=4)}


def test_ranks_are_joined_and_a_tensor_of_two_ranks_is_refused() -> None:
    first, second = dense_entry("a.weight", torch.ones(3)), dense_entry("b.weight", torch.zeros(3))
    sums = learner_checksums([payload(first), payload(second)])
    assert sums == {"a.weight": first.checksums, "b.weight": second.checksums}
    refuse_repeats([payload(second).manifest, payload(first).manifest])
    with pytest.raises(ParityError, match=r"a.weight twice"):
        refuse_repeats([payload(first).manifest, payload(first).manifest])
