"""The rollout worker with the real vLLM. One engine for each kind of model, each in its own process."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from mxdist.config.schema import Config, ModelConfig
from mxdist.errors import ParityError, UserError
from mxdist.messages import Noise, Prompt, RolloutRequest, RolloutResult, SamplingSettings, WeightPayload
from mxdist.model.recipes import ModelRecipes, model_recipes
from mxdist.model.shape import ModelShape
from mxdist.quant.policy import RecipePolicy
from mxdist.rollout.worker import RolloutWorker
from mxdist.sync.parity import compare_checksums, compare_modules
from mxdist.sync.payload import learner_checksums
from tests.rollout.comparing import answers, logprob_differences, sync
from tests.rollout.engine_process import EngineProcess
from tests.rollout.reference_model import (
    operand_of,
    payloads,
    random_tensors,
    reference_model,
)
from tests.sync.entries import payload_of

MIXED = {
    "recipe": "mxfp4_mbs_of",
    "recipe_overrides": [
        {"modules": "*.0.self_attn.*", "recipe": "bf16"},
        {"modules": "*.down_proj", "recipe": "mxfp4_g4"},
    ],
}
VOCABULARY, STOPS, CONTEXT = 24, (2, 7), 48
CLEAN = Noise(0.0, 0)
# The longer ones fill a block of the KV cache, which vLLM shares between requests and keeps from call to call.
PROMPTS = tuple(
    Prompt(f"train-{i}", (1, *[3 + (5 * i + j * j) % 20 for j in range(length)]), "")
    for i, length in enumerate((4, 5, 34, 6, 7, 36, 5, 8))
)


@pytest.fixture(
    scope="module",
    params=[
        "moe-mxfp4_mbs_of-float32",
        "moe-bf16-float32",
        "dense-mxfp4_mbs_of-bfloat16",
        "moe-mixed-float32",
        "qwen2-mixed-float32",
    ],
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    family, recipe, dtype = request.param.split("-")
    experts = 4 if family == "moe" else 0
    model = ModelConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        dtype=dtype,
        moe_intermediate_size=32,
        intermediate_size=96,
        num_experts=experts,
        max_position_embeddings=CONTEXT,
        family="qwen2" if family == "qwen2" else "qwen3",
        tie_word_embeddings=family == "qwen2",
    )
    recipes = MIXED if recipe == "mixed" else {"recipe": recipe}
    config = Config(model=model, **recipes, learner={"expert_parallel": 2 if experts else 1})
    process = EngineProcess(config, ModelShape(model, VOCABULARY, 1, STOPS, 0), tmp_path_factory.mktemp("engine"))
    yield process
    process.close()


only_quantised_moe = pytest.mark.parametrize("engine", ["moe-mxfp4_mbs_of-float32"], indirect=True)


def request_of(
    prompts: tuple[Prompt, ...] = PROMPTS,
    *,
    samples: int = 2,
    temperature: float = 0.8,
    seed: int = 0,
    noise: Noise = CLEAN,
) -> RolloutRequest:
    return RolloutRequest(0, prompts, SamplingSettings(samples, temperature, 8, seed), noise)


# Every kind of engine --------------------------------------------------------------------------------------------


def test_vllm_finds_the_plugin_through_the_entry_point(engine: EngineProcess) -> None:
    assert engine.found_by_vllm == ["mxdist"]


def test_engine_quantises_exactly_the_projections(engine: EngineProcess) -> None:
    recipes = model_recipes(engine.config)
    expected = [name.removesuffix(".weight") for name in engine.shape.tensor_shapes() if operand_of(name, recipes)]
    assert engine.report.quantised_modules == tuple(sorted(expected))
    compare_modules(expected, engine.report.quantised_modules, engine.config.recipe != "bf16")


def test_noise_goes_to_the_norms_that_feed_linears_and_no_router(engine: EngineProcess) -> None:
    norms = ["input_layernorm"] if engine.shape.is_moe else ["input_layernorm", "post_attention_layernorm"]
    assert engine.report.noise_modules == tuple(f"model.layers.{layer}.{norm}" for layer in (0, 1) for norm in norms)


def test_log_probabilities_equal_a_transformers_model_with_the_same_quantiser(engine: EngineProcess) -> None:
    sync(engine, seed=2, version=1)
    engine.generate(request_of())  # leaves its keys and values in the prefix cache
    tensors = sync(engine, seed=1, version=2)
    result = engine.generate(request_of())
    differences = logprob_differences(engine, tensors, result, 0.8)
    assert len(differences) > 60
    if engine.config.model.dtype == "bfloat16":
        assert np.abs(differences).mean() < 0.1
    else:
        sizes = np.sort(np.abs(differences))
        assert sizes[-2] < 1e-4
        assert sizes[-1] < 0.05  # one number at the very edge between two codes may fall to either side


def test_loading_a_then_b_then_a_gives_the_answers_of_a_again(engine: EngineProcess) -> None:
    first, between, again = [], [], []
    for seed, kept in ((1, first), (2, between), (1, again)):
        sync(engine, seed, version=seed)
        kept += answers(engine.generate(request_of()))
    assert first == again
    assert first != between


# One of them, in depth -------------------------------------------------------------------------------------------


@only_quantised_moe
def test_groups_keep_the_prompts_order_and_carry_version_and_sigma(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=7)
    result = engine.generate(request_of(samples=2, noise=Noise(0.01, 5)))
    assert [group.prompt for group in result.groups] == list(PROMPTS)
    assert {(len(g.samples), g.policy_version, g.sigma) for g in result.groups} == {(2, 7, 0.01)}
    samples = [sample for group in result.groups for sample in group.samples]
    assert result.entropy.tokens == sum(len(sample.tokens) for sample in samples)
    assert result.entropy.total == pytest.approx(-sum(float(sample.logprobs.sum()) for sample in samples), rel=1e-5)
    for sample in samples:
        assert sample.finished == (sample.tokens[-1] in STOPS)
        assert not set(STOPS) & set(sample.tokens[:-1].tolist())
        assert sample.finished or len(sample.tokens) == 8


@only_quantised_moe
def test_a_sample_depends_on_its_own_seed_only(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    forwards = engine.generate(request_of())
    backwards = engine.generate(request_of(PROMPTS[::-1]))
    alone = engine.generate(request_of(PROMPTS[2:3]))
    tokens = {g.prompt.key: [s.tokens.tolist() for s in g.samples] for g in forwards.groups}
    assert tokens == {g.prompt.key: [s.tokens.tolist() for s in g.samples] for g in backwards.groups}
    assert tokens[PROMPTS[2].key] == [s.tokens.tolist() for s in alone.groups[0].samples]
    assert answers(forwards) == answers(engine.generate(request_of()))
    assert answers(forwards) != answers(engine.generate(request_of(seed=1)))


@only_quantised_moe
def test_greedy_answers_are_the_most_likely_tokens_and_all_alike(engine: EngineProcess) -> None:
    tensors = sync(engine, seed=1, version=1)
    model = reference_model(engine.shape, tensors, model_recipes(engine.config))
    for group in engine.generate(request_of(samples=2, temperature=0.0)).groups:
        first, second = (sample.tokens.tolist() for sample in group.samples)
        assert first == second
        with torch.no_grad():
            logits = model(torch.tensor([[*group.prompt.tokens, *first]])).logits[0, len(group.prompt.tokens) - 1 : -1]
        assert logits.argmax(-1).tolist() == first


@only_quantised_moe
def test_tokens_are_drawn_with_the_probabilities_that_are_reported(engine: EngineProcess) -> None:
    tensors, count = sync(engine, seed=1, version=1), 3000
    [group] = engine.generate(request_of(PROMPTS[:1], samples=count)).groups
    first = torch.tensor([int(sample.tokens[0]) for sample in group.samples])
    model = reference_model(engine.shape, tensors, model_recipes(engine.config))
    with torch.no_grad():
        expected = count * (model(torch.tensor([PROMPTS[0].tokens])).logits[0, -1] / 0.8).softmax(-1)
    common = expected >= 5
    drawn = torch.bincount(first, minlength=VOCABULARY)
    chi_square = ((drawn - expected) ** 2 / expected)[common].sum().item()
    assert common.sum() > 5
    assert chi_square < common.sum() + 5 * (2 * common.sum()) ** 0.5  # mean and five deviations


@only_quantised_moe
def test_greedy_decoding_refuses_noise(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    with pytest.raises(ValueError, match="evaluation is clean"):
        engine.generate(request_of(temperature=0.0, noise=Noise(0.01, 5)))


@only_quantised_moe
def test_a_prompt_that_leaves_no_room_is_named_with_both_lengths(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    fits = Prompt("fits", (1,) * (CONTEXT - 1), "")
    [group] = engine.generate(request_of((fits,))).groups
    assert {len(sample.tokens) for sample in group.samples} == {1}
    with pytest.raises(UserError, match=f"train-9 has {CONTEXT} tokens, but at most {CONTEXT - 1} fit"):
        engine.generate(request_of((Prompt("train-9", (1,) * CONTEXT, ""),)))


@only_quantised_moe
def test_noise_changes_the_answers_and_leaves_every_bit_of_the_weights_as_it_was(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    before, clean = engine.run(live_checksums), engine.generate(request_of())
    noisy = engine.generate(request_of(noise=Noise(0.05, 5)))
    assert noisy.perturbed_modules == 2
    assert clean.perturbed_modules == 0
    assert answers(noisy) != answers(clean)
    assert answers(noisy) == answers(engine.generate(request_of(noise=Noise(0.05, 5))))
    assert answers(noisy) != answers(engine.generate(request_of(noise=Noise(0.05, 6))))
    assert engine.run(live_checksums) == before
    assert answers(engine.generate(request_of())) == answers(clean)


@only_quantised_moe
def test_noise_touches_the_listed_norms_and_nothing_else(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    clean, noisy = engine.run(live_checksums), engine.run(live_checksums_under_noise, Noise(0.05, 5))
    changed = [name.removesuffix(".weight") for name in clean if clean[name] != noisy[name]]
    assert tuple(sorted(changed)) == engine.report.noise_modules


@only_quantised_moe
def test_parity_finds_one_flipped_bit_in_the_live_buffers(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    sent = payloads(random_tensors(engine.shape, 1), model_recipes(engine.config), 1)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    engine.run(flip_bit, name, "residual_codes")
    with pytest.raises(ParityError, match=rf"disagree about {name}, part residual_codes: .*; 1 of \d+ tensors differ"):
        compare_checksums(learner_checksums(sent), engine.run(live_checksums))
    engine.run(flip_bit, name, "residual_codes")
    engine.run(flip_bit, name, "values")
    with pytest.raises(ParityError, match=rf"disagree about {name}, part values"):
        compare_checksums(learner_checksums(sent), engine.run(live_checksums))


def spoil_entry(sent: list[WeightPayload], **changes: object) -> list[WeightPayload]:
    """The first quantised entry of the last rank, changed."""
    *others, last = sent
    at = next(i for i, entry in enumerate(last.entries) if entry.kind == "mx")
    entries = list(last.entries)
    entries[at] = replace(entries[at], **{k: v(entries[at]) if callable(v) else v for k, v in changes.items()})
    return [*others, payload_of(last.version, last.recipes, entries)]


SPOILT = {
    "did not send lm_head.weight": lambda sent: [
        payload_of(
            payload.version, payload.recipes, [entry for entry in payload.entries if entry.name != "lm_head.weight"]
        )
        for payload in sent
    ],
    "sent model.layers.9.weight, which the model does not have": lambda sent: spoil_entry(
        sent, name="model.layers.9.weight"
    ),
    "twice": lambda sent: [*sent, sent[0]],
    "with shape": lambda sent: spoil_entry(sent, shape=lambda entry: (entry.shape[0] + 1, entry.shape[1])),
    "with the parts": lambda sent: spoil_entry(
        sent, parts=lambda entry: entry.parts | {"zero_points": entry.parts["scales"]}
    ),
    "part codes, was sent as": lambda sent: spoil_entry(
        sent, parts=lambda entry: entry.parts | {"codes": entry.parts["codes"][1:]}
    ),
    "sent as dense": lambda sent: spoil_entry(sent, kind="dense"),
    "payload 1 is of recipe mxfp4, the engine is of recipe mxfp4_mbs_of": lambda sent: [
        sent[0],
        replace(sent[1], recipes=ModelRecipes(RecipePolicy("mxfp4"), 2).to_dict()),
    ],
    r"payload 0 is of recipe mxfp4_mbs_of \(bf16 for \*.down_proj, bf16 for the first 1 layers\)": lambda sent: [
        replace(payload, recipes=ModelRecipes(RecipePolicy("mxfp4_mbs_of", (("*.down_proj", "bf16"),), 1), 2).to_dict())
        for payload in sent
    ],
    "or the two differ in what a recipe means": lambda sent: [
        sent[0],
        replace(sent[1], recipes=sent[1].recipes | {"recipes": {"mxfp4": {"name": "mxfp4"}}}),
    ],
    "has version 8": lambda sent: [sent[0], replace(sent[1], version=8)],
    "part scales, holds a NaN": lambda sent: spoil_entry(
        sent, parts=lambda entry: entry.parts | {"scales": np.full_like(entry.parts["scales"], 255)}
    ),
    "part codes, changed on its way": lambda sent: spoil_entry(
        sent, parts=lambda entry: entry.parts | {"codes": entry.parts["codes"] ^ (np.arange(32) == 5)}
    ),
    "without payloads": lambda _sent: [],
}


@only_quantised_moe
@pytest.mark.parametrize("complaint", SPOILT)
def test_a_failed_load_names_the_fault_and_leaves_the_old_weights_whole(engine: EngineProcess, complaint: str) -> None:
    sync(engine, seed=1, version=1)
    before = engine.run(live_checksums)
    sent = payloads(random_tensors(engine.shape, 2), model_recipes(engine.config), 9)
    with pytest.raises(ParityError, match=complaint):
        engine.load(SPOILT[complaint](sent))
    assert engine.run(live_checksums) == before
    assert engine.generate(request_of(PROMPTS[:1], samples=1)).groups[0].policy_version == 1


@only_quantised_moe
def test_a_copy_that_fails_half_way_leaves_nothing_to_sample_with_until_the_next_sync(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    sent = payloads(random_tensors(engine.shape, 2), model_recipes(engine.config), 2)
    with pytest.raises(OSError, match="half-way"):
        engine.run(load_and_fail_half_way, sent)
    with pytest.raises(RuntimeError, match="before any weights"):
        engine.generate(request_of(PROMPTS[:1]))
    sync(engine, seed=1, version=3)
    assert engine.generate(request_of(PROMPTS[:1])).groups[0].policy_version == 3


@pytest.mark.parametrize("engine", ["dense-mxfp4_mbs_of-bfloat16"], indirect=True)
def test_a_load_that_a_bfloat16_engine_would_round_is_refused(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    tensors = random_tensors(engine.shape, 2)
    name = "model.layers.1.self_attn.q_norm.weight"
    tensors[name] = tensors[name].float() + 1e-6
    with pytest.raises(ParityError, match=rf"{name}, part values, was sent as torch.float32 .* cannot hold"):
        engine.load(payloads(tensors, model_recipes(engine.config), 2))


@only_quantised_moe
def test_nothing_is_generated_before_weights_have_come(engine: EngineProcess) -> None:
    with pytest.raises(RuntimeError, match="before any weights"):
        engine.run(generate_as_if_fresh, request_of())


@only_quantised_moe
def test_a_head_size_the_attention_lacks_is_named_with_those_it_has(engine: EngineProcess) -> None:
    with pytest.raises(UserError, match=r"head_dim=16 .* choose one of 32, 64"):
        engine.run(check_head_size, 16)
    engine.run(check_head_size, 32)


# Bytes alone, as on a GPU; last, because values do not come back ------------------------------------------------


@pytest.mark.parametrize("engine", ["moe-mxfp4_mbs_of-float32", "qwen2-mixed-float32"], indirect=True)
def test_an_engine_that_keeps_bytes_alone_gives_the_same_answers_and_checksums(engine: EngineProcess) -> None:
    sync(engine, seed=1, version=1)
    before, checksums = answers(engine.generate(request_of())), engine.run(live_checksums)
    kept = engine.run(drop_values)
    assert kept < engine.report.bytes_per_quantised_weight - 3.9, "float32 values beside the bytes are gone"
    assert engine.run(live_checksums) == checksums
    assert answers(engine.generate(request_of())) == before
    sync(engine, seed=2, version=2)
    assert answers(engine.generate(request_of())) != before
    sync(engine, seed=1, version=3)
    assert answers(engine.generate(request_of())) == before


# Executed in the engine's process --------------------------------------------------------------------------------


def live_checksums(worker: RolloutWorker) -> dict[str, dict[str, int]]:
    return {name: slot.checksums() for name, slot in worker._slots.items()}


def live_checksums_under_noise(worker: RolloutWorker, noise: Noise) -> dict[str, dict[str, int]]:
    with worker._engine.rank.injector.perturbed(noise):
        return live_checksums(worker)


def flip_bit(worker: RolloutWorker, name: str, part: str) -> None:
    slot = worker._slots[name]
    (slot.parts() | {"values": slot.values()})[part].view(torch.uint8)[3, 5] ^= 1


def load_and_fail_half_way(worker: RolloutWorker, sent: list[WeightPayload]) -> None:
    """As if there were no memory to make one weight's values of its new bytes."""
    owner = next(slot.owner for slot in worker._slots.values() if slot.kind == "mx")
    owner.refresh = fail_half_way
    try:
        worker.load_weights(sent)
    finally:
        del owner.refresh


def fail_half_way() -> None:
    raise OSError("half-way")


def drop_values(worker: RolloutWorker) -> float:
    from mxdist.rollout.slots import bytes_per_element

    for slot in worker._slots.values():
        if slot.kind == "mx":
            slot.owner.drop_values()
    return bytes_per_element(worker._slots)


def generate_as_if_fresh(worker: RolloutWorker, request: RolloutRequest) -> RolloutResult:
    version, worker._version = worker._version, -1
    try:
        return worker.generate(request)
    finally:
        worker._version = version


def check_head_size(_worker: RolloutWorker, head_dim: int) -> None:
    from mxdist.rollout.engine import check_head_dim

    check_head_dim(head_dim)
