"""The Megatron model is the Hugging Face model: same tensors, same function."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mxdist.config.schema import ModelConfig
from mxdist.learner.worker import LearnerWorker
from mxdist.model.shape import ModelShape
from tests.model.against_transformers import transformers_model
from tests.model.ranks import DENSE, MOE, RankProcesses, shape_of

TOKENS = np.random.default_rng(0).integers(3, 40, (5, 17))


def logits(worker: LearnerWorker, tokens: np.ndarray) -> np.ndarray:
    return torch.stack(worker._policy.forward(list(tokens))).numpy()


def read_back(worker: LearnerWorker) -> list[str]:
    """Names of the tensors that do not hold what was written into them."""
    from mxdist.model.weights import hf_tensors

    tensors = list(hf_tensors(worker._policy.model, worker.shape))
    values = [torch.randn(tensor.shape) for tensor in tensors]
    for tensor, value in zip(tensors, values, strict=True):
        tensor.write(value)
    written = sum(value.numel() for value in values)
    assert written == sum(parameter.numel() for parameter in worker._policy.model.parameters())
    return [tensor.name for tensor, value in zip(tensors, values, strict=True) if not torch.equal(tensor.read(), value)]


def write_too_much(worker: LearnerWorker) -> None:
    from mxdist.model.weights import hf_tensors

    next(hf_tensors(worker._policy.model, worker.shape)).write(torch.zeros(1, 64))


@pytest.mark.parametrize("model", [MOE, DENSE], ids=["experts", "dense"])
def test_logits_are_those_of_transformers(model: ModelConfig, ranks: RankProcesses, tmp_path: Path) -> None:
    shape = shape_of(model)
    with ranks.learners(model, "bf16") as learners:
        (ours,) = learners.run(logits, TOKENS)
        reference = transformers_model(shape, learners.call("export", 0), tmp_path)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(TOKENS)).logits.numpy()
    assert np.abs(theirs).max() > 0.5
    assert np.abs(ours - theirs).max() < 1e-4


def test_every_parameter_is_written_and_read_by_exactly_one_hugging_face_tensor(ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "bf16") as learners:
        assert learners.run(read_back) == [[]]


def test_a_tensor_of_the_wrong_shape_is_refused(ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "bf16") as learners, pytest.raises(ValueError, match="embed_tokens"):
        learners.run(write_too_much)


def test_initial_weights_follow_the_seed_and_the_range(ranks: RankProcesses) -> None:
    payloads = []
    for seed in (0, 0, 1):
        with ranks.learners(MOE, "bf16", run={"seed": seed}) as learners:
            payloads += learners.call("export", 0)
    first, again, other = ({entry.name: entry.parts["values"] for entry in payload.entries} for payload in payloads)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].ndim == 2]
    assert not any(np.array_equal(first[name], other[name]) for name in drawn)
    assert np.concatenate([first[name].ravel() for name in drawn]).std() == pytest.approx(0.1, rel=0.02)
    assert all((first[name] == 1).all() for name in first if name not in drawn)


def linears(shape: ModelShape) -> list[str]:
    """Every linear of a decoder layer but the router, by Hugging Face name."""
    names = []
    for layer in range(shape.config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        names += [f"{prefix}.self_attn.{name}_proj" for name in "qkvo"]
        mlps = [f"mlp.experts.{i}" for i in range(shape.config.num_experts)] or ["mlp"]
        names += [f"{prefix}.{mlp}.{name}_proj" for mlp in mlps for name in ("gate", "up", "down")]
    return sorted(names)


@pytest.mark.parametrize("model", [MOE, DENSE], ids=["experts", "dense"])
def test_the_quantised_modules_are_all_linears_but_router_embedding_and_output(
    model: ModelConfig, ranks: RankProcesses
) -> None:
    with ranks.learners(model, "mxfp4") as learners:
        (report,) = learners.reports
        assert list(report.quantised_modules) == linears(shape_of(model))
    with ranks.learners(model, "bf16") as learners:
        assert learners.reports[0].quantised_modules == ()
