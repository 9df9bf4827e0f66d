"""The shipped configurations: each loads, alone or over the bases it is written for, and says what the paper says."""

import json
from pathlib import Path
from typing import Any

import pytest

from mxdist.config import Config, dump_config, load_config
from mxdist.errors import UserError
from mxdist.model.recipes import model_recipes

CONFIGS = Path(__file__).parents[2] / "configs"
ABLATIONS = sorted((CONFIGS / "ablations").glob("*.yaml"))
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
DENSE, EXPERTS = CONFIGS / "gsm8k_qwen2.5_3b.yaml", CONFIGS / "gsm8k_qwen3_30b_a3b.yaml"

# The published config.json of the two models, what decides their shape.
QWEN25_3B = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
SHAPES = {DENSE: QWEN25_3B, EXPERTS: QWEN3_30B_A3B}


def load(base: Path, folder: Path, *overrides: str) -> Config:
    """``base`` with model.path replaced by a directory that holds the published config.json and nothing else."""
    (folder / "config.json").write_text(json.dumps(SHAPES[base]))
    return load_config(base, [*overrides, f"model.path={folder}"])


@pytest.mark.parametrize("file", sorted(set(CONFIGS.glob("*.yaml")) - set(SHAPES)), ids=lambda file: file.stem)
def test_configurations_without_a_checkpoint_load(file: Path) -> None:
    assert load_config(file).run.name == file.stem


@pytest.mark.parametrize("base", SHAPES, ids=lambda file: file.stem)
def test_the_papers_runs_load_with_a_local_copy_of_their_model(base: Path, tmp_path: Path) -> None:
    config = load(base, tmp_path)
    assert config.run.name == base.stem
    assert (config.recipe, config.model.dtype) == ("mxfp4_mbs_of", "bfloat16")
    assert config.rollout.max_new_tokens == 1024
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_each_learner_rank_and_each_engine_has_room_on_a_gpu(tmp_path: Path) -> None:
    for base, gpus in ((DENSE, 2), (EXPERTS, 12)):
        learner, rollout = load(base, tmp_path).learner, load(base, tmp_path).rollout
        wanted = learner.ranks * learner.gpus_per_rank + rollout.workers * rollout.gpus_per_worker
        assert wanted == pytest.approx(gpus)
        assert learner.gpus_per_rank > 0.5, "two ranks of one group on one GPU cannot talk over NCCL"


@pytest.mark.parametrize("overlay", [*ABLATIONS, *RECIPES], ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_overlay_loads_over_both_runs(overlay: Path, tmp_path: Path) -> None:
    for base in SHAPES:
        model_recipes(load(base, tmp_path, str(overlay)))


def test_the_ablations_are_the_rows_of_the_papers_figure(tmp_path: Path) -> None:
    rows = {}
    for overlay in ABLATIONS:
        config = load(DENSE, tmp_path, str(overlay))
        assert config.run.name == overlay.stem
        rows[overlay.stem] = (config.recipe, config.aqn.mode)
    recipes = ("mxfp4", "mxfp4_mbs", "mxfp4_of", "mxfp4_mbs_of")
    expected = {name: (name, "disabled") for name in ("bf16", *recipes)}
    expected |= {f"{name}_aqn": (name, "schedule") for name in ("mxfp4", "mxfp4_mbs", "mxfp4_mbs_of")}
    assert rows == expected


def overlaid(folder: Path, base: str, overlay: str, *settings: str) -> Config:
    (folder / "base.yaml").write_text(base)
    (folder / "over.yaml").write_text(overlay)
    return load_config(folder / "base.yaml", [str(folder / "over.yaml"), *settings])


def test_a_file_laid_over_another_changes_its_own_keys_and_no_others(tmp_path: Path) -> None:
    base = "run: {seed: 3, steps: 7}\nrecipe_overrides: [{modules: '*.0.*', recipe: bf16}]\nrecipe: mxfp4\n"
    config = overlaid(tmp_path, base, "run:\n  steps: 9\nrecipe_overrides: []\naqn:\n", "run.name=last")
    assert (config.run.seed, config.run.steps, config.run.name, config.recipe) == (3, 9, "last", "mxfp4")
    assert config.recipe_overrides == (), "lists are replaced"


@pytest.mark.parametrize(
    ("base", "overlay", "settings", "sentence"),
    [
        ("run: {seed: 1}", "\nrun:\n  sed: 1", [], "unknown key run.sed (OVER line 3); did you mean run.seed?"),
        ("run: {sed: 1}", "run: {seed: 1}", [], "unknown key run.sed (BASE line 1); did you mean run.seed?"),
        ("run: {steps: 0}", "\nrun: {steps: -1}", [], "run.steps=-1 (OVER line 2) must be greater than 0"),
        ("run: 3", "\nrun: {steps: -1}", [], "run.steps=-1 (OVER line 2) must be greater than 0"),
        ("run: {steps: 1}", "\nrun: 3", [], "run=3 (OVER line 2) must be a group of keys"),
        ("run: {}", "run: {steps: 3}", ["run.steps=0"], "run.steps=0 (the command line) must be greater than 0"),
        (
            "aqn: {sigma_start: 0.1}",
            "aqn:\n  sigma_end: 0.2",
            [],
            "sigma_end=0.2 is above sigma_start=0.1; swap them (section aqn of BASE line 1 and OVER)",
        ),
        (
            "run: {}",
            "aqn: {sigma_start: 0.1}",
            ["aqn.sigma_end=1"],
            "sigma_end=1.0 is above sigma_start=0.1; swap them (section aqn of OVER line 1 and the command line)",
        ),
        ("run: {}", "learner: {ranks: 3}", [], "choose a divisor of 3 (BASE and OVER)"),
        ("run: {}", "- 1", [], "OVER holds no keys; write settings such as 'run: {seed: 0}'"),
    ],
)
def test_a_mistake_in_either_file_is_named_with_its_file_and_line(
    base: str, overlay: str, settings: list[str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        overlaid(tmp_path, base, overlay, *settings)
    said = str(caught.value).replace(str(tmp_path / "base.yaml"), "BASE").replace(str(tmp_path / "over.yaml"), "OVER")
    assert said.endswith(sentence)


def test_an_overlay_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("")
    with pytest.raises(UserError, match=r"the configuration file none\.yaml does not exist"):
        load_config(tmp_path / "base.yaml", ["none.yaml"])


def test_more_bf16_layers_than_there_are_is_refused(tmp_path: Path) -> None:
    settings: list[Any] = ["bf16_layers.first=2", "bf16_layers.last=1", "model.num_hidden_layers=2"]
    with pytest.raises(UserError, match=r"bf16_layers\.first=2 and bf16_layers\.last=1 are more than .*layers=2"):
        overlaid(tmp_path, "", "", *settings)
    assert overlaid(tmp_path, "", "", *settings[1:], "bf16_layers.first=1").bf16_layers.first == 1


def test_deepspeed_lies_over_the_dense_model_and_not_over_experts(tmp_path: Path) -> None:
    overlay = str(CONFIGS / "learners" / "deepspeed_zero3.yaml")
    assert load(DENSE, tmp_path, overlay).learner.zero_stage == 3
    with pytest.raises(UserError, match=r"learner\.backend=deepspeed trains dense models"):
        load(EXPERTS, tmp_path, overlay)
