"""Which tensors are quantised, what they are called, and how they are cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxdist.decomposition.pieces import portions, regions, size_of
from mxdist.decomposition.selection import Linear, contraction_axis, place_of, reason_to_leave, select
from mxdist.decomposition.source import StoredTensor
from mxdist.errors import UserError


def stored(name: str, *shape: int, dtype: str = "BF16") -> StoredTensor:
    return StoredTensor(name, shape or (64, 64), dtype, "file")


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "q_proj"),
        ("model.layers.11.mlp.down_proj.weight", 11, "down_proj"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", 0, "experts.up_proj"),
        ("model.language_model.layers.5.mlp.experts.gate_up_proj", 5, "experts.gate_up_proj"),
        ("model.layers.2.mlp.shared_expert.gate_proj.weight", 2, "shared_expert.gate_proj"),
        ("model.layers.1.block_sparse_moe.experts.0.w2.weight", 1, "experts.w2"),
        ("model.layers.0.linear_attn.in_proj_qkvz.weight", 0, "linear_attn.in_proj_qkvz"),
        ("transformer.h.4.attn.c_attn.weight", 4, "c_attn"),
    ],
)
def test_linears_of_decoder_layers_are_quantised(name: str, layer: int, kind: str) -> None:
    assert reason_to_leave(stored(name)) is None
    assert place_of(name) == (layer, kind)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (stored("model.embed_tokens.weight"), "embedding"),
        (stored("lm_head.weight"), "output head"),
        (stored("model.norm.weight", 64), "norm"),
        (stored("model.layers.0.input_layernorm.weight", 64), "norm"),
        (stored("model.layers.0.self_attn.q_proj.bias", 64), "bias"),
        (stored("model.layers.0.mlp.experts.gate_up_proj_bias", 4, 64), "bias"),
        (stored("model.layers.0.mlp.gate.weight"), "router"),
        (stored("model.layers.0.mlp.shared_expert_gate.weight", 1, 64), "router"),
        (stored("model.layers.0.linear_attn.conv1d.weight", 64, 1, 4), "convolution"),
        (stored("model.layers.0.linear_attn.A_log", 64), "vector"),
        (stored("model.layers.0.mlp.up_proj.weight", dtype="I8"), "integer"),
        (stored("model.layers.0.mlp.up_proj.weight", dtype="F8_E4M3"), "8-bit float"),
        (stored("model.layers.0.mlp.up_proj.weight_scale_inv", 2, 2), "scales of quantised weights"),
        (stored("model.layers.0.mlp.up_proj.weight", 0, 64), "empty"),
        (stored("visual.blocks.0.attn.qkv.weight"), "outside the decoder layers"),
        (stored("vision_tower.encoder.layers.0.self_attn.q_proj.weight"), "outside the decoder layers"),
    ],
)
def test_everything_else_is_left_with_a_reason(tensor: StoredTensor, reason: str) -> None:
    assert reason_to_leave(tensor) == reason


def test_the_shapes_of_stacked_experts_tell_their_contraction_axis() -> None:
    prefix, norm = "model.layers.0.mlp.experts", "model.layers.0.input_layernorm.weight"
    for hidden, width in ((64, 32), (64, 64), (32, 64)):
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}.gate_up_proj": (4, 2 * width, hidden),
            f"{prefix}.down_proj": (4, hidden, width),
        }
        turned = {name: (size[0], size[2], size[1]) for name, size in shapes.items()}
        for name in shapes:
            assert contraction_axis(stored(name, *shapes[name]), shapes) == -1
            assert contraction_axis(stored(name, *turned[name]), turned) == -2
    for name, size in ((f"{prefix}.up_proj", (4, 32, 64)), (f"{prefix}.down_proj", (4, 64, 32))):
        assert contraction_axis(stored(name, *size), {norm: (64,)}) == -1
        assert contraction_axis(stored(name, size[0], size[2], size[1]), {norm: (64,)}) == -2


def test_globs_choose_among_the_linears() -> None:
    names = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(3) for kind in ("up", "down")]
    tensors = [stored(name) for name in names]
    chosen, left = select(tensors, only=["*.layers.[12].*"], skip=["*.2.*.up_proj.*"])
    assert [linear.tensor.name for linear in chosen] == [names[2], names[3], names[5]]
    assert [(entry.tensor.name, entry.reason) for entry in left] == [
        (names[0], "not in --only"),
        (names[1], "not in --only"),
        (names[4], "in --skip"),
    ]
    with pytest.raises(UserError, match=r"'\*q_porj\*' matches no tensor .* names are like model.layers.0.mlp.up_proj"):
        select(tensors, skip=["*q_porj*"])
    with pytest.raises(UserError, match="leave no tensor"):
        select(tensors, skip=["*"])
    with pytest.raises(UserError, match=r"among 1 tensors, such as lm_head.weight"):
        select([stored("lm_head.weight")])
    with pytest.raises(UserError, match="its weights are packed MXFP4; give the run"):
        select([stored("model.layers.0.mlp.up_proj.codes", dtype="U8")])


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=2).flatmap(
        lambda rows: st.integers(1, 700).map(lambda columns: (*rows, columns))
    ),
    axis=st.sampled_from([-1, -2]),
    limit=st.integers(128, 2000),
)
def test_regions_cover_a_tensor_once_and_cut_rows_only_between_tiles(
    shape: tuple[int, ...], axis: int, limit: int
) -> None:
    count = torch.zeros(shape, dtype=torch.int32)
    for region in regions(shape, axis, limit):
        assert size_of(region) <= limit
        assert region[axis].start % 128 == 0
        count[region] += 1
    assert (count == 1).all()


def test_small_tensors_share_a_portion_and_large_ones_are_divided() -> None:
    def linear(name: str, rows: int, place: str) -> Linear:
        return Linear(StoredTensor(name, (rows, 128), "BF16", place), "up_proj", 0, -1)

    linears = [linear("a", 2, "1"), linear("b", 2, "1"), linear("c", 10, "1"), linear("d", 1, "2")]
    found = [
        (portion.place, [(one.tensor.name, region[0].start, region[0].stop) for one, region in portion.pieces])
        for portion in portions(linears, 4 * 128)
    ]
    assert found == [
        ("1", [("a", 0, 2), ("b", 0, 2)]),
        ("1", [("c", 0, 4)]),
        ("1", [("c", 4, 8)]),
        ("1", [("c", 8, 10)]),
        ("2", [("d", 0, 1)]),
    ]
