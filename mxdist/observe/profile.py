"""What a few steps of a run cost, out of its metrics, and two runs beside each other.

Nothing is estimated here: a figure whose metric a run does not have is absent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

PHASES = (
    "rollout",
    "reward",
    "old log-probs",
    "forward",
    "backward",
    "optimizer",
    "telemetry",
    "sync",
    "waiting",
    "unaccounted",
)
LEARNER_PHASES = {
    "old log-probs": "timing_s/old_logprobs",
    "forward": "timing_s/forward",
    "backward": "timing_s/backward",
    "optimizer": "timing_s/optimizer",
    "telemetry": "timing_s/telemetry",
}
MFU = "learner MFU, %"
LABEL, COLUMN = 20, 13  # widths of the table: 59 columns in all


@dataclass(frozen=True)
class Speed:
    """Means over the measured steps of one run."""

    recipe: str
    seconds: dict[str, float]  # of a step, by phase; those that took no time are left out; with "step", the whole
    rates: dict[str, float]  # tokens a second; per cent of the learner's BF16 peak
    amounts: dict[str, float]  # tokens a step, MiB of memory, MB of a sync
    steps: list[dict[str, float]]  # seconds of each measured step, by phase

    def as_json(self) -> dict[str, object]:
        return {"seconds": self.seconds, "rates": self.rates, "amounts": self.amounts, "steps": self.steps}


def breakdown(metrics: Mapping[str, float]) -> dict[str, float]:
    """Where the seconds of one step went, from its line of metrics.jsonl; the phases add up to "step".

    The learner's phases are those of its slowest rank. "rollout" is what of the engines' sampling the loop waited for
    (all of it, unless batches are sampled ahead). "waiting" is the rest of the waits for other processes: queues,
    transfers, ranks that wait for each other.
    """
    get = metrics.get
    collecting, reward = metrics["timing_s/rollout"], metrics["timing_s/reward"]
    rollout = min(metrics["timing_s/generate"], max(collecting - reward, 0.0))
    learner = {name: float(get(key) or 0.0) for name, key in LEARNER_PHASES.items()}
    waiting = max(collecting - reward - rollout, 0.0) + max(metrics["timing_s/update"] - sum(learner.values()), 0.0)
    parts = {"rollout": rollout, "reward": reward, **learner, "sync": metrics["timing_s/sync"], "waiting": waiting}
    step = metrics["timing_s/step"]
    return {**parts, "unaccounted": step - sum(parts.values()), "step": step}


def measure(recipe: str, lines: Sequence[Mapping[str, float]], gpus: float) -> Speed:
    """Sum up the metrics of the measured steps; ``gpus``: those that the run held, 0 on a CPU."""
    steps = [breakdown(line) for line in lines]
    seconds = {name: fmean(step[name] for step in steps) for name in (*PHASES, "step")}
    seconds = {name: value for name, value in seconds.items() if value != 0.0}

    def total(name: str) -> float:
        return sum(line[name] for line in lines)

    rates = {"tokens/s": total("perf/tokens") / total("timing_s/step")}
    if gpus:
        rates["tokens/s/GPU"] = rates["tokens/s"] / gpus
    rates["sampled tokens/s"] = total("perf/response_tokens") / total("timing_s/generate")
    rates["learner tokens/s"] = total("perf/tokens") / (total("timing_s/forward") + total("timing_s/backward"))
    if all("perf/mfu/actor" in line for line in lines):
        rates[MFU] = 100 * fmean(line["perf/mfu/actor"] for line in lines)
    amounts = {
        "tokens a step": total("perf/tokens") / len(lines),
        "MB of a sync": total("sync/bytes") / len(lines) / 1e6,
    }
    for label, prefix in (("MiB", "perf/memory_mib/"), ("GPU MiB", "perf/gpu_memory_mib/")):
        for kind in ("learner", "rollout"):
            if prefix + kind in lines[-1]:
                amounts[f"{label} of {kind}"] = lines[-1][prefix + kind]
    return Speed(recipe, seconds, rates, amounts, steps)


def ratios(ours: Speed, other: Speed) -> dict[str, float]:
    """Ours divided by the other's, for every figure that both have."""
    pairs = [(ours.seconds, other.seconds), (ours.rates, other.rates), (ours.amounts, other.amounts)]
    return {name: a[name] / b[name] for a, b in pairs for name in a if b.get(name)}


def table(ours: Speed, other: Speed) -> list[str]:
    """Lines of at most 60 columns."""
    ratio = ratios(ours, other)
    lines = [_row("", ours.recipe, other.recipe, "ratio")]
    for title, of, form in (
        ("seconds a step", lambda speed: speed.seconds, "{:.3f}"),
        ("speed", lambda speed: speed.rates, "{:,.1f}"),
        ("amounts (memory: the most a process has held)", lambda speed: speed.amounts, "{:,.1f}"),
    ):
        left, right = of(ours), of(other)
        lines.append(title)
        for name in dict.fromkeys((*left, *right)):
            cells = (_cell(left.get(name), form), _cell(right.get(name), form), _cell(ratio.get(name), "{:.2f} x"))
            lines.append(_row(f"  {name}", *cells))
    return [*lines, f"ratio: {ours.recipe} over {other.recipe}"]


def _row(name: str, *cells: str) -> str:
    return f"{name[:LABEL]:{LABEL}}" + "".join(f"{cell[: COLUMN - 1]:>{COLUMN}}" for cell in cells)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
