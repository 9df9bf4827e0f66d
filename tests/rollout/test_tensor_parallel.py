"""An engine that is divided over two processes, with the real vLLM, against an undivided transformers model."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import pytest

from mxdist.config.schema import Config, ModelConfig
from mxdist.errors import ParityError, UserError
from mxdist.messages import Noise, Prompt, RolloutRequest, SamplingSettings
from mxdist.model.recipes import model_recipes
from mxdist.model.shape import ModelShape
from mxdist.quant.checksum import combine
from mxdist.rollout.worker import RolloutWorker
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import learner_checksums
from tests.rollout.comparing import answers, logprob_differences, sync
from tests.rollout.engine_process import EngineProcess
from tests.rollout.offering import generate_with_offers
from tests.rollout.reference_model import payloads, random_tensors

VOCABULARY, STOPS, CONTEXT = 64, (2, 7), 48
CLEAN = Noise(0.0, 0)
PROMPTS = tuple(Prompt(f"train-{i}", (1, *[3 + (5 * i + j * j) % 60 for j in range(4 + i)]), "") for i in range(6))


@pytest.fixture(scope="module", params=["moe-mxfp4_mbs", "qwen2-mxfp4_of"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    family, recipe = request.param.split("-")
    model = ModelConfig(
        hidden_size=256 if family == "moe" else 128,
        num_attention_heads=8 if family == "moe" else 4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=256,
        intermediate_size=192,
        num_experts=4 if family == "moe" else 0,
        max_position_embeddings=CONTEXT,
        family="qwen2" if family == "qwen2" else "qwen3",
        tie_word_embeddings=family == "qwen2",
    )
    config = Config(
        model=model, recipe=recipe, learner={"ranks": 1, "expert_parallel": 1}, rollout={"tensor_parallel": 2}
    )
    process = EngineProcess(config, ModelShape(model, VOCABULARY, 1, STOPS, 0), tmp_path_factory.mktemp("engine"))
    yield process
    with suppress(BrokenProcessPool):  # by the last test
        process.close()


only_qwen2 = pytest.mark.parametrize("engine", ["qwen2-mxfp4_of"], indirect=True)


@only_qwen2
def test_an_error_that_nobody_foresaw_is_told_with_its_traceback_and_the_next_call_has_its_own_answers(
    engine: EngineProcess,
) -> None:
    said, usage = engine.run(ask_for_what_is_not_there)
    assert "In a process of the engine:\nTraceback" in said
    assert "AttributeError: 'Rank' object has no attribute 'nothing'" in said
    assert usage == ["ProcessUsage"] * 2
    assert engine.run(RolloutWorker.cannot_map, []) == "the engine has no GPU"


def ask_for_what_is_not_there(worker: RolloutWorker) -> tuple[str, list[str]]:
    with pytest.raises(RuntimeError) as caught:
        worker._engine.each("nothing")
    return str(caught.value), [type(found).__name__ for found in worker._engine.each("usage")]


def request_of(noise: Noise = CLEAN) -> RolloutRequest:
    return RolloutRequest(0, PROMPTS, SamplingSettings(2, 0.8, 8, 0), noise)


def test_each_process_holds_half_of_every_matrix_and_says_so(engine: EngineProcess) -> None:
    whole = engine.shape.tensor_shapes()
    assert engine.report.quantised_modules == tuple(
        sorted(name.removesuffix(".weight") for name in whole if name.endswith("_proj.weight"))
    )
    for rank, shapes in enumerate(engine.run(in_each_process, shapes_held)):
        assert shapes.keys() == whole.keys()
        for name, (held, division) in shapes.items():
            halved = not name.endswith(("norm.weight", "mlp.gate.weight"))
            assert np.prod(held) * (1 + halved) == np.prod(whole[name]), name
            assert division == ((rank, 2) if halved else (0, 1)), name


def test_log_probabilities_equal_an_undivided_model_and_every_byte_is_summed(engine: EngineProcess) -> None:
    sync(engine, seed=2, version=1)
    tensors = sync(engine, seed=1, version=2)
    result = engine.generate(request_of())
    differences = logprob_differences(engine, tensors, result, 0.8)
    # The order of a sum can move a value over a rounding boundary before it is quantised, which changes what follows.
    assert np.mean(np.abs(differences) < 1e-3) > 0.8
    assert np.abs(differences).mean() < 0.05


def test_a_flipped_bit_in_one_process_is_in_the_checksum_of_both(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    for name in engine.report.quantised_modules[-1], engine.report.quantised_modules[0]:
        before = combine(engine.run(in_each_process, codes_sum, f"{name}.weight", 0))
        assert combine(engine.run(in_each_process, codes_sum, f"{name}.weight", 1)) != before
        assert combine(engine.run(in_each_process, codes_sum, f"{name}.weight", 1)) == before


@only_qwen2
def test_noise_is_the_same_in_both_processes_and_gone_afterwards(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    clean, noise = answers(engine.generate(request_of())), Noise(0.05, 5)
    noisy = engine.generate(request_of(noise))
    assert noisy.perturbed_modules == len(engine.report.noise_modules)
    assert len(noisy.usage) == 2
    assert answers(noisy) != clean
    assert answers(noisy) == answers(engine.generate(request_of(noise)))
    assert answers(engine.generate(request_of())) == clean


@only_qwen2
def test_a_refused_load_is_named_as_by_one_process_and_leaves_the_old_weights(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    before = answers(engine.generate(request_of()))
    [*_, name] = engine.shape.tensor_shapes()
    incomplete = {key: tensor for key, tensor in random_tensors(engine.shape, 2).items() if key != name}
    with pytest.raises(ParityError, match=f"did not send {name}"):
        engine.load(payloads(incomplete, model_recipes(engine.config), 2))
    result = engine.generate(request_of())
    assert answers(result) == before
    assert result.groups[0].policy_version == 1


@only_qwen2
def test_both_processes_go_on_with_weights_that_come_in_flight_and_keep_their_noise(engine: EngineProcess) -> None:
    sync(engine, seed=2, version=2)
    whole = answers(engine.generate(request_of(Noise(0.05, 5))))
    sync(engine, seed=1, version=1)
    sent = payloads(random_tensors(engine.shape, 2), model_recipes(engine.config), 2)
    noisy = engine.run(generate_with_offers, request_of(Noise(0.05, 5)), [(1, sent)])
    assert noisy.perturbed_modules == len(engine.report.noise_modules)
    assert {s.drawn_by[:1] for group in noisy.groups for s in group.samples} == {((1, 1),)}
    assert {s.drawn_by[1:] for group in noisy.groups for s in group.samples} >= {((2, 7),)}
    compare_checksums(learner_checksums(sent), engine.run(RolloutWorker.load_offered, 0, sent))
    assert answers(engine.generate(request_of(Noise(0.05, 5)))) == whole


@only_qwen2
def test_a_vocabulary_that_cannot_be_halved_is_named_with_one_that_can(engine: EngineProcess) -> None:
    with pytest.raises(UserError, match=r"has 100 rows; set model\.vocab_size=128"):
        engine.run(check_vocabulary, 100)


@only_qwen2
def test_an_engine_goes_with_a_process_of_it_that_dies(engine: EngineProcess) -> None:
    first, second = engine.run(in_each_process, process_id)
    os.kill(second, signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        engine.run(wait)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(first) and psutil.Process(first).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the other process is left behind"
        time.sleep(0.1)


# Executed in the engine's processes ------------------------------------------------------------------------------


def process_id(_process: Any) -> int:
    return os.getpid()


def wait(_worker: RolloutWorker) -> None:
    time.sleep(30)


def check_vocabulary(_worker: RolloutWorker, rows: int) -> None:
    from mxdist.rollout.engine import check_vocabulary

    check_vocabulary(rows, 2)


def in_each_process(worker: RolloutWorker, function: Any, *arguments: Any) -> list[Any]:
    return worker._engine._llm.collective_rpc(function, args=arguments)


def shapes_held(process: Any) -> dict[str, tuple[tuple[int, ...], tuple[int, int]]]:
    return {
        name: (tuple(slot.values().shape), (slot.division.index, slot.division.count))
        for name, slot in process._mxdist_rank.slots.items()
    }


def codes_sum(process: Any, name: str, flip_in: int) -> int:
    """This process's share, after a bit is flipped in process ``flip_in`` if that is not the first."""
    slot = process._mxdist_rank.slots[name]
    if flip_in and slot.division.index == flip_in:
        slot.parts()["codes"][3, 5] ^= 1
    return slot.checksum("codes")
