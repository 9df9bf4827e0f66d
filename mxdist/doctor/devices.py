"""GPUs, the links between them, and what a CPU has to be able to do. Asked of nvidia-smi; no torch."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from mxdist.config.schema import Config
from mxdist.doctor.findings import Finding, failure, ok, warning

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Heads that vLLM's attention for CPUs has a kernel for (0.32.0, v1/attention/backends/cpu_attn.py)."""

ASKING_SECONDS = 10


@dataclass(frozen=True)
class Gpu:
    name: str
    mib: int
    driver: str


def local_gpus() -> list[Gpu]:
    """As the driver lists them; none where there is no driver."""
    answer = _nvidia_smi("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    rows = [[field.strip() for field in line.split(",")] for line in answer.splitlines()]
    return [Gpu(row[0], int(row[1]), row[2]) for row in rows if len(row) == 3 and row[1].isdigit()]


def local_links() -> str:
    """The matrix that nvidia-smi prints of the links between GPUs; empty where there is none."""
    return _nvidia_smi("topo", "-m")


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=ASKING_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def check_gpus(gpus: Sequence[Gpu], config: Config | None) -> Finding:
    """Enough of them for the layout, when the run is to stay on this machine."""
    shown = f"{len(gpus)} x {gpus[0].name}, {gpus[0].mib / 1024:.0f} GiB" if gpus else "none"
    if config is None:
        return ok("GPUs", shown)
    learner, rollout = config.learner, config.rollout
    wanted = learner.ranks * learner.gpus_per_rank + rollout.workers * rollout.gpus_per_worker
    if config.cluster.address is not None:
        return warning(
            "GPUs",
            f"{shown} here; the run wants {wanted:g} of the cluster at {config.cluster.address}, not looked at",
            "compare with 'ray status' there",
        )
    if wanted > len(gpus) + 1e-6:
        return failure(
            "GPUs",
            f"{shown}; the layout wants {wanted:g}",
            "lower learner.ranks, rollout.workers or their shares of a GPU, or join a cluster by cluster.address",
        )
    return ok("GPUs", f"{shown}; the layout wants {wanted:g}")


def check_rank_shares(config: Config) -> Finding | None:
    """Two ranks on one GPU cannot talk over NCCL."""
    share = config.learner.gpus_per_rank
    if 0 < share <= 0.5 and config.learner.ranks > 1:
        return failure(
            "learner.gpus_per_rank",
            f"{share:g} lets Ray put two ranks on one GPU, which NCCL refuses",
            "set it above 0.5",
        )
    return None


def check_links(matrix: str) -> Finding | None:
    """NVLink among all GPUs, or what is between the worst pair. None with fewer than two GPUs.

    Args:
        matrix: as ``nvidia-smi topo -m`` prints it: NV18 is eighteen NVLinks; PIX, PXB and PHB are PCIe, SYS crosses
            sockets.
    """
    rows = [line.split() for line in matrix.splitlines() if line.startswith("GPU")]
    count = len(rows)
    if count < 2:
        return None
    links = {row[1 + column] for index, row in enumerate(rows) for column in range(count) if column != index}
    slow = sorted(link for link in links if not link.startswith("NV"))
    if slow:
        return warning(
            "links",
            f"some GPUs are joined by {', '.join(slow)} and not by NVLink",
            "keep learner.tensor_parallel and learner.expert_parallel within GPUs that NVLink joins",
        )
    return ok("links", f"NVLink between all {count} GPUs ({', '.join(sorted(links))})")


def check_cpu(flags: str) -> Finding:
    """vLLM for CPUs is compiled for AVX2.

    Args:
        flags: of the processor, as in /proc/cpuinfo.
    """
    if "avx2" not in flags.split():
        return failure("CPU", "no AVX2, which vLLM's CPU build needs", "use a processor with AVX2")
    return ok("CPU", "AVX2" + (", AVX-512" if "avx512f" in flags.split() else ""))


def check_head_size(head_dim: int) -> Finding:
    """Without a GPU, vLLM would fail at the first prompt."""
    if head_dim not in CPU_HEAD_SIZES:
        return failure(
            "model.head_dim",
            f"vLLM has no attention kernel for heads of {head_dim} on a CPU",
            f"choose one of {', '.join(map(str, CPU_HEAD_SIZES))}",
        )
    return ok("model.head_dim", f"{head_dim} has an attention kernel")
