"""The learner alone, by recipe, without engines: python -m tools.bench.learner CONFIG [key=value ...] [--out FILE]

Builds the ranks of CONFIG's learner as a run does, with random weights, and times whole updates (forward, backward,
optimizer, quantising the weights anew) on random tokens. Every recipe trains the same weights on the same tokens, one
recipe after the other in the same processes; the first of --recipes is what the others are compared with. What is
learnt is noise: this is no training. Answers take the last three quarters of each sequence, and sequences are of
various lengths, from half of --length up, packed as a run packs them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mxdist.config import Config, load_config
from mxdist.config.model_costs import forward_flops
from mxdist.learner.worker import LearnerWorker
from mxdist.messages import TrainBatch
from mxdist.model.recipes import model_recipes
from mxdist.model.shape import ModelShape
from mxdist.observe.usage import bf16_peak

RECIPES = ("bf16", "mxfp4_g4_nearest", "mxfp4")
LEARNING_RATE = 1e-7


@dataclass(frozen=True)
class Options:
    """Of one measurement."""

    recipes: tuple[str, ...]
    length: int  # of the longest sequence
    tokens: int  # of an update, all ranks together, about
    warmup: int
    steps: int


@dataclass(frozen=True)
class Timing:
    """One rank's account of one recipe."""

    seconds: list[dict[str, float]]  # by update and phase
    memory_mib: float | None  # most that was allocated on the GPU
    allocation_retries: int | None  # how often memory had to be given back before more could be had: the GPU is full
    device: str
    grad_norm: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options, given = _parse(arguments)
    config = load_config(given.config, [*given.settings, "recipe=bf16", "recipe_overrides=[]"])
    shape = ModelShape(config.model, config.model.vocab_size or 256, None, (1,), 0)
    batch = random_batch(options, shape.vocab_size)
    found = _measure(config, shape, options, batch)
    rows = {recipe: _row(shape, batch, timings) for recipe, timings in found.items()}
    print(f"{found[options.recipes[0]][0].device}, {config.learner.ranks} ranks, {given.config}")
    first = rows[options.recipes[0]]["tokens_per_second_per_rank"]
    for recipe, row in rows.items():
        row["ratio"] = row["tokens_per_second_per_rank"] / first
        print(_line(recipe, row), flush=True)
    if given.out is not None:
        _write(given.out, config, options, found, rows)


def _parse(arguments: Sequence[str] | None) -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="the first is what others are compared with")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the longest sequence")
    parser.add_argument("--micro-batches", type=int, default=6, help="of each rank in an update, 90 % full")
    parser.add_argument("--warmup", type=int, default=2, help="updates before those that count")
    parser.add_argument("--steps", type=int, default=5, help="updates that count; medians are reported")
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_intermixed_args(arguments)
    learner = load_config(given.config, given.settings).learner
    tokens = 9 * given.micro_batches * learner.ranks * learner.micro_batch_tokens // 10
    return Options(tuple(given.recipes), given.length, tokens, given.warmup, given.steps), given


