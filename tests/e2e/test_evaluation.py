"""``mxdist eval`` of a Hugging Face checkpoint that nothing has trained: its tokenizer, its chat, pass@k and maj@k."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mxdist.config.schema import ModelConfig
from mxdist.model.shape import ModelShape
from tests.e2e.command import Outcome, mxdist
from tests.model.checkpoints import save_checkpoint
from tests.tasks.checkpoint import write_tokenizer
from tests.tasks.data import rows, write_questions

SHAPE = ModelConfig(
    num_experts=4,
    hidden_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    moe_intermediate_size=32,
    max_position_embeddings=1024,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("model"), ModelShape(SHAPE, 320, None, (259,), 256), torch.float32)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def run_dir(checkpoint: Path) -> Path:
    return checkpoint.with_name("run")


@pytest.fixture(scope="module")
def outcome(checkpoint: Path, run_dir: Path) -> Outcome:
    train = write_questions(checkpoint.with_name("train.jsonl"), *rows(40))
    held_out = write_questions(checkpoint.with_name("test.jsonl"), *rows(44)[40:])
    config = checkpoint.with_name("task.yaml")
    config.write_text(
        f"run: {{dir: {run_dir}}}\nmodel: {{path: {checkpoint}}}\nrecipe: mxfp4\n"
        f"data: {{task: gsm8k, train: {train}, eval: {held_out}, template: chat, few_shot: 1}}\n"
        f"rollout: {{max_new_tokens: 16}}\nlearner: {{ranks: 1, expert_parallel: 1}}\n"
    )
    return mxdist("eval", config, "--samples", 3, "--temperature", 0.9, cwd=run_dir.parent)


def test_an_untrained_checkpoint_is_evaluated_with_standard_errors(outcome: Outcome) -> None:
    assert (outcome.code, outcome.err) == (0, "")
    assert "step 0, 4 problems, 3 answers each at temperature 0.9" in outcome.out
    table = outcome.out.partition("at temperature 0.9\n")[2].splitlines()
    assert "+-: one standard error (of shares Wilson's)" in table
    assert [line for line in table if line.startswith(("mxfp4", "bf16"))] == [
        "mxfp4",
        "bf16",
        "mxfp4 less bf16, paired by problem",
    ]
    assert sum("maj@3" in line for line in table) == 3


def test_every_answer_is_in_the_run_directory(outcome: Outcome, run_dir: Path) -> None:
    assert outcome.code == 0
    for recipe in ("mxfp4", "bf16"):
        lines = [json.loads(line) for line in (run_dir / "eval" / f"step_0-{recipe}.jsonl").read_text().splitlines()]
        assert [line["key"] for line in lines] == ["test/1", "test/2", "test/3", "test/4"]
        assert all(len(line[key]) == 3 for line in lines for key in ("answers", "extracted", "right", "tokens"))
        assert all(line["prompt"].count("<|im_start|>user") == 2 for line in lines)
    assert (run_dir / "tokenizer" / "generation_config.json").is_file()


def test_a_damaged_shard_is_named_before_anything_starts_and_nothing_is_left(
    outcome: Outcome, checkpoint: Path, tmp_path: Path
) -> None:
    assert outcome.code == 0
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    settings = (f"model.path={copy}", f"run.dir={tmp_path / 'run'}")
    refused = mxdist("eval", checkpoint.with_name("task.yaml"), *settings, cwd=tmp_path)
    assert refused.code == 2
    assert refused.err.startswith(f"mxdist: {shard} is truncated")
    assert len(refused.err.splitlines()) == 1
    assert "starting learner" not in refused.out
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_and_is_exported_when_the_checkpoint_it_began_with_is_gone(
    outcome: Outcome, checkpoint: Path, tmp_path: Path
) -> None:
    assert outcome.code == 0
    copy, run = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "run"
    settings = (f"model.path={copy}", f"run.dir={run}", "run.steps=1", "algorithm.prompts_per_step=4")
    began = mxdist("train", checkpoint.with_name("task.yaml"), *settings, "warm_start.steps=1", cwd=tmp_path)
    assert began.code == 0, began.err
    shutil.rmtree(copy)
    resumed = mxdist("resume", run, "run.steps=2", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert "resumed from step 1" in resumed.out
    exported = mxdist("export", run, tmp_path / "packed", "--form", "mxfp4", cwd=tmp_path)
    assert exported.code == 0, exported.err
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
