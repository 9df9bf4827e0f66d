"""train, resume with another number of ranks, and export with learner.backend=deepspeed, as a user runs them."""

from pathlib import Path

from safetensors.torch import load_file

from tests.e2e.command import QUICKSTART, SHORT, metrics_of, mxdist

DENSE = ["model.num_experts=0", "model.intermediate_size=128", "learner.expert_parallel=1", "data.eval_problems=16"]


def test_a_run_on_deepspeed_trains_resumes_on_one_rank_and_is_exported(tmp_path: Path) -> None:
    run, zero = tmp_path / "run", ["learner.backend=deepspeed", "learner.zero_stage=3"]
    settings = [*SHORT, *DENSE, *zero, "run.steps=1", f"run.dir={run}"]
    trained = mxdist("train", QUICKSTART, *settings, cwd=tmp_path)
    assert trained.code == 0, trained.err
    resumed = mxdist("resume", run, "run.steps=2", "learner.ranks=1", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    metrics = metrics_of(run)
    assert metrics[2]["parity/checked_tensors"] == metrics[1]["parity/checked_tensors"] > 0
    assert metrics[2]["actor/entropy"] > 0
    assert abs(metrics[2]["rollout_corr/k3_kl"]) < 1e-2  # engine and learner compute with the same weights
    exported = mxdist("export", run, tmp_path / "out", cwd=tmp_path)
    assert exported.code == 0, exported.err
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.1.mlp.down_proj.weight" in names
