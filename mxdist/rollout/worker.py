"""A rollout worker: one process, one vLLM engine, the live weights of one policy version.

Plain class without Ray; the controller makes an actor of it. Importing this file imports neither torch nor vLLM:
``start`` does, after it has set the environment variables that vLLM reads at import.

    start -> load_weights -> generate -> load_weights -> generate -> ... -> shutdown

With ``sync.update`` in_flight another thread brings weights with ``offer_weights`` while ``generate`` runs, which takes
them between two steps of the engine; ``load_offered`` then stands where ``load_weights`` would.
"""

import logging
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from mxdist.config.schema import Config
from mxdist.errors import RunStopped, SyncInterrupted, UserError
from mxdist.messages import (
    EngineReport,
    EntropyStatistics,
    Group,
    Noise,
    Prompt,
    RolloutRequest,
    RolloutResult,
    Sample,
    SamplingSettings,
    SharedBuckets,
    VersionRuns,
    WeightPayload,
)
from mxdist.model.recipes import model_recipes
from mxdist.model.shape import ModelShape
from mxdist.rollout.arrivals import Arrivals
from mxdist.seeds import derive_seed
from mxdist.sync.parity import compare_checksums

if TYPE_CHECKING:
    from vllm import SamplingParams

    from mxdist.aqn.injector import Applied
    from mxdist.rollout.generation import Answer, Generation
    from mxdist.rollout.slot import Slot
    from mxdist.sync.payload import PartSums

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: weights are loaded in place
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else the first generate compiles a helper with g++ for half a minute
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # a warning of torch's about NUMA binding, at every start
    # On a GPU the model runner that a CPU has too, into which ``sampler`` is put.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
DIVIDED = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else a process wants a NUMA node of its own
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # it would use NVLink multicast
}
"""Besides, where a model is divided over processes."""


