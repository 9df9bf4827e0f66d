"""The benchmark of the learner alone, on a model that a CPU trains in no time."""

import json
from pathlib import Path

import pytest

from mxdist.config import load_config
from tools.bench import learner

TINY = """
model: {vocab_size: 40, hidden_size: 64, num_experts: 4, moe_intermediate_size: 32, num_hidden_layers: 1}
learner: {ranks: 2, expert_parallel: 2, micro_batch_tokens: 64}
"""


def test_recipes_train_the_same_tokens_and_are_compared_with_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "out" / "learner.json"
    config.write_text(TINY)
    sizes = ["--length", "32", "--steps", "2", "--warmup", "1"]
    learner.main([str(config), "run.seed=3", *sizes, "--recipes", "bf16", "mxfp4_g4_nearest", "--out", str(out)])
    report = json.loads(out.read_text())
    plain, quantised = report["recipes"]["bf16"], report["recipes"]["mxfp4_g4_nearest"]
    assert plain["tokens"] == quantised["tokens"] > 200
    assert plain["ratio"] == 1
    assert quantised["ratio"] == pytest.approx(plain["seconds"]["update"] / quantised["seconds"]["update"])
    assert 0.5 < quantised["grad_norm"] / plain["grad_norm"] < 2
    assert quantised["grad_norm"] != plain["grad_norm"]  # it was quantised
    assert [len(rank) for rank in report["seconds"]["bf16"]] == [2, 2]
    assert "tokens/s/rank" in capsys.readouterr().out


def test_a_rank_that_fails_says_why(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    with pytest.raises(SystemExit, match=r"rank 0 failed(.|\n)*unknown recipe 'mxfp5'"):
        learner.main([str(config), "--recipes", "mxfp5"])


@pytest.mark.parametrize("name", ["dense_3b", "moe_ep2"])
def test_the_shapes_to_measure_are_valid(name: str) -> None:
    load_config(Path(learner.__file__).parent / f"{name}.yaml")
