"""The memory estimate against bytes of live tensors in learner ranks and engine weights, and against known sizes."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mxdist.config import Config
from mxdist.config.model_costs import parameters
from mxdist.config.schema import LearnerConfig, ModelConfig, RolloutConfig, SyncConfig
from mxdist.doctor import activations, model_size
from mxdist.doctor.activations import AT_ONCE
from mxdist.doctor.fit import GIB, fit, fullest, named_gpu
from mxdist.doctor.memory import engine_memory, learner_memory, sync_bytes
from mxdist.doctor.model_size import engine, learner_stage, row_bytes
from mxdist.learner import scoring_pieces
from mxdist.model import quantised_weight
from mxdist.model.shape import ModelShape
from mxdist.quant import reference, scratch
from mxdist.quant.recipe import PRESETS, Fallback, Macro, Operand
from mxdist.quant.tensor import part_shapes
from mxdist.rollout.live_weight import LiveWeight
from tests.config.test_configs import DENSE, EXPERTS, load
from tests.model.ranks import RankProcesses
from tools.measure_memory import LivePeak, full_batch, live_bytes, measure_update

BOUND = 0.15

SMALL = ModelConfig(
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=0,
    intermediate_size=512,
    moe_intermediate_size=128,
    max_position_embeddings=128,
    dtype="bfloat16",
)
MOE = SMALL.model_copy(update={"num_experts": 8})


@pytest.mark.parametrize(
    ("model", "layout", "recipe"),
    [
        (SMALL.model_copy(update={"dtype": "float32"}), {"ranks": 1}, "bf16"),
        (SMALL, {"ranks": 2, "recompute": True}, "mxfp4_mbs_of"),
        (SMALL.model_copy(update={"num_hidden_layers": 4}), {"ranks": 2, "pipeline_parallel": 2}, "mxfp4_mbs_of"),
        (MOE, {"ranks": 2, "tensor_parallel": 2, "expert_parallel": 2}, "mxfp4_mbs_of"),
    ],
    ids=["float32, nothing quantised", "data parallel, recomputing", "pipeline", "tensor and expert parallel"],
)
def test_the_estimate_of_a_learner_rank_is_within_15_percent_of_its_tensors(
    model: ModelConfig, layout: dict[str, Any], recipe: str
) -> None:
    rollout = RolloutConfig(max_new_tokens=96)
    learner = {"expert_parallel": 1, "micro_batch_tokens": 512, **layout}
    config = Config(model=model, recipe=recipe, rollout=rollout, learner=LearnerConfig(**learner))
    stages = learner_memory(config, on_gpu=False)
    batch = full_batch(config, 1024, config.data_parallel * len(stages) * 512 // config.context)
    processes = RankProcesses(layout["ranks"])  # of its own: what an earlier learner left would count
    try:
        with processes.learners(model, recipe, rollout=rollout, **learner) as learners:
            measured = learners.run(measure_update, batch)
    finally:
        processes.close()
    always = ("weights", "main gradients", "optimizer", "quantised weights", "work space")
    for index, rank in enumerate(measured):
        stage = stages[index * len(stages) // len(measured)]
        assert sum(stage.items[item] for item in always) == pytest.approx(rank.resident, rel=BOUND)
        assert stage.total == pytest.approx(rank.peak, rel=BOUND)
        assert rank.peak > 1.15 * rank.resident, "an update needs activations"


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4", "mxfp4_mbs_of"])
def test_the_estimate_of_an_engines_weights_is_that_of_its_live_matrices(recipe: str) -> None:
    config = Config(model=MOE, recipe=recipe)
    items = engine_memory(config, on_gpu=False).items
    operand = PRESETS[recipe].w
    bytes_of = dict.fromkeys(("values", "packed"), 0)
    for matrix in engine(config).matrices:
        live = LiveWeight(matrix.rows * matrix.count, matrix.columns, operand, torch.bfloat16)
        for name, part in live.named_buffers():
            bytes_of["values" if name == "values" else "packed"] += part.nbytes
    plain = 2 * (2 * 1024 * 256 + 256 + 3 * (2 * 256 + 2 * 32 + 8 * 256))  # embedding, head, norms, routers
    assert (items["weights"], items["packed weights"]) == (bytes_of["values"] + plain, bytes_of["packed"])
    on_gpu = engine_memory(config, on_gpu=True).items
    values = bytes_of["values"] if operand is None else 0  # bytes are all that it keeps
    assert (on_gpu["weights"], on_gpu["packed weights"]) == (values + plain, bytes_of["packed"])


@pytest.mark.parametrize("columns", [32, 96, 100, 128, 200])
@pytest.mark.parametrize(
    "operand",
    [Operand(), Operand(block=16), Operand(macro=Macro(64)), Operand(fallback=Fallback()), Operand(hadamard="plain")],
)
def test_a_packed_row_is_as_long_as_the_quantisers(columns: int, operand: Operand) -> None:
    parts = part_shapes((1, columns), operand)
    assert row_bytes(columns, operand) == sum(shape[-1] for shape in parts.values())


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4_mbs", "mxfp4_of", "mxfp4_mbs_of"])
def test_quantising_a_whole_tensor_at_once_takes_the_bytes_assumed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 1 << 40)  # as off the CPU
    monkeypatch.setattr(scratch, "_KEPT_ELEMENTS", 0)
    values, recipe = torch.randn(256, 2048, dtype=torch.bfloat16), PRESETS[name]
    assert recipe.w is not None
    assert recipe.x_fwd is not None
    expected = AT_ONCE[recipe.w.macro is not None, recipe.w.fallback is not None]
    with LivePeak() as weight:
        reference.quantise(values, recipe.w).dequantise(torch.bfloat16)
    with LivePeak() as activation:
        reference.fake_quantise(values, recipe.x_fwd)
    assert expected[0] == pytest.approx(weight.peak / values.numel(), rel=0.1)
    assert expected[1] == pytest.approx(activation.peak / values.numel(), rel=0.1)


def test_scores_and_weights_are_worked_on_in_pieces_of_the_size_assumed() -> None:
    assert activations.PIECE == scoring_pieces.PIECE
    assert model_size.TOGETHER == quantised_weight.TOGETHER


def test_live_bytes_sees_a_tensor_come_and_go() -> None:
    before = live_bytes()
    kept = torch.zeros(1000)
    assert live_bytes() == before + 4000
    with LivePeak() as peak:
        for _ in range(3):
            torch.ones(1000).add(1)
    assert (peak.peak, peak.live) == (8000, 0)
    del kept
    assert live_bytes() == before


def test_the_models_have_the_numbers_their_names_say(tmp_path: Path) -> None:
    assert engine(load(DENSE, tmp_path)).total == 3_085_938_688 - 151936 % 64 * 2048
    assert engine(load(EXPERTS, tmp_path)).total == 30_532_122_624


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", [{}, {"family": "qwen2"}, {"num_experts": 8}], ids=str)
def test_every_count_of_a_models_numbers_is_that_of_its_tensors(changes: dict[str, Any], tied: bool) -> None:
    model = SMALL.model_copy(update={"tie_word_embeddings": tied, **changes})
    config = Config(model=model, learner=LearnerConfig(ranks=1, expert_parallel=1))
    tensors = ModelShape(model, 1024, 1, (2,), 0).tensor_shapes()
    numbers = {name: math.prod(shape) for name, shape in tensors.items()}
    assert engine(config).total == learner_stage(config, 0).total == sum(numbers.values())
    small = (".bias", ".q_norm.weight", ".k_norm.weight")
    assert parameters(model, 1024) == sum(count for name, count in numbers.items() if not name.endswith(small))


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"ranks": 4, "tensor_parallel": 2},
        {"ranks": 4, "pipeline_parallel": 3, "tensor_parallel": 1},
        {"ranks": 4, "expert_parallel": 4},
        {"ranks": 12, "expert_parallel": 2, "tensor_parallel": 2, "pipeline_parallel": 3},
    ],
    ids=str,
)
def test_ranks_hold_the_model_between_them_however_it_is_divided(layout: dict[str, int]) -> None:
    layout = {"ranks": 2, "expert_parallel": 1} | layout
    layout["ranks"] = -(-layout["ranks"] // layout.get("pipeline_parallel", 1)) * layout.get("pipeline_parallel", 1)
    model = MOE.model_copy(update={"num_key_value_heads": 4})
    whole = Config(model=model, recipe="mxfp4", learner=LearnerConfig(ranks=1, expert_parallel=1))
    config = whole.model_copy(update={"learner": LearnerConfig(**layout)})
    expert = shared = 0
    for stage in range(config.learner.pipeline_parallel):
        numbers = learner_stage(config, stage)
        expert += numbers.expert * config.learner.expert_parallel
        shared += sum(m.numbers for m in numbers.matrices if not m.is_expert) * config.learner.tensor_parallel
    one = learner_stage(whole, 0)
    assert expert == one.expert
    assert shared == one.shared - one.plain


def test_the_optimizer_is_divided_over_the_ranks_that_hold_the_same_numbers() -> None:
    def optimizer(ranks: int, expert_parallel: int) -> int:
        learner = LearnerConfig(ranks=ranks, expert_parallel=expert_parallel)
        return learner_memory(Config(model=MOE, learner=learner), on_gpu=True)[0].items["optimizer"]

    numbers = learner_stage(Config(model=MOE, learner=LearnerConfig(ranks=1, expert_parallel=1)), 0)
    assert optimizer(1, 1) == 12 * numbers.total
    assert optimizer(4, 1) == pytest.approx(12 * numbers.total / 4)
    assert optimizer(4, 4) == pytest.approx(12 * (numbers.shared / 4 + numbers.expert / 4))
    assert optimizer(8, 4) == pytest.approx(12 * (numbers.shared / 8 + numbers.expert / 4 / 2))


def test_a_weight_sync_is_packed_where_weights_are_quantised() -> None:
    plain, packed = (sync_bytes(Config(model=MOE, recipe=recipe)) for recipe in ("bf16", "mxfp4"))
    numbers = engine(Config(model=MOE, recipe="mxfp4"))
    assert plain == 2 * numbers.total
    assert packed == plain - 2 * numbers.quantised + numbers.quantised * 17 // 32


def test_the_processes_of_a_divided_engine_hold_a_share_of_its_weights_each(tmp_path: Path) -> None:
    whole = engine_memory(load(DENSE, tmp_path), on_gpu=True)
    halves = engine_memory(load(DENSE, tmp_path, "rollout.tensor_parallel=2", "rollout.gpus_per_worker=2"), on_gpu=True)
    assert halves.count == 2 * whole.count
    for item in ("weights", "packed weights"):
        assert halves.items[item] == whole.items[item] // 2
    assert halves.items["KV cache"] == whole.items["KV cache"]


def test_engines_and_ranks_that_share_a_gpu_are_added(tmp_path: Path) -> None:
    config = load(DENSE, tmp_path)
    [rank], rollout = learner_memory(config, on_gpu=True), engine_memory(config, on_gpu=True)
    assert fullest(config, on_gpu=True).total == rank.total + rollout.total
    apart = load(DENSE, tmp_path, "learner.gpus_per_rank=1", "rollout.gpus_per_worker=1")
    assert fullest(apart, on_gpu=True).total == max(rank.total, rollout.total)
    together = load(
        DENSE, tmp_path, "learner.gpus_per_rank=1", "rollout.gpus_per_worker=0.5", "rollout.kv_cache_mib=200000"
    )
    assert fullest(together, on_gpu=True).in_words == "2 rollout engines"


def test_those_that_take_turns_on_a_gpu_are_not_added(tmp_path: Path) -> None:
    config = load(DENSE, tmp_path, "rollout.sleep=true")
    [rank], engine = learner_memory(config, on_gpu=True), engine_memory(config, on_gpu=True)
    updating, sampling = rank.total + engine.resting.total, rank.resting.total + engine.total
    assert fullest(config, on_gpu=True).total == max(updating, sampling) < rank.total + engine.total
    assert {"main gradients", "optimizer"} <= rank.resting.items.keys()
    assert engine.resting.items.keys() == {"logits and scores", "work space"}


def test_the_papers_runs_fit_the_gpus_their_files_name(tmp_path: Path) -> None:
    assert fit(load(DENSE, tmp_path), named_gpu("H100")).fits
    assert fit(load(EXPERTS, tmp_path), named_gpu("H200")).fits
    assert not fit(load(EXPERTS, tmp_path), named_gpu("H100")).fits


def test_what_does_not_fit_is_told_the_setting_that_helps(tmp_path: Path) -> None:
    found = fit(load(DENSE, tmp_path, "rollout.kv_cache_mib=90000"), named_gpu("H200"))
    assert not found.fits
    assert found.lever is not None
    tight = replace(named_gpu("H200"), bytes=int(found.load.total / 0.95) + 1)
    full = replace(tight, bytes=found.load.total)  # not a byte is left for fragmentation
    assert not fit(load(DENSE, tmp_path, "rollout.kv_cache_mib=90000"), full).fits
    assert fit(load(DENSE, tmp_path, "rollout.kv_cache_mib=90000"), tight).lever is None
    for device in (tight, named_gpu("H200"), named_gpu("A100-80")):
        lever = fit(load(DENSE, tmp_path, "rollout.kv_cache_mib=200000"), device).lever
        assert lever is not None
        assert "GiB" in lever or "no single setting" in lever
    assert found.load.total / GIB > 95


def test_the_estimate_needs_no_torch() -> None:
    code = (
        "import sys; from mxdist.config import Config; from mxdist.doctor.fit import fit, named_gpu;"
        "fit(Config(), named_gpu('H100')); sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_deepspeeds_stages_divide_what_they_say_and_offloading_takes_it_from_the_gpu() -> None:
    model = ModelConfig(num_experts=0, num_hidden_layers=8, hidden_size=1024, intermediate_size=4096, vocab_size=2048)

    def items(stage: int, offload: str = "none") -> dict[str, int]:
        learner = LearnerConfig(backend="deepspeed", ranks=8, expert_parallel=1, zero_stage=stage, zero_offload=offload)
        (rank,) = learner_memory(Config(model=model, recipe="mxfp4", learner=learner), on_gpu=True)
        return rank.items

    one, two, three = items(1), items(2), items(3)
    assert one["optimizer"] == two["optimizer"] == three["optimizer"] > 0
    assert one["main gradients"] > two["main gradients"] == three["main gradients"]
    assert two["quantised weights"] > 4 * three["quantised weights"] > 0  # the packed form alone
    assert items(2, "optimizer")["optimizer"] == 0
    assert items(3, "weights")["weights"] < three["weights"]


def test_weights_that_are_broadcast_are_held_aside_whole_in_every_process_of_an_engine() -> None:
    settings = {"recipe": "mxfp4", "sync": {"transport": "broadcast"}, "rollout": {"tensor_parallel": 2}}
    config = Config.model_validate(settings)
    assert engine_memory(config, on_gpu=False).items["weights received"] == sync_bytes(config)
    assert "weights received" not in engine_memory(Config(), on_gpu=False).items


def test_weights_that_are_sent_as_changes_are_held_by_both_sides_to_compare_with() -> None:
    config = Config.model_validate({"recipe": "mxfp4", "sync": {"transport": "delta"}})
    assert engine_memory(config, on_gpu=False).items["weights to lay changes over"] == sync_bytes(config)
    assert "weights to lay changes over" not in engine_memory(config, on_gpu=True).items  # in the host's memory
    through_host = config.model_copy(update={"sync": SyncConfig(transport="host")})
    kept, sent = (learner_memory(each, on_gpu=True)[0].items["weights on their way"] for each in (config, through_host))
    assert kept == 2 * sent > 0
