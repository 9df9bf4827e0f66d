"""Loading without vLLM: real slots and real payloads of both sides of the sync benchmark."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mxdist.config import Config
from mxdist.errors import ParityError
from mxdist.messages import ChangedBlocks, WeightPayload
from mxdist.model.division import Division
from mxdist.quant.checksum import combine
from mxdist.rollout.live_weight import LiveWeight
from mxdist.rollout.loading import WeightLoader
from mxdist.rollout.slot import Slot
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import learner_checksums
from tools.bench.sync import SHAPES
from tools.bench.sync_sides import EngineSide, LearnerSide


def config(recipe: str = "mxfp4_mbs_of") -> Config:
    model = SHAPES["tiny"] | {"hidden_size": 128, "num_experts": 4, "num_attention_heads": 8}
    return Config.model_validate({"recipe": recipe, "model": model, "learner": {"ranks": 1, "expert_parallel": 1}})


@pytest.fixture(scope="module")
def learner() -> LearnerSide:
    return LearnerSide(config())


@pytest.fixture(scope="module")
def engine() -> EngineSide:
    return EngineSide(config())


def parts(payload: WeightPayload) -> dict[str, dict[str, np.ndarray]]:
    return {entry.name: entry.parts for entry in payload.entries}


def test_every_part_arrives_as_the_tensors_have_it(learner: LearnerSide, engine: EngineSide) -> None:
    learner.step(1)
    payload = learner.export(1)
    compare_checksums(learner_checksums([payload]), engine.load_weights([payload]))
    for tensor in learner.tensors:
        live = engine.slots[tensor.name].parts()
        expected = {"values": tensor.read()} if tensor.module is None else tensor.quantised()[0].parts()
        assert live.keys() == expected.keys()
        assert all(torch.equal(live[part], expected[part]) for part in live), tensor.name


def test_all_experts_of_a_layer_are_copied_at_once(learner: LearnerSide, engine: EngineSide) -> None:
    arrived = engine.loader.checked([learner.export(2)])
    copies = [copy for plan in arrived.plan.buckets[0] for copy in plan.copies]
    codes = [copy for copy in copies if ".experts." in copy.slot.name and copy.part == "codes"]
    assert len(codes) == 2 * 2  # of each layer gate and up together, and down
    assert all(copy.count == copy.slot.matrix("codes").numel() for copy in codes)


def test_what_changed_since_the_last_version_is_laid_over_it(learner: LearnerSide) -> None:
    engine = EngineSide(config())
    learner.export(1, "delta")
    engine.load_weights([learner.export_again(1)])
    changed = next(tensor for tensor in learner.tensors if tensor.module is None)
    for version in (2, 3):
        with torch.no_grad():
            changed.parameter[0] += 1
        payload = learner.export(version, "delta")
        assert 0 < payload.nbytes < payload.manifest.nbytes / 20
        compare_checksums(learner_checksums([payload]), engine.load_weights([payload]))


def test_a_change_that_went_missing_is_found(learner: LearnerSide) -> None:
    engine = EngineSide(config())
    learner.export(1, "delta")
    engine.load_weights([learner.export_again(1)])
    learner.step(7)
    payload = learner.export(2, "delta")
    assert isinstance(payload.buckets, ChangedBlocks)
    assert payload.buckets.places[0] is None
    first = payload.buckets.blocks[0]
    places, blocks = np.arange(1, len(first), dtype=np.int32), first[1:]  # all but one block
    buckets = replace(
        payload.buckets,
        places=(places, *payload.buckets.places[1:]),
        blocks=(blocks, *payload.buckets.blocks[1:]),
    )
    with pytest.raises(ParityError, match="changed on its way: its checksum is not the learner's"):
        engine.load_weights([replace(payload, buckets=buckets)])


def test_a_bucket_of_fewer_bytes_is_refused(learner: LearnerSide, engine: EngineSide) -> None:
    payload = learner.export(3)
    buckets = (payload.buckets[0][:-16], *payload.buckets[1:])  # type: ignore[index]
    with pytest.raises(ParityError, match=r"bucket 0 of payload 0 came with \d+ of its \d+ bytes"):
        engine.loader.checked([replace(payload, buckets=buckets)])


def test_a_part_without_a_checksum_or_outside_its_bucket_is_refused(learner: LearnerSide, engine: EngineSide) -> None:
    payload = learner.export(4)
    first, *others = payload.manifest.tensors
    unchecked = replace(payload.manifest, tensors=(replace(first, checked=()), *others))
    with pytest.raises(ParityError, match=rf"{first.name}, part values, was sent without a checksum"):
        engine.loader.checked([replace(payload, manifest=unchecked, checksums=payload.checksums[1:])])
    far = {part: replace(place, offset=1 << 40) for part, place in first.parts.items()}
    outside = replace(payload.manifest, tensors=(replace(first, parts=far), *others))
    with pytest.raises(ParityError, match=rf"{first.name}, part values, lies outside bucket"):
        engine.loader.checked([replace(payload, manifest=outside)])


@pytest.mark.parametrize("dimension", [0, 1])
def test_processes_that_divide_a_matrix_hold_their_slices_and_their_checksums_add_up(
    learner: LearnerSide, dimension: int
) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    whole = EngineSide(config())
    rows, columns = whole.slots[name].shape
    payload = learner.export(5)
    whole.load_weights([payload])
    operand = whole.slots[name].owner.operand  # type: ignore[union-attr]
    sums, live = [], []
    for rank in range(2):
        size = (rows // 2, columns) if dimension == 0 else (rows, columns // 2)
        part = LiveWeight(*size, operand, torch.bfloat16)  # type: ignore[arg-type]
        slot = Slot(name, part, slice(0, size[0]), division=Division(dimension, rank, 2))
        loader = WeightLoader(whole.slots | {name: slot}, whole._recipes, torch.device("cpu"))
        sums.append(loader.take(loader.checked([payload]))[name])
        live.append(part)
    expected = learner_checksums([payload])[name]
    assert {part: combine(each[part] for each in sums) for part in expected} == expected
    for part, held in whole.slots[name].parts().items():
        assert torch.equal(torch.cat([weight.parts()[part] for weight in live], dimension), held)
