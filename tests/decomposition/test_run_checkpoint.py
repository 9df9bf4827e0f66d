"""Checkpoints of runs, read by Hugging Face name without Megatron, against what the learner that saved them exports."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mxdist.config.schema import ModelConfig
from mxdist.decomposition.command import open_source
from mxdist.decomposition.run_checkpoint import RunSource
from mxdist.decomposition.selection import select
from mxdist.decomposition.survey import survey
from mxdist.errors import UserError
from mxdist.quant.recipe import Operand
from tests.model.ranks import DENSE, MOE, RankProcesses


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(2)
    yield processes
    processes.close()


@pytest.mark.parametrize(("model", "count"), [(MOE, 2), (DENSE, 1)])
def test_every_tensor_is_what_the_learner_exports(
    ranks: RankProcesses, tmp_path: Path, model: ModelConfig, count: int
) -> None:
    learner = tmp_path / "checkpoints" / "step_3" / "learner"
    learner.mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_12.partial").mkdir()
    with ranks.learners(model, "bf16", count) as learners:
        payloads = learners.call("export", 0)
        learners.call("save", learner)
        learners.call("save_finished", True)
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
    with pytest.raises(UserError, match="is damaged"):
        open_source(tmp_path)


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        open_source(tmp_path)
