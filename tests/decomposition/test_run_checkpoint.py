"""Checkpoints of runs, read by Hugging Face name without Megatron, against what the learner that saved them exports."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mxdist.config.schema import ModelConfig
from mxdist.control.checkpoints import CheckpointStore, ControllerState
from mxdist.decomposition.command import open_source
from mxdist.decomposition.run_checkpoint import RunSource
from mxdist.decomposition.selection import select
from mxdist.decomposition.survey import survey
from mxdist.errors import UserError
from mxdist.quant.recipe import Operand
from tests.model.ranks import DENSE, MOE, Learners, RankProcesses


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(2)
    yield processes
    processes.close()


def save(learners: Learners, store: CheckpointStore, step: int) -> Path:
    """The folder of a complete checkpoint."""
    partial = store.begin(step)
    learners.call("save", partial / "learner")
    learners.call("save_finished", True)
    return store.complete(partial, ControllerState(step, {}, {}, 10, "bf16", {}))


@pytest.mark.parametrize(("model", "count"), [(MOE, 2), (DENSE, 1)])
def test_every_tensor_is_what_the_learner_exports(
    ranks: RankProcesses, tmp_path: Path, model: ModelConfig, count: int
) -> None:
    store = CheckpointStore(tmp_path)
    with ranks.learners(model, "bf16", count) as learners:
        payloads = learners.call("export", 0)
        learner = save(learners, store, 3) / "learner"
    store.begin(12)
    exported = {entry.name: entry.parts["values"] for payload in payloads for entry in payload.entries}
    source = open_source(tmp_path)
    assert isinstance(source, RunSource)
    assert source.title.endswith("(step_3)")
    assert {tensor.name: tensor.shape for tensor in source.tensors} == {k: v.shape for k, v in exported.items()}
    for tensor in source.tensors:
        with source.open(tensor.place) as read:
            values = read(tensor.name, tuple(slice(0, length) for length in tensor.shape))
        np.testing.assert_array_equal(values.numpy(), exported[tensor.name])
    linears, _ = select(source.tensors)
    results = survey(source, linears, {"mxfp4": Operand()}, workers=2)
    assert sum(result.moments["mxfp4"].elements for result in results) == sum(
        values.size for name, values in exported.items() if "_proj" in name
    )
    stored = sorted(learner.glob("*.distcp"))
    stored[0].write_bytes(stored[0].read_bytes()[:100])
    with pytest.raises(UserError, match=r"in the checkpoint .*step_3/learner is missing or damaged"):
        survey(source, linears, {"mxfp4": Operand()})
    (learner / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"the checkpoint .*step_3/learner is damaged"):
        open_source(learner.parent)
    with pytest.raises(UserError, match=r"every checkpoint in .*checkpoints is damaged"):
        open_source(tmp_path)


def test_a_damaged_checkpoint_is_passed_over_as_by_resume(
    ranks: RankProcesses, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path)
    with ranks.learners(DENSE, "bf16", 1) as learners:
        _, newest = save(learners, store, 3), save(learners, store, 12)
    assert open_source(tmp_path).title.endswith("(step_12)")
    victim = min((newest / "learner").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    capfd.readouterr()
    assert open_source(tmp_path).title.endswith("(step_3)")
    [note] = capfd.readouterr().err.splitlines()
    assert "step_12 is passed over: the checksum of learner/" in note


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        open_source(tmp_path)
