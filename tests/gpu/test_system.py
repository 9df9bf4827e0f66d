"""The whole system on one GPU: learner and engine side by side on it, for a few steps of the quickstart."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.e2e.command import QUICKSTART, SHORT, metrics_of, mxdist

ONE_GPU = [
    "learner.ranks=1", "learner.expert_parallel=1", "learner.gpus_per_rank=0.5", "rollout.gpus_per_worker=0.5",
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("vllm", "ray", "megatron")),
    reason="the system needs vLLM, Ray and Megatron-core",
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_one_gpu_keeps_learner_and_engine_equal_and_holds_memory_on_it(dtype: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = mxdist("train", QUICKSTART, *SHORT, *ONE_GPU, f"model.dtype={dtype}", f"run.dir={run_dir}", cwd=tmp_path)
    assert done.code == 0, done.err
    last = metrics_of(run_dir)[2]
    assert last["parity/checked_tensors"] > 0
    assert last["perf/gpu_memory_mib/learner"] > 0
    assert last["perf/gpu_memory_mib/rollout"] > 0


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4_mbs"])
def test_an_engine_on_a_gpu_keeps_the_bytes_of_quantised_weights_alone(recipe: str, tmp_path: Path) -> None:
    chosen = [f"recipe={recipe}", "model.dtype=bfloat16"]
    done = mxdist("train", QUICKSTART, *SHORT, *ONE_GPU, *chosen, f"run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.code == 0, done.err
    [held] = re.findall(r"\(([0-9.]+) bytes per quantised weight\)", done.out)
    assert 0.5 < float(held) <= 0.56


def test_a_profile_on_a_gpu_has_mfu_and_gpu_memory(tmp_path: Path) -> None:
    out = tmp_path / "profile"
    done = mxdist("profile", QUICKSTART, *SHORT, *ONE_GPU, "--steps", 1, "--warmup", 1, "--out", out, cwd=tmp_path)
    assert done.code == 0, done.err
    for run in json.loads((out / "profile.json").read_text())["runs"].values():
        assert run["rates"]["tokens/s/GPU"] > 0
        assert run["rates"]["learner MFU, %"] > 0
        assert run["amounts"]["GPU MiB of learner"] > 0