def random_batch(options: Options, vocabulary: int) -> TrainBatch:
    """Sequences of various lengths with about ``options.tokens`` tokens in all."""
    generator = np.random.default_rng(0)
    mean = (options.length // 2 + options.length) / 2
    lengths = generator.integers(options.length // 2, options.length + 1, max(1, round(options.tokens / mean)))
    places = np.arange(options.length)
    mask = (places >= lengths[:, None] // 4) & (places < lengths[:, None])
    tokens = generator.integers(0, vocabulary, mask.shape) * (places < lengths[:, None])
    rollout = np.where(mask, -math.log(vocabulary), 0).astype(np.float32)
    weights = np.full(len(lengths), 1 / mask.sum(), dtype=np.float32)
    advantages = generator.normal(size=len(lengths)).astype(np.float32)
    return TrainBatch(tokens.astype(np.int64), mask, rollout, advantages, weights)


def _measure(config: Config, shape: ModelShape, options: Options, batch: TrainBatch) -> dict[str, list[Timing]]:
    """By recipe, the timing of every rank."""
    context, pipes = multiprocessing.get_context("spawn"), []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    processes = []
    for rank in range(config.learner.ranks):
        own, other = context.Pipe()
        process = context.Process(target=_serve, args=(other, rank, rendezvous, config, shape, options, batch))
        process.start()
        other.close()
        pipes.append(own)
        processes.append(process)
    try:
        return {recipe: [_received(pipe) for pipe in pipes] for recipe in options.recipes}
    finally:
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()


def _received(pipe: Connection) -> Timing:
    try:
        answer = pipe.recv()
    except EOFError:
        sys.exit("a rank ended without a word: what it printed says why")
    if isinstance(answer, str):
        sys.exit(answer)
    return answer


def _serve(pipe: Connection, rank: int, rendezvous: str, config: Config, *rest: Any) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    shape, options, batch = rest
    worker = LearnerWorker(config, shape, rank, config.learner.ranks, rendezvous)
    try:
        worker.build()  # in bf16, so that nothing is quantised for nothing
        for recipe in options.recipes:
            _use(worker, config.model_copy(update={"recipe": recipe}))
            pipe.send(_timed(worker, options, batch))
        worker.shutdown()
    except Exception:
        pipe.send(f"rank {rank} failed:\n{traceback.format_exc()}")


def _use(worker: LearnerWorker, config: Config) -> None:
    """Give the learner's linears the recipe of ``config``; its weights stay."""
    from mxdist.model.hf_tensors import set_up_linears
    from mxdist.model.quantised_weight import forget, requantise

    forget(worker._policy.model)
    worker.recipes = model_recipes(config)
    set_up_linears(worker._backend.tensors, worker.recipes, worker._policy._draws)
    requantise(worker._policy.model)


def _timed(worker: LearnerWorker, options: Options, batch: TrainBatch) -> Timing:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        retried = torch.cuda.memory_stats()["num_alloc_retries"]
    seconds = []
    for step in range(options.warmup + options.steps):
        start = time.perf_counter()
        report = worker.update(batch, worker.config.algorithm, LEARNING_RATE)
        whole = time.perf_counter() - start
        if step >= options.warmup:
            seconds.append({"update": whole, **report.seconds})
    memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    retries = torch.cuda.memory_stats()["num_alloc_retries"] - retried if on_gpu else None
    return Timing(seconds, memory, retries, report.usage.device, report.grad_norm)


def _row(shape: ModelShape, batch: TrainBatch, timings: list[Timing]) -> dict[str, Any]:
    """What is reported of a recipe: of every update the slowest rank counts."""
    by_update = list(zip(*(timing.seconds for timing in timings), strict=True))
    seconds = {
        phase: median(max(rank[phase] for rank in ranks) for ranks in by_update) for phase in timings[0].seconds[0]
    }
    lengths = [int(row.nonzero()[0][-1]) + 1 for row in batch.response_mask]
    tokens, ranks = sum(lengths), len(timings)
    flops = 3 * sum(forward_flops(shape.config, shape.vocab_size, length) for length in lengths)
    peak = bf16_peak(timings[0].device)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second_per_rank": tokens / ranks / seconds["update"],
        "mfu": None if peak is None else flops / (ranks * peak * seconds["update"]),
        "memory_mib": max((timing.memory_mib or 0.0) for timing in timings) or None,
        "allocation_retries": max((timing.allocation_retries or 0) for timing in timings),
        "grad_norm": timings[0].grad_norm,
    }


def _line(recipe: str, row: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {value:.3f} s" for name, value in row["seconds"].items())
    mfu = "" if row["mfu"] is None else f"  MFU {100 * row['mfu']:.1f} %"
    memory = "" if row["memory_mib"] is None else f"  {row['memory_mib'] / 1024:.1f} GiB"
    if row["allocation_retries"]:
        memory += f" (full: {row['allocation_retries']} times memory was given back)"
    speed = f"{row['tokens_per_second_per_rank']:10.0f} tokens/s/rank  {row['ratio']:.2f}x"
    return f"{recipe:18}{speed}{mfu}{memory}  {phases}  |gradient| {row['grad_norm']:.3g}"


def _write(
    out: Path, config: Config, options: Options, found: dict[str, list[Timing]], rows: dict[str, dict[str, Any]]
) -> None:
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m tools.bench.learner " + " ".join(sys.argv[1:]),
        "device": found[options.recipes[0]][0].device,
        "torch": torch.__version__,
        "ranks": config.learner.ranks,
        "micro_batch_tokens": config.learner.micro_batch_tokens,
        "recompute": config.learner.recompute,
        "longest_sequence": options.length,
        "model": config.model.model_dump(),
        "recipes": rows,
        "seconds": {recipe: [timing.seconds for timing in timings] for recipe, timings in found.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
