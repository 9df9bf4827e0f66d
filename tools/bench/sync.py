"""A weight sync by transport and recipe: seconds of its phases, bytes, and what the parity gate takes.

    python -m tools.bench.sync --out FILE [--layers 16] [--gpus 2] [--transports ipc broadcast host] [--syncs 5]

One learner rank and one engine's weights, each in a process of its own that Ray starts, of a model shaped like
Qwen3-30B-A3B with --layers layers (9: 6.2 B parameters, 16: 10.6 B). --gpus 2 gives each a GPU, 1 has both on one (not
for broadcast), 0 runs on a CPU (with --shape tiny, not for ipc). Sides: ``sync_sides``; all that sends, carries,
checks, copies and compares is the run's own. Every sync sends new weights; the median of --syncs, after two that are
not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import ray

from mxdist.config import Config
from mxdist.control.groups import LearnerGroup, RolloutPool
from mxdist.control.processes import start_ray
from mxdist.control.roster import Roster
from mxdist.control.supervisor import Supervisor, Worker
from mxdist.control.system import meetings
from mxdist.control.waits import wait_for
from mxdist.control.weights import WeightSync

RECIPES = ("bf16", "mxfp4")
WARM_UP = 2
PHASES = ("export", "check", "copy", "parity")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
        "dtype": "bfloat16",
    },
    "tiny": {"vocab_size": 64, "dtype": "bfloat16"},
}


def main() -> None:
    """Measure every recipe and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--gpus", type=int, choices=(0, 1, 2), default=2)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--transports", choices=("host", "delta", "ipc", "broadcast"), nargs="+", default=["ipc"])
    parser.add_argument("--rate", type=float, help="move weights by this learning rate; without it all are new")
    parser.add_argument("--syncs", type=int, default=5)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for transport in options.transports:
        recipes = {}
        for recipe in RECIPES:
            recipes[recipe] = measure(_config(options, recipe, transport), options.syncs, options.rate)
            print(json.dumps({transport: {recipe: recipes[recipe]}}), flush=True)
        results[transport] = {"recipes": recipes, "ratios": _ratios(recipes["bf16"], recipes["mxfp4"])}
    written = {
        "command": " ".join(["python -m tools.bench.sync", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _device(options.gpus),
        "transports": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=1) + "\n")
    for transport, found in results.items():
        seconds = {recipe: round(of["seconds"]["all"], 4) for recipe, of in found["recipes"].items()}
        print(json.dumps({transport: {"seconds": seconds, "ratios": found["ratios"]}}), flush=True)


def _config(options: argparse.Namespace, recipe: str, transport: str) -> Config:
    each = {0: 0.0, 1: 0.5, 2: 1.0}[options.gpus]
    return Config.model_validate(
        {
            "recipe": recipe,
            "model": SHAPES[options.shape] | {"num_hidden_layers": options.layers},
            "learner": {"ranks": 1, "expert_parallel": 1, "gpus_per_rank": each},
            "rollout": {"gpus_per_worker": each},
            "sync": {"transport": transport},
        }
    )


def measure(config: Config, syncs: int, rate: float | None = None) -> dict[str, Any]:
    """Medians of one recipe."""
    started = time.monotonic()
    # Ray's object store gets room for versions of the model, which has to be there only where they go through it.
    by_ray = config.sync.transport in ("host", "delta")
    start_ray(config if by_ray else config.model_copy(update={"model": Config().model}))
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = _measure(config, syncs, rate, Path(folder))
            return found | {"wall_seconds": round(time.monotonic() - started, 1)}
    finally:
        ray.shutdown()


def _measure(config: Config, syncs: int, rate: float | None, folder: Path) -> dict[str, Any]:
    roster = Roster(folder)
    learner = roster.start("learner rank 0", 0.5, config.learner.gpus_per_rank)
    supervisor = Supervisor(config, roster, print)
    engine = Worker(partial(roster.start, "rollout worker 0", 0.5, config.rollout.gpus_per_worker))
    made = engine.construct("tools.bench.sync_sides:EngineSide", config)
    wait_for([learner.construct("tools.bench.sync_sides:LearnerSide", config)], config.deadlines.start, "start")
    pool = RolloutPool([engine], supervisor)
    pool.wait([made], config.deadlines.start, "start")
    wanted = config.sync.transport
    assert wanted != "auto"
    transport = meetings(config) if wanted == "broadcast" else wanted
    sync = WeightSync(LearnerGroup([learner], config), pool, transport, config)
    found = []
    for version in range(WARM_UP + syncs):
        wait_for([learner.call("new weights", "step", version, rate)], config.deadlines.update, "update")
        sync.push(version)
        found.append(sync.check_all())
    [sizes] = wait_for([learner.call("sizes", "sizes")], config.deadlines.update, "update")
    seconds = {
        name: [metrics[key] for metrics in found[WARM_UP:]]
        for name, key in {"all": "sync/seconds", **{phase: f"sync/{phase}_seconds" for phase in PHASES}}.items()
    }
    seconds["messages"] = [
        whole - sum(seconds[phase][index] for phase in PHASES) for index, whole in enumerate(seconds["all"])
    ]
    return {
        "transport": wanted,
        "tensors": int(found[-1]["parity/checked_tensors"]),
        **sizes,
        "sent_bytes": int(found[-1]["sync/bytes"]),
        "seconds": {name: median(values) for name, values in seconds.items()},
        "seconds_each": {name: [round(value, 5) for value in values] for name, values in seconds.items()},
        "first_seconds": found[0]["sync/seconds"],
        "parity_share": median(seconds["parity"]) / median(seconds["all"]),
    }


def _ratios(bf16: dict[str, Any], packed: dict[str, Any]) -> dict[str, float]:
    """How many times less the packed sync takes."""
    of_quantised = 2 * packed["quantised_numbers"] / packed["quantised_bytes"]
    return {
        "seconds": bf16["seconds"]["all"] / packed["seconds"]["all"],
        "bytes": bf16["sent_bytes"] / packed["sent_bytes"],
        "bytes_of_quantised_tensors": of_quantised,
    }


def _device(gpus: int) -> str:
    if not gpus:
        return "cpu"
    import torch

    return f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
