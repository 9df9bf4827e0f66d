"""However a model is divided over ranks, the payloads are those of a single rank, byte for byte."""

from collections.abc import Iterator

import numpy as np
import pytest

from mxdist.messages import TensorEntry, WeightPayload
from tests.model.ranks import DENSE, MOE, RankProcesses

# Two macro-blocks along every axis that tensor parallelism divides.
WIDE = {"head_dim": 64, "intermediate_size": 256, "initializer_range": 0.3}
TIED = DENSE.model_copy(update=WIDE | {"hidden_size": 256, "family": "qwen2", "tie_word_embeddings": True})
EXPERTS = MOE.model_copy(update=WIDE)
LAYOUTS = {
    "TP2": (TIED, {"tensor_parallel": 2}),
    "PP2": (TIED, {"pipeline_parallel": 2}),
    "EP2": (EXPERTS, {"expert_parallel": 2}),
    "TP2 EP2": (EXPERTS, {"tensor_parallel": 2, "expert_parallel": 2}),
}
# The recipe with every part in all layouts; those with fewer where all that can be divided is.
CASES = [(layout, recipe) for layout in LAYOUTS for recipe in ("bf16", "mxfp4_mbs_of")]
CASES += [(layout, recipe) for layout in ("TP2", "TP2 EP2") for recipe in ("mxfp4", "mxfp4_mbs", "mxfp4_of")]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(2)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def undivided() -> dict[tuple[bool, str], WeightPayload]:
    """Payloads of one rank, by whether the model has experts and by recipe, as they are first needed."""
    return {}


def entries_of(payloads: list[WeightPayload]) -> dict[str, TensorEntry]:
    found = [(entry.name, entry) for payload in payloads for entry in payload.entries]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize(("layout", "recipe"), CASES)
def test_payloads_do_not_depend_on_the_layout(
    ranks: RankProcesses, undivided: dict[tuple[bool, str], WeightPayload], layout: str, recipe: str
) -> None:
    model, settings = LAYOUTS[layout]
    key = (model is EXPERTS, recipe)
    if key not in undivided:
        with ranks.learners(model, recipe) as learners:
            [undivided[key]] = learners.call("export", 5)
    with ranks.learners(model, recipe, 2, **settings) as learners:
        payloads = learners.call("export", 5)
    expected, found = entries_of([undivided[key]]), entries_of(payloads)
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        assert (found[name].kind, found[name].shape, found[name].checksums) == (
            entry.kind,
            entry.shape,
            entry.checksums,
        )
        assert found[name].parts.keys() == entry.parts.keys()
        for part, array in entry.parts.items():
            np.testing.assert_array_equal(found[name].parts[part], array, err_msg=name)
    assert {entry.kind for entry in found.values()} == ({"dense"} if recipe == "bf16" else {"dense", "mx"})
