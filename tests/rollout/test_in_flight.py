"""Weights that an engine takes while it samples, with the real vLLM: which token is whose, and what is left alone."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from mxdist.config.schema import Config, ModelConfig
from mxdist.errors import ParityError, SyncInterrupted
from mxdist.messages import (
    ChangedBlocks,
    Noise,
    Prompt,
    RolloutRequest,
    RolloutResult,
    Sample,
    SamplingSettings,
    WeightPayload,
)
from mxdist.model.recipes import model_recipes
from mxdist.model.shape import ModelShape
from mxdist.rollout.arrivals import Arrivals
from mxdist.rollout.worker import RolloutWorker
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import learner_checksums
from tests.rollout.comparing import answers, sync
from tests.rollout.engine_process import EngineProcess
from tests.rollout.offering import Scripted, generate_with_offers
from tests.rollout.reference_model import answer_logprobs, payloads, random_tensors, reference_model

VOCABULARY, NEVER, CONTEXT, LENGTH = 24, 23, 80, 24
CLEAN, NOISE = Noise(0.0, 0), Noise(0.05, 5)
# The longer ones fill blocks of the KV cache.
PROMPTS = tuple(
    Prompt(f"train-{i}", (1, *[3 + (5 * i + j * j) % 20 for j in range(length)]), "")
    for i, length in enumerate((4, 34))
)
ROLLOUT = {"max_lag": 1, "kv_cache_mib": 1}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    model = ModelConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_intermediate_size=32,
        num_experts=4,
        max_position_embeddings=CONTEXT,
    )
    config = Config(model=model, recipe="mxfp4_mbs_of", rollout=ROLLOUT, sync={"update": "in_flight"})
    process = EngineProcess(config, ModelShape(model, VOCABULARY, 1, (NEVER,), 0), tmp_path_factory.mktemp("engine"))
    yield process
    process.close()


def request_of(
    prompts: tuple[Prompt, ...] = PROMPTS, temperature: float = 0.8, noise: Noise = CLEAN, length: int = LENGTH
) -> RolloutRequest:
    return RolloutRequest(0, prompts, SamplingSettings(2, temperature, length, 0), noise)


def payloads_of(engine: EngineProcess, seed: int, version: int) -> list[WeightPayload]:
    return payloads(random_tensors(engine.shape, seed), model_recipes(engine.config), version)


def all_samples(result: RolloutResult) -> list[tuple[Prompt, Sample]]:
    return [(group.prompt, sample) for group in result.groups for sample in group.samples]


def assert_small(differences: np.ndarray) -> None:
    """Of log-probabilities. Another order of a sum may move an activation to the next code, if seldom."""
    assert np.quantile(differences, 0.9) < 1e-5
    assert differences.max() < 0.02


def test_each_token_is_drawn_by_the_version_that_it_is_said_to_be_drawn_by(engine: EngineProcess) -> None:
    tensors = {version: random_tensors(engine.shape, version) for version in (1, 2, 3)}
    models = {v: reference_model(engine.shape, tensors[v], model_recipes(engine.config)) for v in tensors}
    sync(engine, seed=1, version=1)
    result = engine.run(
        generate_with_offers, request_of(), [(7, payloads_of(engine, 2, 2)), (9, payloads_of(engine, 3, 3))]
    )
    assert {group.policy_version for group in result.groups} == {1}
    assert result.preemptions == 0  # new weights are no want of room
    differences = []
    for prompt, sample in all_samples(result):
        ends = np.cumsum([count for _, count in sample.drawn_by])
        assert ends[-1] == len(sample.tokens)
        if len(sample.tokens) > 9:
            assert sample.drawn_by[:2] == ((1, 7), (2, 2))
            assert sample.drawn_by[2][0] == 3
        scores = {v: answer_logprobs(models[v], prompt.tokens, sample.tokens.tolist(), 0.8).numpy() for v in models}
        for (version, count), end in zip(sample.drawn_by, ends, strict=True):
            drawn = slice(end - count, end)  # every key and value behind it is of this version as well
            differences.append(np.abs(sample.logprobs[drawn] - scores[version][drawn]))
    assert len(np.concatenate(differences)) > 40
    assert_small(np.concatenate(differences))
    assert np.abs(scores[3] - scores[1]).max() > 0.1


def test_answers_go_on_exactly_as_those_of_an_engine_that_was_given_the_tokens_so_far(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    old = engine.generate(request_of(temperature=0.0))
    sync(engine, seed=1, version=1)
    swapped = engine.run(generate_with_offers, request_of(temperature=0.0), [(5, payloads_of(engine, 2, 2))])
    sync(engine, seed=2, version=2)
    for (prompt, sample), (_, before) in zip(all_samples(swapped), all_samples(old), strict=True):
        assert sample.tokens[:5].tolist() == before.tokens[:5].tolist()
        longer = Prompt(prompt.key, (*prompt.tokens, *sample.tokens[:5].tolist()), "")
        [group] = engine.generate(request_of((longer,), temperature=0.0, length=LENGTH - 5)).groups
        assert sample.tokens[5:].tolist() == group.samples[0].tokens.tolist()
        assert_small(np.abs(sample.logprobs[5:] - group.samples[0].logprobs))


def test_an_update_that_changes_no_weight_changes_no_draw(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    undisturbed = engine.generate(request_of())
    result = engine.run(
        generate_with_offers, request_of(), [(step, payloads_of(engine, 1, step)) for step in (2, 3, 9)]
    )
    for (_, sample), (_, expected) in zip(all_samples(result), all_samples(undisturbed), strict=True):
        assert sample.tokens.tolist() == expected.tokens.tolist()
        assert_small(np.abs(sample.logprobs - expected.logprobs))


def test_a_request_that_is_put_off_for_want_of_room_draws_what_it_would_have_drawn(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    prompts = tuple(replace(PROMPTS[0], key=f"train-{i}") for i in range(40))
    result, put_off = engine.run(generate_and_count_those_put_off, request_of(prompts, length=70))
    assert result.preemptions == put_off > 5
    few = [engine.generate(request_of(prompts[start : start + 16], length=70)) for start in range(0, len(prompts), 16)]
    expected = [sample for each in few for _, sample in all_samples(each)]
    same = [
        (np.abs(sample.logprobs - other.logprobs))
        for (_, sample), other in zip(all_samples(result), expected, strict=True)
        if sample.tokens.tolist() == other.tokens.tolist()
    ]
    assert len(same) >= len(expected) - 2  # another order of a sum may turn a draw, if seldom
    assert_small(np.concatenate(same))


def test_what_is_sampled_next_uses_no_key_of_the_old_weights(engine: EngineProcess) -> None:
    sync(engine, seed=2, version=2)
    expected = answers(engine.generate(request_of()))
    sync(engine, seed=1, version=1)
    engine.run(generate_with_offers, request_of(), [(LENGTH - 1, payloads_of(engine, 2, 2))])
    assert answers(engine.generate(request_of())) == expected


def test_weights_that_come_before_the_first_step_draw_every_token(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    result = engine.run(generate_with_offers, request_of(), [(0, payloads_of(engine, 2, 2))])
    assert {group.policy_version for group in result.groups} == {2}
    assert all(sample.drawn_by == ((2, len(sample.tokens)),) for _, sample in all_samples(result))


def test_the_push_that_was_taken_in_flight_reports_what_lies_in_the_live_buffers(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    sent = payloads_of(engine, 2, 2)
    engine.run(generate_with_offers, request_of(), [(3, sent)])
    compare_checksums(learner_checksums(sent), engine.run(RolloutWorker.load_offered, 0, sent))
    # The next was not offered, or came too late to be taken: it is loaded in its turn, and then offered no more.
    sent = payloads_of(engine, 3, 3)
    compare_checksums(learner_checksums(sent), engine.run(RolloutWorker.load_offered, 1, sent))
    engine.run(RolloutWorker.offer_weights, 1, payloads_of(engine, 1, 1))
    assert {group.policy_version for group in engine.generate(request_of()).groups} == {3}


def test_weights_that_fail_a_check_leave_the_answers_to_the_old_ones_and_are_complained_of_in_their_turn(
    engine: EngineProcess,
) -> None:
    sync(engine, seed=1, version=1)
    undisturbed = answers(engine.generate(request_of()))
    before = engine.run(live_checksums)
    spoilt = payloads_of(engine, 2, 2)[:-1]
    result = engine.run(generate_with_offers, request_of(), [(5, spoilt)])
    assert answers(result) == undisturbed
    assert {group.policy_version for group in result.groups} == {1}
    assert engine.run(live_checksums) == before
    with pytest.raises(ParityError, match="did not send"):
        engine.run(RolloutWorker.load_offered, 0, spoilt)
    assert answers(engine.generate(request_of())) == undisturbed


def all_of(payload: WeightPayload) -> ChangedBlocks:
    """Its buckets as what changed since weights that nobody has."""
    assert isinstance(payload.buckets, tuple)
    return ChangedBlocks("of nobody", (None,) * len(payload.buckets), payload.buckets)


def test_changes_of_weights_that_an_engine_does_not_have_are_refused_until_it_is_given_all(
    engine: EngineProcess,
) -> None:
    sync(engine, seed=1, version=1)
    undisturbed = answers(engine.generate(request_of()))
    sent = [replace(payload, key=str(rank)) for rank, payload in enumerate(payloads_of(engine, 2, 2))]
    changes = [replace(payload, buckets=all_of(payload)) for payload in sent]
    result = engine.run(generate_with_offers, request_of(), [(5, changes)])
    assert answers(result) == undisturbed
    with pytest.raises(SyncInterrupted, match="changed since weights that this engine does not have"):
        engine.run(RolloutWorker.load_offered, 0, changes)
    with pytest.raises(SyncInterrupted, match="changed since weights that this engine does not have"):
        engine.generate(request_of())
    compare_checksums(learner_checksums(sent), engine.run(RolloutWorker.load_offered, 0, sent))
    assert {group.policy_version for group in engine.generate(request_of()).groups} == {2}


def test_noise_is_on_the_new_weights_as_it_was_on_the_old_and_goes_with_the_batch(engine: EngineProcess) -> None:
    sync(engine, seed=2, version=2)
    clean, noisy = engine.run(live_checksums), engine.run(live_checksums_under_noise, NOISE)
    expected = engine.generate(request_of(noise=NOISE))
    sync(engine, seed=1, version=1)
    found, result = engine.run(checksums_after_offer, request_of(noise=NOISE), payloads_of(engine, 2, 2))
    assert found == noisy
    assert noisy != clean
    assert engine.run(live_checksums) == clean
    assert (result.perturbed_modules, expected.perturbed_modules) == (2, 2)
    assert answers(engine.generate(request_of(noise=NOISE))) == answers(expected)


def test_live_weights_that_are_not_what_was_sent_draw_nothing(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    with pytest.raises(ParityError, match=r"disagree about model\.norm\.weight"):
        engine.run(generate_while_a_write_goes_wrong, request_of(), payloads_of(engine, 2, 2))
    with pytest.raises(RuntimeError, match="before any weights"):
        engine.generate(request_of())
    sync(engine, seed=1, version=1)  # and the requests that were given up are gone
    assert {len(s.tokens) for _, s in all_samples(engine.generate(request_of(length=2)))} <= {1, 2}


def test_an_offer_is_taken_once_and_not_after_its_turn() -> None:
    arrivals = Arrivals()
    first: list[WeightPayload] = []
    second: list[WeightPayload] = []
    arrivals.offer(0, first)
    arrivals.offer(1, second)
    assert arrivals.take() == (0, first)
    arrivals.settle(0, ValueError("no"))
    assert isinstance(arrivals.close(0), ValueError)
    assert arrivals.close(1) is None
    assert arrivals.take() is None
    arrivals.offer(1, second)
    assert arrivals.take() is None


def test_what_was_taken_ahead_of_an_older_push_is_loaded_once_more() -> None:
    # A process that replaced another is offered the newest push alone; older ones come in their turn, after it.
    arrivals = Arrivals()
    arrivals.offer(3, [])
    assert arrivals.take() == (3, [])
    arrivals.settle(3, {})
    assert arrivals.close(2) is None  # loads 2 over 3
    assert arrivals.close(3) is None  # so that 3 has to be loaded again


# Executed in the engine's process --------------------------------------------------------------------------------


def generate_and_count_those_put_off(worker: RolloutWorker, request: RolloutRequest) -> tuple[RolloutResult, int]:
    scheduler = worker._engine._llm.llm_engine.engine_core.engine_core.scheduler
    put_off, found = scheduler._preempt_request, 0

    def counted(*args: object, **kwargs: object) -> None:
        nonlocal found
        found += 1
        put_off(*args, **kwargs)

    scheduler._preempt_request = counted
    try:
        return worker.generate(request), found
    finally:
        del scheduler._preempt_request


def live_checksums(worker: RolloutWorker) -> dict[str, dict[str, int]]:
    return {name: slot.checksums() for name, slot in worker._slots.items()}


def live_checksums_under_noise(worker: RolloutWorker, noise: Noise) -> dict[str, dict[str, int]]:
    with worker._engine.rank.injector.perturbed(noise):
        return live_checksums(worker)


def checksums_after_offer(
    worker: RolloutWorker, request: RolloutRequest, sent: list[WeightPayload]
) -> tuple[dict[str, dict[str, int]], RolloutResult]:
    """Of the live weights while the answers go on with new ones."""
    found: dict[str, dict[str, int]] = {}

    def look(step: int) -> None:
        if step == 6:
            found.update(live_checksums(worker))

    worker._arrivals = Scripted([(5, sent)], look)
    return found, worker.generate(request)


def generate_while_a_write_goes_wrong(
    worker: RolloutWorker, request: RolloutRequest, sent: list[WeightPayload]
) -> None:
    """As if the copy of one tensor had missed its place."""
    loader = worker._engine.rank._loader
    write = loader.write

    def miss(arrived: object) -> None:
        write(arrived)
        [values] = worker._slots["model.norm.weight"].parts().values()
        values += torch.ones_like(values)

    loader.write = miss
    try:
        generate_with_offers(worker, request, [(5, sent)])
    finally:
        del loader.write
