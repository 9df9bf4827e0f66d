"""A Hugging Face checkpoint read by the learner's ranks is that checkpoint, bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mxdist.config.schema import ModelConfig
from mxdist.errors import UserError
from mxdist.messages import WeightPayload
from mxdist.sync.payload import as_tensor
from tests.model.checkpoints import config_of, rewrite, save_checkpoint, tensors_of
from tests.model.ranks import DENSE, MOE, RankProcesses, shape_of


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(2)
    yield processes
    processes.close()


def values_of(payloads: list[WeightPayload]) -> dict[str, torch.Tensor]:
    found = [(entry.name, as_tensor(entry.parts["values"])) for payload in payloads for entry in payload.entries]
    assert len(dict(found)) == len(found)
    return dict(found)


QWEN2 = DENSE.model_copy(update={"family": "qwen2"})
TIED = DENSE.model_copy(update={"family": "qwen2", "tie_word_embeddings": True})
CASES: dict[str, tuple[ModelConfig, dict[str, int]]] = {
    "dense": (DENSE, {}),
    "dense PP2": (DENSE, {"pipeline_parallel": 2}),
    "tied": (TIED, {}),
    "tied TP2": (TIED, {"tensor_parallel": 2}),
    "tied PP2": (TIED, {"pipeline_parallel": 2}),
    "biases TP2": (QWEN2, {"tensor_parallel": 2}),
    "experts": (MOE, {"expert_parallel": 1}),
    "experts EP2": (MOE, {"expert_parallel": 2}),
    "experts TP2 EP2": (MOE, {"tensor_parallel": 2, "expert_parallel": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_a_bfloat16_checkpoint_is_in_the_learner(
    ranks: RankProcesses, tmp_path: Path, case: str
) -> None:
    model, layout = CASES[case]
    folder = save_checkpoint(tmp_path, shape_of(model), torch.bfloat16)
    dtype = "float32" if case == "dense" else "bfloat16"
    with ranks.learners(
        config_of(folder, dtype=dtype), "bf16", 2 if any(n > 1 for n in layout.values()) else 1, **layout
    ) as learners:
        loaded = values_of(learners.call("export", 0))
    saved = tensors_of(folder)
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == getattr(torch, dtype)
        assert torch.equal(loaded[name].bfloat16(), tensor), name


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_differ_from_it(
    ranks: RankProcesses, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path, shape_of(TIED))
    embedding = tensors_of(folder)["model.embed_tokens.weight"]
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    with ranks.learners(config_of(folder), "bf16") as learners:
        assert "lm_head.weight" not in values_of(learners.call("export", 0))
    rewrite(folder, lambda tensors: tensors["lm_head.weight"][7, 3].add_(1))
    with (
        pytest.raises(UserError, match=r"holds lm_head.weight and a different model.embed_tokens.weight"),
        ranks.learners(config_of(folder), "bf16"),
    ):
        pass


def test_float32_checkpoints_are_rounded_to_the_models_type(ranks: RankProcesses, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, shape_of(DENSE))
    with ranks.learners(config_of(folder, dtype="bfloat16"), "bf16") as learners:
        loaded = values_of(learners.call("export", 0))
    for name, tensor in tensors_of(folder).items():
        assert torch.equal(loaded[name], tensor.bfloat16()), name


def test_not_a_number_is_refused_by_tensor_and_file(ranks: RankProcesses, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, shape_of(DENSE))
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(np.nan))
    with (
        pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight in .*model.safetensors holds a NaN"),
        ranks.learners(config_of(folder), "bf16"),
    ):
        pass
