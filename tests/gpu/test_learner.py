"""The learner on a GPU: experts computed together give what they give one by one, and updates go on from there."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from mxdist.config.schema import Supervised
from mxdist.learner.worker import LearnerWorker
from tests.learner.batches import random_batch
from tests.model.ranks import MOE, RankProcesses

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="the learner needs Megatron-core")

WIDE = MOE.model_copy(update={"hidden_size": 256, "moe_intermediate_size": 128, "dtype": "bfloat16"})


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(1)
    yield processes
    processes.close()


def together_and_one_by_one(worker: LearnerWorker) -> list[list[torch.Tensor]]:
    """Output, the rows' gradient and those of all weights, each way."""
    experts = worker._policy.model.decoder.layers[0].mlp.experts
    linears = [linear for expert in experts.local_experts for linear in (expert.linear_fc1, expert.linear_fc2)]
    generator = torch.Generator("cuda").manual_seed(0)
    rows, dy = (torch.randn(300, 256, device="cuda", generator=generator).bfloat16() for _ in range(2))
    found = []
    for observer in (None, lambda *_: None):  # who is observed is computed one by one
        for linear in linears:
            linear.observer = observer
            linear.weight.main_grad.zero_()
        leaf = rows.clone().requires_grad_()
        output, _ = experts(leaf, torch.tensor([170, 0, 1, 129]), torch.linspace(0.1, 1, 300, device="cuda"))
        output.backward(dy)
        gradients = [linear.weight.main_grad.clone() for linear in linears]
        found.append([each.detach().cpu() for each in (output, leaf.grad, *gradients)])
    for linear in linears:
        linear.observer = None
    return found


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4_g4_nearest", "mxfp4", "mxfp4_mbs_of"])
def test_experts_together_are_experts_one_by_one(recipe: str, ranks: RankProcesses) -> None:
    with ranks.learners(WIDE, recipe) as learners:
        ((together, one_by_one),) = learners.run(together_and_one_by_one)
    for index, (ours, theirs) in enumerate(zip(together, one_by_one, strict=True)):
        # SwiGLU's gradient rounds once together and more often one by one, before a quantiser: some codes come out a
        # step apart, which is much in the gradient of the third expert's first linear, made of a single row.
        bound = 0.15 if index == 2 + 2 * 2 else 5e-2
        assert (ours.double() - theirs.double()).norm() <= bound * theirs.double().norm()
    assert not together[4].any()  # the second expert has no rows


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4_g4_nearest", "mxfp4_mbs_of_g4"])
def test_updates_lower_the_loss_and_export_what_was_multiplied(recipe: str, ranks: RankProcesses) -> None:
    batch = random_batch()
    with ranks.learners(WIDE, recipe) as learners:
        losses = []
        for _ in range(8):
            (report,) = learners.call("update", batch, Supervised(), 1e-3)
            losses.append(report.means["warm_start/loss"].value)
        assert losses[-1] < 0.9 * losses[0]
        (payload,) = learners.call("export", 1)
    assert {entry.kind for entry in payload.entries} == ({"dense"} if recipe == "bf16" else {"dense", "mx"})
