"""A run exported is the checkpoint it was started from, bit for bit; transformers and vLLM load it."""

import multiprocessing
import resource
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mxdist.config import dump_config
from mxdist.config.schema import Config, ModelConfig
from mxdist.control.checkpoints import CheckpointStore, ControllerState
from mxdist.control.exporting import export
from mxdist.errors import UserError
from mxdist.messages import Noise, Prompt, RolloutRequest, SamplingSettings, WeightPayload
from mxdist.model.checkpoint_files import INDEX_FILE
from tests.model.checkpoints import config_of, save_checkpoint, tensors_of
from tests.model.ranks import DENSE, MOE, Learners, RankProcesses, shape_of
from tests.rollout.engine_process import EngineProcess

STATE = ControllerState(step=3, cursor={}, aqn={}, aqn_steps=1, recipe="", versions={"mxdist": "0.1"})
PROMPTS = [[1, 5, 9, 30], [1, 7], [1, 8, 33, 21, 4, 6]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(2)
    yield processes
    processes.close()


def save_run(run: Path, config: Config, learners: Learners) -> Path:
    """What a run directory holds that an export reads."""
    store = CheckpointStore(run)
    partial = store.begin(STATE.step)
    learners.call("save", partial / "learner")
    learners.call("save_finished", True)
    store.complete(partial, STATE)
    (run / "config.yaml").write_text(dump_config(config))
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    return run


TIED = DENSE.model_copy(update={"family": "qwen2", "tie_word_embeddings": True})
LAYOUTS: dict[str, tuple[ModelConfig, dict[str, int]]] = {
    "dense": (DENSE, {}),
    "tied TP2": (TIED, {"tensor_parallel": 2}),
    "tied PP2": (TIED, {"pipeline_parallel": 2}),
    "experts EP2": (MOE, {"expert_parallel": 2}),
    "experts PP2": (MOE, {"pipeline_parallel": 2}),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_import_then_export_is_bit_equal(ranks: RankProcesses, tmp_path: Path, case: str) -> None:
    model, layout = LAYOUTS[case]
    source = save_checkpoint(tmp_path / "source", shape_of(model), torch.bfloat16)
    config = Config(model=config_of(source), learner={"expert_parallel": 1, "ranks": 1})
    with ranks.learners(config.model, "bf16", ranks=2 if layout else 1, **layout) as learners:
        run = save_run(tmp_path / "run", config, learners)
    export(run, tmp_path / "out", "bf16", shard_bytes=60_000)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], tensor), name
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / INDEX_FILE).is_file()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert not list(tmp_path.glob(".*"))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(source)
    tokens = torch.tensor([[1, 5, 9, 30]])
    assert torch.equal(loaded(tokens).logits, original(tokens).logits)
    with pytest.raises(UserError, match="out exists and is not an empty directory"):
        export(run, tmp_path / "out", "bf16")


def test_the_packed_form_in_vllm_answers_as_the_runs_engine(ranks: RankProcesses, tmp_path: Path) -> None:
    model = MOE.model_copy(update={"head_dim": 32})
    recipes = {
        "recipe": "mxfp4_mbs_of",
        "recipe_overrides": [
            {"modules": "*.1.self_attn.*", "recipe": "bf16"},
            {"modules": "*.down_proj", "recipe": "mxfp4"},
        ],
    }
    config = Config(model=model, **recipes, learner={"expert_parallel": 2})
    with ranks.learners(model, "mxfp4_mbs_of", 2, recipe_overrides=recipes["recipe_overrides"]) as learners:
        payloads: list[WeightPayload] = learners.call("export", 0)
        run = save_run(tmp_path / "run", config, learners)
    export(run, tmp_path / "out", "mxfp4")
    stored = tensors_of(tmp_path / "out")
    for payload in payloads:
        for entry in payload.entries:
            module = entry.name.removesuffix(".weight")
            for part, array in entry.parts.items():
                name = entry.name if entry.kind == "dense" else f"{module}.{part}"
                assert torch.equal(stored.pop(name), torch.from_numpy(array)), name
    assert not stored
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        from_disk = pool.submit(greedy_from_disk, tmp_path / "out", PROMPTS)
        engine = EngineProcess(config, shape_of(model), tmp_path / "engine")  # starts meanwhile
        engine.load(payloads)
        prompts = tuple(Prompt(str(index), tuple(tokens), "") for index, tokens in enumerate(PROMPTS))
        result = engine.generate(RolloutRequest(0, prompts, SamplingSettings(1, 0.0, 12, 0), Noise(0.0, 0)))
        engine.close()
        found = from_disk.result(240)
    assert found == [group.samples[0].tokens.tolist() for group in result.groups]


def greedy_from_disk(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """As a user of vLLM would, with the plugin registered."""
    from mxdist.rollout.worker import prepare_vllm

    prepare_vllm()
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from mxdist.rollout import vllm_plugin

    vllm_plugin.register()
    llm = LLM(
        model=str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=16 << 20,
        max_model_len=64,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[2], detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """Bytes that this process may write into a file: as on a full disk, an export breaks off in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_exported_is_said_in_a_sentence_and_leaves_nothing(ranks: RankProcesses, tmp_path: Path) -> None:
    config = Config(model=DENSE, recipe="bf16", learner={"expert_parallel": 1, "ranks": 1})
    with ranks.learners(DENSE, "bf16") as learners:
        run = save_run(tmp_path / "run", config, learners)
    with pytest.raises(UserError, match=r"quantises no weights .* --form bf16"):
        export(run, tmp_path / "out", "mxfp4")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file exists and is not an empty directory"):
        export(run, tmp_path / "file", "bf16")
    with pytest.raises(UserError, match="file/out cannot be written: File exists"):
        export(run, tmp_path / "file" / "out", "bf16")
    with pytest.raises(UserError, match="out cannot be written: File too large"), files_of_at_most(10_000):
        export(run, tmp_path / "out", "bf16")
    stored = sorted((run / "checkpoints/step_3/learner").glob("*.distcp"))[0]
    stored.write_bytes(stored.read_bytes()[:100])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"is damaged \(learner/"):
        export(run, tmp_path / "out", "bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "run"]
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        export(tmp_path / "none", tmp_path / "out", "bf16")
