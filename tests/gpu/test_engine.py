"""Rollout engines that decode with CUDA graphs, against the same engine kernel by kernel. Real vLLM, one GPU.

python -m pytest -q tests/gpu/test_engine.py
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mxdist.config.schema import Config, ModelConfig
from mxdist.messages import Noise, Prompt, RolloutRequest, RolloutResult, SamplingSettings
from mxdist.model.recipes import model_recipes
from mxdist.model.shape import ModelShape
from mxdist.rollout.products import graph_sizes
from mxdist.rollout.worker import RolloutWorker
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import learner_checksums
from tests.gpu.conftest import lacking
from tests.rollout.engine_process import EngineProcess
from tests.rollout.offering import generate_with_offers
from tests.rollout.reference_model import payloads, random_tensors

VOCABULARY, STOPS, CONTEXT, TOKENS = 128, (2, 7), 48, 12
SEQUENCES = 96
"""Decoded together: from 1 to the decode kernel's 64 rows, and beyond."""
PROMPTS = tuple(Prompt(f"train-{i}", (1, *[8 + (5 * i + j * j) % 80 for j in range(3 + i % 7)]), "") for i in range(16))
CLEAN = Noise(0.0, 0)
SLEEPS = {"sleep": True, "gpus_per_worker": 0.5}


KINDS = ("dense-mxfp4_mbs", "dense-bf16", "moe-mxfp4", "moe-bf16")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineProcess]]:
    """Started at the same time: most of a start is imports."""
    if lacking is not None:
        pytest.skip(f"needs a Hopper GPU: {lacking}")

    directories = [tmp_path_factory.mktemp(kind) for kind in KINDS]

    def start(kind: str, directory: Path) -> EngineProcess:
        family, recipe = kind.split("-")
        return started(family, recipe, directory, **(SLEEPS if recipe == "mxfp4" else {}))

    with ThreadPoolExecutor(len(KINDS)) as pool:
        found = dict(zip(KINDS, pool.map(start, KINDS, directories), strict=True))
    yield found
    for process in found.values():
        process.close()


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, engines: dict[str, EngineProcess]) -> EngineProcess:
    return engines[request.param]


def started(family: str, recipe: str, directory: Path, **rollout: Any) -> EngineProcess:
    model = ModelConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        dtype="bfloat16",
        moe_intermediate_size=128,
        intermediate_size=512,
        num_experts=8 if family == "moe" else 0,
        max_position_embeddings=CONTEXT,
    )
    config = Config(
        model=model,
        recipe=recipe,
        learner={"ranks": 1, "expert_parallel": 1, "gpus_per_rank": 0.5},
        rollout={"max_sequences": SEQUENCES, "max_new_tokens": TOKENS} | rollout,
    )
    return EngineProcess(config, ModelShape(model, VOCABULARY, 1, STOPS, 0), directory)


def request_of(samples: int, noise: Noise = CLEAN) -> RolloutRequest:
    return RolloutRequest(0, PROMPTS, SamplingSettings(samples, 0.8, TOKENS, 0), noise)


def sync(engine: EngineProcess, seed: int) -> None:
    sent = payloads(random_tensors(engine.shape, seed), model_recipes(engine.config), seed)
    compare_checksums(learner_checksums(sent), engine.load(sent))


def test_every_size_is_recorded_when_the_engine_starts(engine: EngineProcess) -> None:
    assert engine.run(recorded_sizes) == graph_sizes(SEQUENCES)


@pytest.mark.parametrize("samples", [1, 6])
def test_graphs_sample_what_single_kernels_do_with_weights_that_came_after_recording(
    engine: EngineProcess, samples: int
) -> None:
    answers = []
    for seed in (1, 2):
        sync(engine, seed)
        replays, replayed = engine.run(counting_replays, request_of(samples))
        none, single = engine.run(kernel_by_kernel, request_of(samples))
        assert replays >= TOKENS // 2
        assert none == 0
        assert_alike(replayed, single)
        answers.append(tokens_of(replayed))
    assert answers[0] != answers[1]


def test_graphs_read_the_noise_of_the_norms(engine: EngineProcess) -> None:
    sync(engine, 1)
    noise = Noise(0.1, 5)
    replays, replayed = engine.run(counting_replays, request_of(2, noise))
    assert replays
    assert replayed.perturbed_modules > 0
    assert_alike(replayed, engine.run(kernel_by_kernel, request_of(2, noise))[1])
    _, clean = engine.run(counting_replays, request_of(2))
    assert tokens_of(clean) != tokens_of(replayed)


