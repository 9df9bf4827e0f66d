"""Decode tokens/s of rollout engines, packed weights against bf16: python -m tools.bench.engine [--out FILE]

The engine of a run, vLLM and its sampling included, with random weights: answers of one length to short prompts, for
batches of several sizes. Each recipe has a process of its own. Needs a GPU, but for --model tiny.

    gpu_ms       what kernels take in a step of a short answer; they may overlap
    kernels      those that take longest in it, prompts included: name, how many, and microseconds a step
    step_ms      one step of the engine, the median: scheduling, the model, sampling, log-probabilities
    prompts_ms   a call for answers of one token, which reads the prompts kernel by kernel
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from mxdist.config.schema import Config, ModelConfig
from mxdist.doctor.memory import kv_bytes_per_token
from mxdist.messages import Noise, Prompt, RolloutRequest, RolloutResult, SamplingSettings
from mxdist.model.shape import ModelShape
from mxdist.quant.backend import quantise
from mxdist.rollout.live_weight import LiveWeight
from mxdist.rollout.worker import RolloutWorker

COMMON = {"dtype": "bfloat16", "max_position_embeddings": 256}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen2.5-3b": (
        151_936,
        {
            "family": "qwen2", "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 11_008, "num_experts": 0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-30b-a3b-8-layers": (
        151_936,
        {
            "hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        },
    ),
    "tiny": (512, {"num_experts": 0, "dtype": "float32"}),
}  # fmt: skip
"""By name: size of the vocabulary, and settings of the model."""
PROMPT, ANSWER = 16, 128
PROFILED = 32
"""Tokens of an answer whose kernels are looked at."""
REPEATS = 3
FIRST = 8
"""Steps of an answer before those that count."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latest_engine.json")
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-3b")
    parser.add_argument("--recipes", nargs="+", default=["bf16", "mxfp4"], help="the first is what others are held to")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one recipe, in this process
    arguments = parser.parse_args()
    if arguments.only:
        arguments.out.write_text(json.dumps(measure(arguments, arguments.only)))
        return
    engines: dict[str, dict[str, Any]] = {}
    for recipe in arguments.recipes:
        engines[recipe] = _in_a_process(recipe)
        _print(recipe, engines[recipe], engines[arguments.recipes[0]])
        _write(arguments, engines)  # after every engine, should a later one fail


def _print(recipe: str, engine: dict[str, Any], against: dict[str, Any]) -> None:
    size = engine["linear_bytes"] / 2**30
    print(f"{recipe}: {size:.2f} GiB of linears, {against['linear_bytes'] / engine['linear_bytes']:.2f}x smaller")
    for batch, found in engine["batches"].items():
        ratio = found["tokens_per_s"] / against["batches"][batch]["tokens_per_s"]
        busy = f", GPU busy {found['gpu_ms']:.3f} ms" if "gpu_ms" in found else ""
        speed = f"{found['tokens_per_s']:9.1f} tokens/s {ratio:6.2f}x"
        print(f"  batch {batch:>3} {speed}, step {found['step_ms']:.3f} ms{busy}", flush=True)


