"""The shape of a Hugging Face checkpoint: read from its config.json, held against what the configuration says."""

import json
from pathlib import Path
from typing import Any

import pytest

from mxdist.config import Config, dump_config, load_config
from mxdist.config.hf_config import SUPPORTED
from mxdist.errors import UserError

QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
MOE = QWEN25 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "head_dim": 64,
    "norm_topk_prob": True,
}


def load(folder: Path, found: dict[str, Any], *settings: str) -> Config:
    (folder / "config.json").write_text(json.dumps(found))
    (folder / "run.yaml").write_text(f"model: {{path: {folder}}}\n")
    return load_config(folder / "run.yaml", ["learner.expert_parallel=1", *settings])


def test_the_shape_comes_from_the_checkpoint(tmp_path: Path) -> None:
    model = load(tmp_path, QWEN25).model
    assert (model.family, model.hidden_size, model.num_experts, model.head_dim) == ("qwen2", 128, 0, 32)
    assert (model.vocab_size, model.tie_word_embeddings, model.rope_theta) == (256, True, 1e6)


def test_experts_come_from_the_checkpoint_too(tmp_path: Path) -> None:
    model = load(tmp_path, MOE).model
    assert (model.family, model.num_experts, model.moe_intermediate_size, model.head_dim) == ("qwen3", 8, 64, 64)


def test_rope_theta_is_found_where_newer_transformers_write_it(tmp_path: Path) -> None:
    found = {key: value for key, value in QWEN25.items() if key != "rope_theta"}
    model = load(tmp_path, found | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}).model
    assert model.rope_theta == 5e5


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load(tmp_path, MOE)
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_a_key_that_contradicts_the_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.hidden_size=64 \(the command line\) is not what .* says \(128\)"):
        load(tmp_path, QWEN25, "model.hidden_size=64")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, f"not supported; supported are {', '.join(SUPPORTED)}"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "code of the checkpoint's own"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope of type yarn"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {}}, "quantised already .* give the checkpoint in BF16"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"architectures": "Qwen2ForCausalLM"}, "holds a value of the wrong kind .architectures is"),
        ({"rope_scaling": "yarn"}, r"config\.json holds a value of the wrong kind"),
        ({"num_attention_heads": 0}, r"config\.json holds a value of the wrong kind"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, QWEN25 | change)


def test_a_missing_key_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no hidden_size"):
        load(tmp_path, {key: value for key, value in QWEN25.items() if key != "hidden_size"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_config(tmp_path / "run.yaml")


def test_a_path_that_is_neither_directory_nor_hub_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tmp_path}/nowhere/}}\n")
    with pytest.raises(UserError, match="is no directory"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("learner.ranks=3", "learner.tensor_parallel=2"), r"does not divide learner\.ranks=3"),
        (("learner.ranks=4", "learner.tensor_parallel=4"), r"does not divide model\.num_key_value_heads=2"),
        (("learner.ranks=3", "learner.pipeline_parallel=3"), r"does not divide model\.num_hidden_layers=2"),
        (("learner.tensor_parallel=2", "recipe=mxfp4_mbs"), "inside a group of 128 that is quantised together"),
        (("learner.ranks=2", "learner.expert_parallel=2"), r"model\.num_experts is 0"),
        (("rollout.max_context=1024",), r"rollout\.max_context=1024 is beyond model\.max_position_embeddings=512"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path, settings: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, QWEN25, *settings)


def test_qwen2_heads_of_another_size_than_the_engine_builds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_attention_heads \* head_dim = .* and hidden_size=128; make them equal"):
        load(tmp_path, {**QWEN25, "head_dim": 64})


def test_tensor_parallel_fits_where_the_blocks_stay_whole(tmp_path: Path) -> None:
    assert load(tmp_path, QWEN25, "learner.tensor_parallel=2", "recipe=mxfp4").data_parallel == 1


def test_an_update_may_have_fewer_sequences_than_ranks(tmp_path: Path) -> None:
    uneven = ("learner.ranks=3", "algorithm.prompts_per_step=1", "algorithm.samples_per_prompt=2")
    assert load(tmp_path, QWEN25, *uneven).data_parallel == 3


@pytest.mark.parametrize(
    "change",
    [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}, {"attention_bias": True}],
    ids=lambda change: next(iter(change)),
)
def test_features_of_qwen3_that_cannot_be_built_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"uses {next(iter(change))}"):
        load(tmp_path, MOE | change)


def test_experts_are_counted_and_weighted_as_the_checkpoint_says(tmp_path: Path) -> None:
    newer = {key: value for key, value in MOE.items() if key not in ("num_experts", "norm_topk_prob")}
    model = load(tmp_path, newer | {"num_local_experts": 4}).model
    assert (model.num_experts, model.norm_topk_prob) == (4, False)  # False: the default of transformers
    assert load(tmp_path, MOE).model.norm_topk_prob


def test_expert_parallel_must_divide_the_experts(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"expert_parallel=3 does not divide model\.num_experts=8; choose a divisor of 8"
    ):
        load(tmp_path, MOE, "learner.ranks=3", "learner.expert_parallel=3")


def test_tensor_parallel_must_divide_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tensor_parallel=2 does not divide model\.vocab_size=255"):
        load(tmp_path, QWEN25 | {"vocab_size": 255}, "learner.tensor_parallel=2", "recipe=mxfp4")
