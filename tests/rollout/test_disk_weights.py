"""Live weights filled as vLLM's loader does it, without vLLM: whole or refused."""

import pytest
import torch
from torch import nn

from mxdist.quant.recipe import get_recipe
from mxdist.quant.reference import quantise
from mxdist.rollout.disk_weights import DiskWeight, rows_of_experts, rows_of_splits, whole_rows
from mxdist.rollout.live_weight import LiveWeight

OPERAND = get_recipe("mxfp4_mbs_of").w


def test_fused_linears_come_together_from_their_parts_and_nothing_less_is_used() -> None:
    assert OPERAND is not None
    splits = (32, 8, 8)
    packed = quantise(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), OPERAND)
    layer, live = nn.Module(), LiveWeight(48, 64, OPERAND, torch.float32)
    disk = DiskWeight(layer, live, rows_of_splits(splits), 48)
    assert set(dict(layer.named_parameters())) == set(packed.parts())
    for shard, rows in (("q", slice(0, 32)), ("v", slice(40, 48)), ("k", slice(32, 40))):
        for part, tensor in packed.parts().items():
            with pytest.raises(ValueError, match=r"of the 48 rows of layers\.0\.qkv_proj, part .*export it again"):
                disk.finish("layers.0.qkv_proj")
            parameter = layer.get_parameter(part)
            parameter.weight_loader(parameter, tensor[rows], shard)
    disk.finish("layers.0.qkv_proj")
    assert torch.equal(live.values, packed.dequantise())


def test_experts_are_placed_by_number_and_part() -> None:
    layer, live = nn.Module(), LiveWeight(3 * 2 * 4, 32, None, torch.float32)
    disk = DiskWeight(layer, live, rows_of_experts(4, ("w1", "w3")), 24, "w13_")
    values = torch.arange(24.0).unsqueeze(1).expand(24, 32)
    for expert in (2, 0, 1):
        for index, shard in enumerate(("w1", "w3")):
            start = (2 * expert + index) * 4
            layer.w13_weight.weight_loader(  # type: ignore[operator]
                param=layer.w13_weight,
                loaded_weight=values[start : start + 4],
                weight_name="w13_weight",
                shard_id=shard,
                expert_id=expert,
                return_success=True,
            )
    disk.finish("experts")
    assert torch.equal(live.values, values)


def test_an_embedding_is_filled_from_the_top_and_another_width_is_refused() -> None:
    layer, live = nn.Module(), LiveWeight(64, 32, None, torch.float32)
    disk = DiskWeight(layer, live, whole_rows, 40)
    with pytest.raises(ValueError, match=r"part values is \(40, 16\) in the checkpoint, not \(40, 32\)"):
        layer.weight.weight_loader(layer.weight, torch.ones(40, 16))  # type: ignore[operator]
    layer.weight.weight_loader(layer.weight, torch.ones(40, 32))  # type: ignore[operator]
    disk.finish("embedding")
    assert live.values.sum() == 40 * 32
