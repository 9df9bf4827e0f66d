"""Which kernel multiplies, by recipe, rows and device; products with bytes alone; what they take. No vLLM, no GPU."""

import pytest
import torch

from mxdist.quant.kernels.options import TILE_ROWS
from mxdist.quant.linear import mx_linear
from mxdist.quant.recipe import Operand, Recipe, get_recipe
from mxdist.quant.reference import quantise
from mxdist.rollout.live_weight import LiveWeight, keeps_values
from mxdist.rollout.products import (
    GRAPH_TOKENS,
    Abilities,
    Product,
    abilities,
    choose,
    graph_sizes,
    linear,
    live_values,
)

HOPPER, AMPERE, NEITHER = Abilities(True, True), Abilities(True, False), Abilities(False, False)
SHAPE = (2560, 2048)


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4_mbs", "mxfp4_of", "mxfp4_mbs_of"])
def test_few_rows_are_multiplied_with_the_bytes_as_they_are(recipe: str) -> None:
    for rows in (1, 32, 64):
        assert choose(get_recipe(recipe), SHAPE, rows, HOPPER) is Product.DECODE
        assert choose(get_recipe(recipe), SHAPE, rows, AMPERE) is Product.DECODE
    assert choose(get_recipe(recipe), SHAPE, 65, AMPERE) is not Product.DECODE
    in_tiles = recipe in ("mxfp4", "mxfp4_mbs")  # FP8 from nibbles, of weights and rows that are one term
    for rows in (65, TILE_ROWS):
        assert (choose(get_recipe(recipe), SHAPE, rows, HOPPER) is Product.DECODE) == in_tiles
    assert choose(get_recipe(recipe), SHAPE, TILE_ROWS + 1, HOPPER) is not Product.DECODE
    assert choose(get_recipe(recipe), SHAPE, 65, HOPPER, torch.float32) is not Product.DECODE


def test_many_rows_run_in_fp8_where_device_and_operands_allow() -> None:
    for recipe in ("mxfp4", "mxfp4_mbs", "mxfp4_g4"):
        assert choose(get_recipe(recipe), SHAPE, 4096, HOPPER) is Product.FP8
        assert choose(get_recipe(recipe), SHAPE, 4096, AMPERE) is Product.EXPANDED
    assert choose(get_recipe("mxfp4_of"), SHAPE, 4096, HOPPER) is Product.EXPANDED  # two terms fit no byte
    assert choose(get_recipe("mxfp4"), (2050, 2048), 4096, HOPPER) is Product.EXPANDED  # FP8 wants multiples of 16


def test_without_kernels_bytes_become_values() -> None:
    for rows in (1, 4096):
        assert choose(get_recipe("mxfp4"), SHAPE, rows, NEITHER) is Product.EXPANDED
        rotated = Recipe("rotated", x_fwd=Operand(), w=Operand(hadamard="plain"))
        assert choose(rotated, SHAPE, rows, HOPPER) is Product.EXPANDED


def test_a_cpu_keeps_values_and_has_no_kernels() -> None:
    assert keeps_values(torch.device("cpu"))
    assert not keeps_values(torch.device("cuda"))
    assert abilities(torch.device("cpu")) == NEITHER


@pytest.mark.parametrize("most", [1, 3, 8, 100, 256, 512, 4096])
def test_every_batch_up_to_the_largest_graph_has_one_that_is_little_larger(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(most, GRAPH_TOKENS)
    assert len(sizes) <= 25  # each takes time and memory when an engine starts
    for batch in range(1, sizes[-1] + 1):
        taken = next(size for size in sizes if size >= batch)
        assert taken - batch <= max(7, batch // 4)


def filled(recipe: Recipe, rows: int, columns: int, dtype: torch.dtype) -> LiveWeight:
    weight = LiveWeight(rows, columns, recipe.w, dtype)
    assert recipe.w is not None
    packed = quantise(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), recipe.w)
    for part, live in weight.parts().items():
        live.copy_(packed.parts()[part])
    weight.refresh()
    return weight


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4_mbs", "mxfp4_mbs_of"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_a_linear_whose_bytes_alone_are_kept_gives_the_same_bits(recipe: str, dtype: torch.dtype, rows: int) -> None:
    chosen = get_recipe(recipe)
    weight, bias = filled(chosen, 48, 224, dtype), torch.randn(48).to(dtype)
    x = torch.randn(2, rows, 224, generator=torch.Generator().manual_seed(1)).to(dtype)
    values = weight.values
    assert values is not None
    before = linear(x, weight, chosen, bias, "linear")
    assert torch.equal(before, mx_linear(x, values, values, chosen, bias))
    weight.drop_values()
    assert torch.equal(linear(x, weight, chosen, bias, "linear"), before)
    assert torch.equal(live_values(weight, slice(5, 9)), values[5:9])


@pytest.mark.parametrize(("recipe", "most"), [("mxfp4", 0.54), ("mxfp4_mbs", 0.56)])
def test_packed_weights_take_little_more_than_half_a_byte_an_element(recipe: str, most: float) -> None:
    weight = filled(get_recipe(recipe), 256, 2048, torch.bfloat16)
    weight.drop_values()
    assert sum(part.nbytes for part in weight.buffers()) / (256 * 2048) <= most
