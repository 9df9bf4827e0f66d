"""A Hugging Face checkpoint read by the learner's ranks is that checkpoint, bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mxdist.config.schema import ModelConfig
from mxdist.errors import UserError
from mxdist.learner.worker import LearnerWorker
from mxdist.messages import WeightPayload
from mxdist.model.shape import ModelShape
from mxdist.sync.payload import as_tensor
from tests.model.checkpoints import config_of, rewrite, save_checkpoint, tensors_of
from tests.model.ranks import DENSE, MOE, RankProcesses, shape_of
from tools.make_checkpoint import write_checkpoint


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


LARGE = TIED.model_copy(update={"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 1, "dtype": "bfloat16"})


def test_a_large_tensor_is_streamed_and_never_held_whole(ranks: RankProcesses, tmp_path: Path) -> None:
    shape = ModelShape(LARGE, vocab_size=1 << 17, bos_token_id=1, stop_token_ids=(2,), pad_token_id=0)
    embedding = 2 * shape.vocab_size * LARGE.hidden_size  # bytes
    write_checkpoint(tmp_path / "large", shape, seed=0, std=0.02, shard_bytes=1 << 40)
    with ranks.learners(DENSE, "bf16") as learners:
        [taken] = learners.run(taken_by_loading, shape, tmp_path / "large")
    assert taken < 1.5 * embedding, "its pages, a copy and a check of all of it at once are three times as much"


def taken_by_loading(worker: LearnerWorker, shape: ModelShape, folder: Path) -> int:
    """Bytes that the process takes at the worst moment of loading, beyond what it held with the model built."""
    from mxdist.model.gpt import build_gpt
    from mxdist.model.loading import load_checkpoint
    from mxdist.model.weights import hf_tensors

    model = build_gpt(shape, worker.config.learner)
    for parameter in model.parameters():
        parameter.detach().zero_()  # or their pages would be counted when they are written
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew (man 5 proc)
    before = peak_bytes()
    load_checkpoint(model, list(hf_tensors(model, shape)), shape, folder)
    return peak_bytes() - before


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
