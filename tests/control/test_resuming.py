"""What a checkpoint does not go on with is found in its files: before Ray and any process of the run are started."""

import json
from pathlib import Path

import pytest

from mxdist.config.schema import Config, LearnerConfig, ModelConfig, RunConfig
from mxdist.control import app
from mxdist.control.checkpoints import AHEAD, CheckpointStore, ControllerState
from mxdist.control.collect import SavedBatch
from mxdist.control.records import write_records
from mxdist.errors import UserError
from mxdist.learner.checkpoint_folder import _description, raise_if_other_model
from mxdist.messages import Noise, SamplingSettings
from mxdist.model.shape import ModelShape
from mxdist.observe.console import LOG_FILE
from mxdist.observe.run_directory import TOKENIZER, RunDirectory
from mxdist.tasks.base import Cursor
from mxdist.tasks.registry import make_task

MEGATRON = LearnerConfig(expert_parallel=1)
ZERO_2 = LearnerConfig(expert_parallel=1, backend="deepspeed", zero_stage=2)


def stopped_run(path: Path, learner: LearnerConfig) -> Path:
    """A run with a checkpoint of step 1 and a batch sampled ahead of it; of the learner's files only the small ones."""
    config = Config(run=RunConfig(dir=path), model=ModelConfig(num_experts=0), learner=learner)
    task = make_task(config)
    with RunDirectory.create(config):
        task.tokenizer.save(path / TOKENIZER)
    ids = task.tokenizer.bos_token_id, task.tokenizer.stop_token_ids, task.tokenizer.pad_token_id
    shape = ModelShape(config.model, task.tokenizer.vocab_size, *ids)
    store = CheckpointStore(path)
    partial = store.begin(1)
    (partial / "learner" / "model_shape.json").write_text(json.dumps(_description(shape)))
    if learner.backend == "deepspeed":
        (partial / "learner" / "zero.json").write_text(json.dumps({"ranks": 1, "zero_stage": learner.zero_stage}))
    ahead = SavedBatch(1, Cursor(), 32, SamplingSettings(8, 1.0, 8, 0), Noise(0.0, 0), ())
    write_records(partial / AHEAD, [ahead])
    store.complete(partial, ControllerState(1, {"epoch": 0, "position": 32}, {}, 100, "mxfp4_mbs_of", {}))
    return path


@pytest.mark.parametrize(
    ("learner", "changed", "message"),
    [
        (
            MEGATRON,
            "model.num_hidden_layers=3",
            r"step_1/learner is of another model \(num_hidden_layers 2 there and 3 here\)",
        ),
        (MEGATRON, "learner.backend=deepspeed", r"was written with learner\.backend=megatron"),
        (ZERO_2, "learner.zero_stage=3", r"was written with learner\.zero_stage=2"),
        (MEGATRON, "algorithm.prompts_per_step=16", r"does not fit the batches of 32 prompts that .*step_1"),
    ],
)
def test_settings_that_the_checkpoint_does_not_fit_are_refused_before_anything_starts(
    tmp_path: Path, learner: LearnerConfig, changed: str, message: str
) -> None:
    run = stopped_run(tmp_path / "run", learner)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=message) as refusal:
        app.resume(run, [changed])
    assert "\n" not in str(refusal.value)
    assert "Ray" not in (run / LOG_FILE).read_text()
    assert (run / "config.yaml").read_bytes() == before


def test_a_model_whose_weights_have_moved_or_are_computed_in_another_type_is_the_same_model(tmp_path: Path) -> None:
    folder = stopped_run(tmp_path / "run", MEGATRON) / "checkpoints" / "step_1" / "learner"
    saved = json.loads((folder / "model_shape.json").read_text())
    ids = saved["bos_token_id"], tuple(saved["stop_token_ids"]), saved["pad_token_id"]
    moved = ModelConfig(num_experts=0, path="elsewhere", dtype="bfloat16", initializer_range=0.5)
    raise_if_other_model(folder, ModelShape(moved, saved["vocab_size"], *ids))
    with pytest.raises(UserError, match="another model"):
        raise_if_other_model(folder, ModelShape(moved, saved["vocab_size"] + 1, *ids))