class RolloutWorker:
    """Samples answers with the weights it was last given.

    Args:
        model_dir: directory of this worker's own, into which the engine's config.json is written.
    """

    def __init__(self, config: Config, shape: ModelShape, model_dir: Path) -> None:
        self._config, self._shape = config, shape
        self._recipes = model_recipes(config)
        self._model_dir = Path(model_dir)
        self._version = -1  # no weights yet
        self._arrivals = Arrivals()
        self._interrupted: SyncInterrupted | None = None  # by which newer weights are missing

    def start(self) -> EngineReport:
        """Build the engine. Once per process: vLLM keeps global state."""
        prepare_vllm(self._config.rollout.tensor_parallel)
        from mxdist.rollout.engine import Engine

        self._engine = Engine(self._config, self._shape, self._recipes, self._model_dir)
        first = self._engine.each("held")[0]
        self._divided = first.divided
        report = EngineReport(
            quantised_modules=first.quantised_modules,
            noise_modules=first.noise_modules,
            bytes_per_quantised_weight=first.bytes_per_quantised_weight,
            resident_mib=psutil.Process().memory_info().rss / 2**20,
            device=first.device,
        )
        self._engine.sleep()  # a learner may have to warm up first
        return report

    def cannot_map(self, probes: list[SharedBuckets]) -> str | None:
        """Why what learner ranks share of their GPUs cannot be read in each of the engine's processes, or None."""
        return next(filter(None, self._engine.each("cannot_map", probes)), None)

    def release(self) -> None:
        """Let go of what the engine has mapped of the learner's GPUs: that learner is gone."""
        self._engine.each("release")

    def load_weights(self, payloads: list[WeightPayload]) -> "PartSums":
        """Replace all weights in place with those of all learner ranks, all or nothing.

        Returns:
            Hugging Face tensor name -> part -> checksum, computed from the live buffers after the copy.

        Raises:
            ParityError: see ``WeightLoader.checked``; the engine then goes on with its old weights.
            SyncInterrupted: likewise, but it samples with none but newer ones, from a later call of this.
        """
        from mxdist.rollout.rank import combined

        self._engine.wake("weights")
        try:
            self._engine.each("check", payloads)
        except SyncInterrupted as error:
            self._interrupted = SyncInterrupted(str(error), error.generation)  # its traceback holds what was received
            raise
        self._interrupted = None
        self._version = -1  # a copy that fails half-way leaves weights that nothing may be sampled with
        sums = combined(self._engine.each("write"), self._divided)
        self._version = payloads[0].version
        self._engine.forget_prefixes()
        return sums

    def offer_weights(self, ticket: int, payloads: list[WeightPayload]) -> None:
        """Weights for answers that are being sampled to go on with. From any thread, at any time.

        Args:
            ticket: of this push; ``load_offered`` follows with the same.
        """
        self._arrivals.offer(ticket, payloads)

    def load_offered(self, ticket: int, payloads: list[WeightPayload]) -> "PartSums":
        """What came of the weights when they were taken in flight; otherwise as ``load_weights``, as are the errors."""
        outcome = self._arrivals.close(ticket)
        if outcome is None or isinstance(outcome, SyncInterrupted):
            return self.load_weights(payloads)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def generate(self, request: RolloutRequest) -> RolloutResult:
        """Sample ``samples_per_prompt`` answers to each prompt, under the request's noise.

        Each sample has a seed of its own, derived from the request's seed, the prompt's key and the sample's number,
        so it does not depend on the worker that draws it or on the rest of the batch (up to the last bits of a GEMM,
        which may round otherwise for another batch). The stop token that ended it is part of an answer.

        Weights that are offered meanwhile draw the rest of the answers, under the same noise, as if they had been given
        the tokens so far: keys and values are computed again. Weights that fail a check are left to ``load_offered`` to
        complain of.

        Raises:
            UserError: a prompt leaves no room for an answer in the model's context.
            ParityError: weights that were taken are not what the learner computes with.
            SyncInterrupted: newer weights were to be loaded before.
            ValueError: noise was asked for with temperature 0: evaluation never sees noise.
        """
        if self._version < 0:
            raise RuntimeError("generate was called before any weights were loaded")
        if self._interrupted is not None:
            raise self._interrupted
        sampling, noise = request.sampling, request.noise
        if sampling.temperature == 0 and noise.sigma != 0:
            raise ValueError(f"greedy decoding was asked for with noise of sigma={noise.sigma}; evaluation is clean")
        started = time.perf_counter()
        parameters = [
            self._parameters(prompt, index, sampling)
            for prompt in request.prompts
            for index in range(sampling.samples_per_prompt)
        ]
        tokens = [prompt.tokens for prompt in request.prompts for _ in range(sampling.samples_per_prompt)]
        self._engine.wake("weights", "kv_cache")
        with self._engine.perturbed(noise) as applied:
            batch = _Batch(self._engine.begin(tokens, parameters), noise, [applied])
            answers = batch.generation.run(partial(self._take_offered, batch))
        logprobs = self._engine.logprobs(batch.generation)
        self._engine.sleep()
        batch.ended.append((self._version, [len(answer.tokens) for answer in answers]))
        samples = [_sample(*each) for each in zip(answers, logprobs, batch.runs(), strict=True)]
        size = sampling.samples_per_prompt
        groups = tuple(
            _group(prompt, tuple(samples[i * size : (i + 1) * size]), noise.sigma)
            for i, prompt in enumerate(request.prompts)
        )
        seconds = time.perf_counter() - started
        return RolloutResult(
            groups,
            _entropy(samples),
            seconds,
            perturbed_modules=min(applied.norms for applied in batch.applied),
            applied_sigma=min(applied.sigma for applied in batch.applied),
            usage=tuple(self._engine.each("usage")),
            preemptions=batch.generation.preemptions,
        )

    def _take_offered(self, batch: "_Batch") -> None:
        """Between two steps: if weights have come, go on with those."""
        from mxdist.rollout.rank import combined
        from mxdist.sync.payload import learner_checksums

        offered = self._arrivals.take()
        if offered is None:
            return
        ticket, payloads = offered
        try:
            self._engine.each("check", payloads)
        except (UserError, RunStopped) as error:
            self._arrivals.settle(ticket, error)
            return
        with batch.generation.paused() as sampled:
            batch.ended.append((self._version, sampled))
            self._version = -1  # as in load_weights
            found, applied = self._engine.rewrite(batch.noise)
            sums = combined(found, self._divided)
            compare_checksums(learner_checksums(payloads), sums)  # before anything is sampled with them
            self._version = payloads[0].version
            batch.applied.append(applied)
            batch.generation.compute_again()
        self._arrivals.settle(ticket, sums)

    def shutdown(self) -> None:
        """Free the engine. The process can exit afterwards; it cannot start another one."""
        if hasattr(self, "_engine"):
            self._engine.close()
            del self._engine

    @property
    def _slots(self) -> "dict[str, Slot]":
        """Of an engine in this process."""
        return self._engine.rank.slots

    def _parameters(self, prompt: Prompt, index: int, sampling: SamplingSettings) -> "SamplingParams":
        from mxdist.rollout.engine import sampling_params

        context = self._config.context
        if len(prompt.tokens) > context - 1:
            raise UserError(
                f"prompt {prompt.key} has {len(prompt.tokens)} tokens, but at most {context - 1} fit into "
                f"the context of {context} with an answer; raise {self._config.context_key} or drop it"
            )
        seed = derive_seed(sampling.seed, prompt.key, index)
        room = min(sampling.max_new_tokens, context - len(prompt.tokens))
        return sampling_params(sampling.temperature, room, self._shape.stop_token_ids, seed)


