"""train, resume and eval on the quickstart's model, each as its own process with every real part."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command import QUICKSTART, SHORT, Outcome, metrics_of, mxdist


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands") / "run"


@pytest.fixture(scope="module")
def trained(run_dir: Path) -> Iterator[Outcome]:
    loggers = ["log.tensorboard=true", "log.wandb=offline"]
    return mxdist("train", QUICKSTART, f"run.dir={run_dir}", *SHORT, *loggers, cwd=run_dir.parent)


def test_a_run_ends_well_and_writes_nothing_to_standard_error(trained: Outcome) -> None:
    assert (trained.code, trained.err) == (0, "")


def test_both_lists_of_quantised_modules_are_printed(trained: Outcome) -> None:
    lists = [line.split("mxfp4_mbs_of: ")[1] for line in trained.out.splitlines() if "linears in mxfp4_mbs_of" in line]
    assert len(lists) == 2
    assert lists[0] == lists[1]
    for part in ("self_attn.{", "q_proj", "o_proj", "experts.{0-7}.{", "gate_proj", "down_proj"):
        assert part in lists[0]


def test_the_run_directory_holds_everything(trained: Outcome, run_dir: Path) -> None:
    assert trained.code == 0
    found = {path.name for path in run_dir.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "log.txt",
        "checkpoints",
        "tokenizer",
        "tensorboard",
        "wandb",
        "rollouts",
    } <= found
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step_0", "step_2"}
    assert "model.layers.1.mlp.experts.7.up_proj" in (run_dir / "log.txt").read_text()


def test_metrics_have_the_names_people_compare_by(trained: Outcome, run_dir: Path) -> None:
    assert trained.code == 0
    metrics = metrics_of(run_dir)
    assert sorted(metrics) == [0, 1, 2]
    assert 0 <= metrics[0]["eval/accuracy"] <= 1
    expected = {
        "actor/entropy", "actor/grad_norm", "actor/pg_clipfrac", "actor/ppo_kl", "critic/rewards/mean",
        "response_length/mean", "timing_s/step", "timing_s/rollout", "perf/throughput", "rollout_corr/kl",
        "aqn/sigma", "sync/bytes", "sync/seconds", "parity/checked_tensors", "off_policy/staleness/max",
    }  # fmt: skip
    assert expected <= set(metrics[1])
    assert metrics[2]["eval/accuracy"] >= 0


def test_learner_and_engine_agree_to_rounding_when_synchronous(trained: Outcome, run_dir: Path) -> None:
    assert trained.code == 0
    step = metrics_of(run_dir)[1]
    assert step["off_policy/staleness/max"] == 0
    assert step["aqn/sigma"] == 0
    assert step["rollout_corr/logprob_abs_diff"] < 1e-5
    assert step["parity/checked_tensors"] == 69
    assert step["rollout/preemptions"] == 0


def test_noise_reaches_norms_once_the_silent_stage_is_over(trained: Outcome, run_dir: Path) -> None:
    assert trained.code == 0
    step = metrics_of(run_dir)[2]
    assert step["aqn/sigma"] > 0
    assert step["aqn/perturbed_modules"] == 2
    assert step["aqn/sigma_applied"] == pytest.approx(step["aqn/sigma"], rel=0.3)  # of 64 draws
    assert step["rollout_corr/logprob_abs_diff"] > 1e-5  # the engine sampled with noise, the learner scores without


def test_a_second_run_into_the_same_directory_is_refused_and_changes_nothing(trained: Outcome, run_dir: Path) -> None:
    assert trained.code == 0
    before = (run_dir / "metrics.jsonl").read_bytes()
    again = mxdist("train", QUICKSTART, f"run.dir={run_dir}", *SHORT, cwd=run_dir.parent)
    assert again.code == 2
    assert "mxdist resume" in again.err
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_says_how_to_go_on(trained: Outcome, run_dir: Path) -> None:
    assert trained.code == 0
    outcome = mxdist("resume", run_dir, cwd=run_dir.parent)
    assert outcome.code == 2
    assert "run.steps=N" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_settings_that_would_make_another_run_of_it_are_refused(trained: Outcome, run_dir: Path) -> None:
    assert trained.code == 0
    outcome = mxdist("resume", run_dir, "run.steps=3", "run.seed=5", cwd=run_dir.parent)
    assert outcome.code == 2
    assert "run.seed=5 cannot be set" in outcome.err


def test_a_checkpoint_of_another_model_is_refused(trained: Outcome, run_dir: Path) -> None:
    assert trained.code == 0
    outcome = mxdist("resume", run_dir, "run.steps=3", "model.num_hidden_layers=3", cwd=run_dir.parent)
    assert outcome.code == 2
    assert "num_hidden_layers" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert "starting" not in outcome.out  # Ray, or anything
    # The refused settings have not replaced the run's own.
    assert "num_hidden_layers: 2" in (run_dir / "config.yaml").read_text()


def test_eval_prints_accuracy_with_quantised_and_with_bf16_weights(trained: Outcome, run_dir: Path) -> None:
    assert trained.code == 0
    outcome = mxdist("eval", run_dir, cwd=run_dir.parent)
    assert (outcome.code, outcome.err) == (0, "")
    quantised = metrics_of(run_dir)[2]["eval/accuracy"]
    assert f"recipe mxfp4_mbs_of: greedy accuracy {quantised:.3f}" in outcome.out
    assert "recipe bf16: greedy accuracy" in outcome.out


def test_resume_goes_on_where_the_run_stopped(trained: Outcome, run_dir: Path) -> None:
    assert trained.code == 0
    outcome = mxdist("resume", run_dir, "run.steps=3", cwd=run_dir.parent)
    assert (outcome.code, outcome.err) == (0, "")
    assert sorted(metrics_of(run_dir)) == [0, 1, 2, 3]
    assert (run_dir / "checkpoints" / "step_3").is_dir()
    assert "warm start" not in outcome.out
