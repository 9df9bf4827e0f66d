"""Tokens go to the ranks of their experts as packed bytes, and nothing but the traffic is another for it."""

from typing import Any

import numpy as np
import pytest
import torch

from mxdist.config.schema import Grpo
from mxdist.learner.worker import LearnerWorker
from mxdist.model.moe_layer import MxMoELayer
from tests.learner.batches import random_batch
from tests.model.ranks import MOE, Learners, RankProcesses

_sent: list[tuple[torch.dtype, int]] = []
_all_to_all = torch.distributed.all_to_all_single


def count_traffic(worker: LearnerWorker) -> None:  # noqa: ARG001
    """Note every all-to-all of this process until ``traffic`` asks: dtype, and bytes of a row."""

    def counted(output: torch.Tensor, given: torch.Tensor, *rest: Any, **options: Any) -> Any:
        _sent.append((given.dtype, given[:1].nbytes))
        return _all_to_all(output, given, *rest, **options)

    _sent.clear()
    torch.distributed.all_to_all_single = counted


def traffic(worker: LearnerWorker) -> set[tuple[torch.dtype, int]]:  # noqa: ARG001
    torch.distributed.all_to_all_single = _all_to_all
    return {(dtype, size) for dtype, size in _sent if size > 8}  # not the probabilities


def send_as_they_are(worker: LearnerWorker) -> None:
    for module in worker._policy.model.modules():
        if isinstance(module, MxMoELayer):
            module._sent_as = lambda: None


def trained(learners: Learners) -> list[Any]:
    batch = random_batch(12, seed=1)
    reports = learners.call("update", batch, Grpo(prompts_per_step=4, samples_per_prompt=3), 1e-2)
    scores = learners.call("score", batch)
    return [*[(report.means, report.grad_norm) for report in reports], *scores]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, np.ndarray):
            assert np.array_equal(one, other)
        else:
            assert one == other


def test_packed_dispatch_trains_bit_for_bit_as_sending_tokens_as_they_are(ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "mxfp4", ranks=2) as learners:
        learners.run(count_traffic)
        packed = trained(learners)
        sent = learners.run(traffic)
    with ranks.learners(MOE, "mxfp4", ranks=2) as learners:
        learners.run(send_as_they_are)
        assert_same(packed, trained(learners))
    forward, backward = (torch.uint8, MOE.hidden_size * 17 // 32), (torch.float32, MOE.hidden_size * 4)
    assert all(found == {forward, backward} for found in sent)


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4_mbs", "mxfp4_g4"])
def test_tokens_that_experts_need_as_they_are_are_sent_so(recipe: str, ranks: RankProcesses) -> None:
    with ranks.learners(MOE, recipe, ranks=2) as learners:
        learners.run(count_traffic)
        trained(learners)
        assert all(found == {(torch.float32, MOE.hidden_size * 4)} for found in learners.run(traffic))