def prepare_vllm(tensor_parallel: int = 1) -> None:
    """Set what vLLM reads at import, and mute what third parties say then that no user can act on.

    RuntimeError when vLLM was imported already and its environment variables were not set.
    """
    environment = ENVIRONMENT | (DIVIDED if tensor_parallel > 1 else {})
    if "vllm" in sys.modules and any(os.environ.get(key) != value for key, value in environment.items()):
        raise RuntimeError("vLLM was imported before its environment variables were set")
    os.environ.update(environment)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available"


@dataclass
class _Batch:
    """What is being sampled, and with which weights."""

    generation: "Generation"
    noise: Noise
    applied: list["Applied"]  # of each version in turn
    ended: list[tuple[int, list[int]]] = field(
        default_factory=list
    )  # versions and how many tokens each answer had then

    def runs(self) -> list[VersionRuns]:
        """Of each answer, once all versions have ended."""
        versions = [version for version, _ in self.ended]
        sampled = np.array([lengths for _, lengths in self.ended])  # [versions, answers]
        drawn = np.diff(sampled, axis=0, prepend=0).T.tolist()
        return [tuple((v, count) for v, count in zip(versions, counts, strict=True) if count) for counts in drawn]


def _group(prompt: Prompt, samples: tuple[Sample, ...], sigma: float) -> Group:
    return Group(prompt, samples, min(version for sample in samples for version, _ in sample.drawn_by), sigma)


def _sample(answer: "Answer", logprobs: np.ndarray, drawn_by: VersionRuns) -> Sample:
    tokens = np.asarray(answer.tokens, dtype=np.int64)
    logprobs = logprobs[: len(tokens)].copy()  # without the rest of the batch
    if tokens.shape != logprobs.shape:
        raise RuntimeError(f"there are {len(logprobs)} log-probabilities for {len(tokens)} tokens")
    if not np.isfinite(logprobs).all():
        raise RuntimeError("vLLM sampled a token with a log-probability that is not finite: NaN in a layer's output")
    return Sample(tokens, logprobs, answer.stopped, drawn_by)


def _entropy(samples: list[Sample]) -> EntropyStatistics:
    """Each token's -log p is an unbiased estimate of the entropy of the distribution it was drawn from."""
    return EntropyStatistics(
        -float(sum(sample.logprobs.sum(dtype=np.float64) for sample in samples)),
        sum(len(sample.tokens) for sample in samples),
    )
