"""The metrics of one training step, under the names that users of other systems compare curves by."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mxdist.config.model_costs import forward_flops
from mxdist.control.collect import Collected
from mxdist.messages import EntropyStatistics, UpdateReport
from mxdist.model.shape import ModelShape
from mxdist.observe.usage import bf16_peak

BOTH_WAYS = ("forward", "backward")


def step_metrics(
    step: int,
    collected: Collected,
    reports: Sequence[UpdateReport],
    entropy: EntropyStatistics,
    seconds: float,
) -> dict[str, float]:
    """Metrics of the step counted from 0 that took ``seconds`` from its submission to its sync."""
    groups = collected.scored
    samples = [sample for scored in groups for sample in scored.group.samples]
    lengths = np.array([len(sample.tokens) for sample in samples])
    rewards = np.array([scored.rewards for scored in groups])
    staleness = np.array([step - scored.group.policy_version for scored in groups])
    versions = np.concatenate([scored.group.token_versions() for scored in groups])
    tokens = int(lengths.sum()) + sum(len(scored.group.prompt.tokens) * len(scored.group.samples) for scored in groups)
    metrics = {
        "actor/entropy": entropy.mean,
        "actor/grad_norm": float(np.mean([report.grad_norm for report in reports])),
        "guards/skipped_update": float(any(np.isnan(report.grad_norm) for report in reports)),
        "actor/lr": reports[0].learning_rate,
        "critic/rewards/mean": float(rewards.mean()),
        "critic/rewards/max": float(rewards.max()),
        "critic/rewards/min": float(rewards.min()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/clip_ratio": float(np.mean([not sample.finished for sample in samples])),
        "rollout/groups_without_signal": float(collected.without_signal),
        "rollout/extra_batches": float(collected.extra_batches),
        "rollout/entropy": collected.entropy.mean,
        "rollout/preemptions": float(collected.preemptions),
        "off_policy/staleness/mean": float(staleness.mean()),
        "off_policy/staleness/max": float(staleness.max()),
        "off_policy/staleness/token_mean": float(step - versions.mean()),
        "off_policy/versions": float(len(np.unique(versions))),
        "aqn/sigma": collected.noise.sigma,
        "aqn/sigma_applied": collected.applied_sigma,
        "aqn/perturbed_modules": float(collected.perturbed_modules),
        "perf/throughput": tokens / seconds,
        "timing_s/generate": collected.rollout_seconds,
        "timing_s/reward": collected.reward_seconds,
    }
    for part in groups[0].parts:
        metrics[f"reward/{part}"] = float(np.mean([scored.parts[part] for scored in groups]))
    for name, total in _summed_means(reports).items():
        metrics[name] = total
    slowest = max(reports, key=_both_ways)  # forward and backward of one rank: with pipeline stages they differ
    for phase in reports[0].seconds:
        same_rank = [slowest] if phase in BOTH_WAYS else reports
        metrics[f"timing_s/{phase}"] = max(report.seconds[phase] for report in same_rank)
    return metrics


def cost_metrics(
    shape: ModelShape, collected: Collected, reports: Sequence[UpdateReport], ranks: int
) -> dict[str, float]:
    """Tokens, the most memory that a process of each kind has held so far, and the learner's share of its peak.

    ``perf/mfu/actor`` counts forward and backward pass of the trained sequences, against the dense BF16 peak of the
    learner's GPUs; it is absent where no peak is known, as on a CPU.
    """
    pairs = [(scored.group.prompt, sample) for scored in collected.scored for sample in scored.group.samples]
    lengths = [len(prompt.tokens) + len(sample.tokens) for prompt, sample in pairs]
    metrics = {
        "perf/tokens": float(sum(lengths)),
        "perf/response_tokens": float(sum(len(sample.tokens) for _, sample in pairs)),
    }
    for kind, usages in (("learner", [report.usage for report in reports]), ("rollout", collected.usage)):
        metrics[f"perf/memory_mib/{kind}"] = max(usage.resident_mib for usage in usages)
        on_gpu = [usage.gpu_mib for usage in usages if usage.gpu_mib is not None]
        if on_gpu:
            metrics[f"perf/gpu_memory_mib/{kind}"] = max(on_gpu)
    peak = bf16_peak(reports[0].usage.device)
    if peak is not None:
        counted = Counter(lengths)
        flops = 3 * sum(forward_flops(shape.config, shape.vocab_size, n) * count for n, count in counted.items())
        seconds = max(map(_both_ways, reports))
        metrics["perf/mfu/actor"] = flops / (seconds * ranks * peak)
    return metrics


def _both_ways(report: UpdateReport) -> float:
    return sum(report.seconds[phase] for phase in BOTH_WAYS)


def _summed_means(reports: Sequence[UpdateReport]) -> dict[str, float]:
    names = reports[0].means
    return {name: sum((r.means[name] for r in reports[1:]), reports[0].means[name]).value for name in names}
