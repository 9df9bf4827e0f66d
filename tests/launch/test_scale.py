"""The cost model against what was measured and what can be counted by hand, and the page that shows it."""

import json
from pathlib import Path

import pytest
import ray

from mxdist.config.model_costs import parameters
from tools.scale.controller_load import measure
from tools.scale.costs import (
    QUICKSTART,
    QWEN3_30B,
    RESULTS,
    Layout,
    Work,
    balanced,
    dispatch_bytes,
    gradient_bytes,
    h200,
    step,
    sync_bytes,
)

PAGE = (Path(__file__).parents[2] / "SCALE.md").read_text()


def test_the_bytes_of_a_sync_are_those_that_the_quickstart_measures() -> None:
    assert sync_bytes(*QUICKSTART) == 659_968  # sync/bytes in its metrics.jsonl
    assert sync_bytes(*QUICKSTART, fallback=False, macro_blocks=False) == 340_992  # with recipe=mxfp4


def test_the_large_model_has_its_published_size() -> None:
    assert parameters(*QWEN3_30B) == pytest.approx(30.5e9, rel=0.01)


def test_half_of_what_tokens_send_stays_when_two_ranks_share_the_experts() -> None:
    model = QUICKSTART[0]  # 2 layers, 2 experts a token, width 128, float32
    assert dispatch_bytes(model, 10, 2) == 2 * 2 * (2 * 10 * 2 * 128 * 4) / 2
    assert dispatch_bytes(model, 10, 1) == 0


def test_ranks_with_experts_of_their_own_send_no_gradients_of_them() -> None:
    model, vocabulary = QUICKSTART
    experts = 2 * 8 * 3 * 128 * 64
    alone = gradient_bytes(model, vocabulary, Layout(learner=2, engines=1, expert_parallel=2))
    assert alone == 8 * (parameters(model, vocabulary) - experts) / 2


def test_time_of_a_layers_arithmetic_is_close_to_the_measured_one() -> None:
    measured = json.loads(RESULTS.read_text())
    [layer] = [row for row in measured["rows"] if row["name"] == "Qwen2.5-3B forward, bf16"]
    flops = layer["value"] * layer["milliseconds"]  # 1e9
    assert flops / measured["bf16_tflops"] == pytest.approx(layer["milliseconds"], rel=0.05)


def test_the_balanced_layout_is_no_slower_than_any_other() -> None:
    model, vocabulary = QWEN3_30B
    work, machine = Work(2_048), h200()
    best = balanced(model, vocabulary, work, 64, machine)
    assert all(
        best.total <= step(model, vocabulary, work, Layout(learner, 64 - learner), machine).total
        for learner in range(8, 64, 8)
    )


def test_the_page_shows_what_the_model_says() -> None:
    model, vocabulary = QWEN3_30B
    for gpus, sequences in ((64, 2_048), (1024, 32_768)):
        found = balanced(model, vocabulary, Work(sequences), gpus, h200())
        layout = f"{found.layout.learner} + {found.layout.engines}"
        assert any(
            line.startswith(f"| {gpus} | {sequences:,} | {layout} |") and line.endswith(f"| {found.total:.1f} |")
            for line in PAGE.splitlines()
        )
    assert f"{sync_bytes(model, vocabulary) / 1e9:.1f} GB" in PAGE


def test_the_controller_takes_the_answers_of_many_workers() -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    try:
        load = measure(workers=64, steps=2, tokens=40, prompts=64, samples=4)
    finally:
        ray.shutdown()
    assert load.trajectories == 256
    assert load.per_cpu_second > 100  # thousands on an idle machine; a copy of every batch for each worker would not be