@pytest.mark.parametrize("engine", ["dense-mxfp4_mbs", "moe-bf16"], indirect=True)
def test_weights_in_flight_draw_the_tokens_they_are_said_to_although_vllm_schedules_ahead(
    engine: EngineProcess,
) -> None:
    sync(engine, 1)
    before = engine.generate(request_of(2))
    sent = payloads(random_tensors(engine.shape, 2), model_recipes(engine.config), 2)
    same = payloads(random_tensors(engine.shape, 1), model_recipes(engine.config), 3)
    unmoved = engine.run(generate_with_offers, request_of(2), [(5, same)])
    assert_alike(unmoved, before)  # also keys and values that are computed again
    assert {version for group in unmoved.groups for sample in group.samples for version, _ in sample.drawn_by} == {1, 3}
    result = engine.run(generate_with_offers, request_of(2), [(5, sent)])
    sync(engine, 2)
    after = engine.generate(request_of(2))
    runs = [sample.drawn_by for group in result.groups for sample in group.samples]
    both = [  # answers that both versions drew
        (drawn_by[0][1], *tokens)
        for drawn_by, *tokens in zip(runs, tokens_of(result), tokens_of(before), tokens_of(after), strict=True)
        if len(drawn_by) == 2
    ]
    assert len(both) > len(runs) // 2
    assert len({first for first, *_ in both}) == 1, "all began together"
    assert np.mean([tokens[:first] == old[:first] for first, tokens, old, _ in both]) > 0.9
    assert np.mean([tokens not in (old, new) for _, tokens, old, new in both]) > 0.5


@pytest.mark.parametrize("engine", ["moe-mxfp4"], indirect=True)
def test_an_engine_that_sleeps_frees_memory_and_wakes_with_the_weights_it_had(engine: EngineProcess) -> None:
    sync(engine, 1)
    awake = engine.run(free_memory, "weights", "kv_cache")
    before = tokens_of(engine.generate(request_of(2)))
    assert engine.run(free_memory) > awake + (engine.config.rollout.kv_cache_mib << 19), "half of the KV cache at least"
    assert tokens_of(engine.generate(request_of(2))) == before
    sync(engine, 2)
    assert tokens_of(engine.generate(request_of(2))) != before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_an_engine_over_two_gpus_samples_what_one_gpu_does(family: str, tmp_path: Path) -> None:
    results = []
    for processes in (1, 2):
        rollout = {"tensor_parallel": processes, "gpus_per_worker": processes}
        process = started(family, "mxfp4", tmp_path / str(processes), **rollout)
        sync(process, 1)
        results.append(process.generate(request_of(2)))
        assert len(results[-1].usage) == processes
        process.close()
    firsts = [[(s.tokens[0], s.logprobs[0]) for group in result.groups for s in group.samples] for result in results]
    same = [(a, b) for (token, a), (other, b) in zip(*firsts, strict=True) if token == other]
    assert len(same) > 0.7 * len(firsts[0])  # sums over processes round otherwise
    assert np.mean([abs(a - b) for a, b in same]) < 0.05


def tokens_of(result: RolloutResult) -> list[list[int]]:
    return [sample.tokens.tolist() for group in result.groups for sample in group.samples]


def assert_alike(one: RolloutResult, other: RolloutResult) -> None:
    """Graphs fill batches up, and a GEMM of more rows may round otherwise: the last bits of bfloat16, and a token drawn
    between two of almost equal probability now and then."""
    pairs = [
        (a, b)
        for left, right in zip(one.groups, other.groups, strict=True)
        for a, b in zip(left.samples, right.samples, strict=True)
    ]
    same = [a.tokens.tolist() == b.tokens.tolist() for a, b in pairs]
    assert np.mean(same) >= 0.6, f"{sum(same)} of {len(same)} answers are the same"
    equal = [pair for pair, alike in zip(pairs, same, strict=True) if alike]
    differences = np.concatenate([np.abs(a.logprobs - b.logprobs) for a, b in equal])
    assert differences.mean() < 0.02
    assert differences.max() < 0.5


# Executed in the engine's process --------------------------------------------------------------------------------


def free_memory(worker: RolloutWorker, *awake: str) -> int:
    worker._engine.wake(*awake)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _of_runner(worker: RolloutWorker, read: Callable[[Any], Any]) -> Any:
    [found] = worker._engine._llm.collective_rpc(lambda process: read(process.model_runner))
    return found


def recorded_sizes(worker: RolloutWorker) -> list[int]:
    def sizes(runner: Any) -> list[int]:
        graphs = runner.model.concrete_cudagraph_entries
        return sorted(key.num_tokens for key, entry in graphs.items() if entry.cudagraph is not None)

    return _of_runner(worker, sizes)


def counting_replays(worker: RolloutWorker, request: RolloutRequest) -> tuple[int, RolloutResult]:
    """How many graphs were replayed for a request, and its result; without keys and values of earlier ones."""
    replays, replay = [], torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(graph)
        replay(graph)

    worker._engine.forget_prefixes()
    torch.cuda.CUDAGraph.replay = counted
    try:
        result = worker.generate(request)
        return len(replays), result
    finally:
        torch.cuda.CUDAGraph.replay = replay


def kernel_by_kernel(worker: RolloutWorker, request: RolloutRequest) -> tuple[int, RolloutResult]:
    """The same with graphs left aside, as an engine with rollout.cuda_graphs=false runs."""
    from vllm.config.compilation import CUDAGraphMode

    dispatcher = _of_runner(worker, lambda runner: runner.cudagraph_dispatcher)
    mode, dispatcher.cudagraph_mode = dispatcher.cudagraph_mode, CUDAGraphMode.NONE
    try:
        return counting_replays(worker, request)
    finally:
        dispatcher.cudagraph_mode = mode