def _write(arguments: argparse.Namespace, engines: dict[str, dict[str, Any]]) -> None:
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m tools.bench.engine " + " ".join(sys.argv[1:]),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "model": arguments.model,
        "prompt_tokens": PROMPT,
        "answer_tokens": ANSWER,
        "engines": engines,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def _in_a_process(recipe: str) -> dict[str, Any]:
    """vLLM wants one engine per process."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "engine.json"
        command = [sys.executable, "-m", "tools.bench.engine", *sys.argv[1:], "--out", str(out), "--only", recipe]
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def measure(arguments: argparse.Namespace, recipe: str) -> dict[str, Any]:
    """What one engine holds, and how fast it decodes."""
    vocabulary, settings = MODELS[arguments.model]
    model = ModelConfig(**{**COMMON, **settings})
    config = _config(model, recipe, max(arguments.batches), not arguments.eager)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        shape = ModelShape(model, vocabulary, None, (vocabulary,), 0)  # a stop token that is never drawn
        worker = RolloutWorker(config, shape, Path(directory))
        report = worker.start()
        worker._shape = replace(shape, stop_token_ids=())  # vLLM takes none of those
    seconds = time.perf_counter() - started
    fill(worker)
    found = {
        "start_s": seconds,
        "bytes_per_quantised_weight": report.bytes_per_quantised_weight,
        "linear_bytes": sum(
            part.nbytes
            for name, slot in worker._slots.items()
            if name.endswith("_proj.weight")
            for part in slot.parts().values()
        ),
        "gpu_bytes": torch.cuda.memory_reserved() if torch.cuda.is_available() else None,
        "batches": {str(batch): decode(worker, batch, vocabulary) for batch in arguments.batches},
    }
    worker.shutdown()
    return found


def _config(model: ModelConfig, recipe: str, sequences: int, cuda_graphs: bool) -> Config:
    """With room for the keys and values of all: sequences that are put off are computed twice."""
    rollout = {"max_sequences": sequences, "max_new_tokens": ANSWER, "cuda_graphs": cuda_graphs}
    config = Config(model=model, recipe=recipe, learner={"ranks": 1, "expert_parallel": 1}, rollout=rollout)
    room = 256 + sequences * (PROMPT + ANSWER + 32) * kv_bytes_per_token(config) // 2**20
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"kv_cache_mib": room})})


def fill(worker: RolloutWorker) -> None:
    """Random weights, made where they are to be: as after a sync, which would take gigabytes through the host."""
    torch.manual_seed(0)
    for name, slot in worker._slots.items():
        device = next(iter(slot.parts().values())).device
        values = torch.randn(slot.shape, device=device) * 0.02 + float(name.endswith("norm.weight"))
        operand = slot.owner.operand if isinstance(slot.owner, LiveWeight) else None
        source = quantise(values, operand, nonfinite="propagate").parts() if operand else {"values": values}
        for part, live in slot.parts().items():
            live.copy_(source[part])
    for owner in {slot.owner for slot in worker._slots.values()}:
        if isinstance(owner, LiveWeight):
            owner.refresh()
    worker._version = 0


def decode(worker: RolloutWorker, batch: int, vocabulary: int) -> dict[str, Any]:
    """Of some calls, after one that is not counted."""
    generator = torch.Generator().manual_seed(batch)
    prompts = tuple(
        Prompt(str(i), tuple(torch.randint(vocabulary, (PROMPT,), generator=generator).tolist()), "")
        for i in range(batch)
    )
    step = median(_step_seconds(worker, prompts))
    alone = min(_answers(worker, prompts, 1).seconds for _ in range(REPEATS))
    found = {"tokens_per_s": batch / step, "step_ms": step * 1e3, "prompts_ms": alone * 1e3}
    return found | _kernels(worker, prompts)


def _step_seconds(worker: RolloutWorker, prompts: tuple[Prompt, ...]) -> list[float]:
    """Of every step of some calls but the first ones, in which prompts are read: their time differs from call to call
    by more than decoding does."""
    client = worker._engine._llm.llm_engine.engine_core
    ends, step = list[float](), client.get_output

    def timed() -> Any:
        output = step()
        ends.append(time.perf_counter())
        return output

    seconds = list[float]()
    with mock.patch.object(client, "get_output", timed):
        for call in range(REPEATS + 1):
            ends.clear()
            _answers(worker, prompts, ANSWER)
            seconds += [after - before for before, after in pairwise(ends[FIRST:])] if call else []
    return seconds


def _answers(worker: RolloutWorker, prompts: tuple[Prompt, ...], length: int) -> RolloutResult:
    result = worker.generate(RolloutRequest(0, prompts, SamplingSettings(1, 1.0, length, 0), Noise(0.0, 0)))
    lengths = {len(group.samples[0].tokens) for group in result.groups}
    if lengths != {length}:
        raise RuntimeError(f"answers have {sorted(lengths)} tokens, not {length}")
    if result.preemptions:
        raise RuntimeError(f"{len(prompts)} answers did not fit the KV cache: times would be those of computing twice")
    return result


def _kernels(worker: RolloutWorker, prompts: tuple[Prompt, ...]) -> dict[str, Any]:
    """What the GPU does in a step; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    first, whole = (_profile(worker, prompts, length) for length in (1, PROFILED))
    busy = sum(kernel.self_device_time_total for kernel in whole) - sum(k.self_device_time_total for k in first)
    kernels = sorted(whole, key=lambda kernel: -kernel.self_device_time_total)
    return {
        "gpu_ms": busy / (PROFILED - 1) / 1e3,
        "kernels": [[k.key[:90], k.count, round(k.self_device_time_total / PROFILED, 1)] for k in kernels[:20]],
    }


def _profile(worker: RolloutWorker, prompts: tuple[Prompt, ...], length: int) -> Any:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _answers(worker, prompts, length)
        torch.cuda.synchronize()
    return profile.key_averages()


if __name__ == "__main__":
    main()
