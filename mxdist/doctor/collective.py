"""A few all-reduces between processes of this machine, over gloo or NCCL, within a deadline.

python -m mxdist.doctor.collective BACKEND RENDEZVOUS RANKS RANK      (one such process a rank)
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from mxdist.doctor.findings import Finding, failure, ok

ELEMENTS = 1 << 20  # float32, so 4 MiB
REPEATS = 5
DEADLINE_SECONDS = 120.0  # two seconds on an idle machine; importing torch takes most of a busy one's
RANK_SECONDS = 60  # that ranks wait for each other


def check_all_reduce(ranks: int, backend: str, deadline: float = DEADLINE_SECONDS) -> Finding:
    """Start ``ranks`` processes that add up numbers, and stop them at the deadline, in seconds."""
    subject = f"all-reduce ({backend})"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "mxdist.doctor.collective", backend, rendezvous, str(ranks)]
    environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"} | dict(os.environ)
    processes = [
        subprocess.Popen(
            [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(ranks)
    ]
    answers: list[str] = []
    ends = time.monotonic() + deadline
    try:
        for rank, process in enumerate(processes):
            try:
                out, errors = process.communicate(timeout=max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                return failure(
                    subject,
                    f"rank {rank} of {ranks} did not finish within {deadline:.0f} s",
                    "set NCCL_DEBUG=INFO and look at what it waits for" if backend == "nccl" else "check the loopback",
                )
            if process.returncode:
                return failure(subject, f"rank {rank} of {ranks}: {_reason(errors)}", _fix(backend))
            answers.append(out)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return ok(subject, f"{ranks} processes, {answers[0].strip()}")


def _reason(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line]
    return (told or lines or ["it ended without a word"])[-1][:300]


def _fix(backend: str) -> str:
    if backend == "nccl":
        return "run with NCCL_DEBUG=INFO; compare driver, CUDA and NCCL above"
    return "check that processes of this machine can connect to each other"


def run_rank(backend: str, rendezvous: str, ranks: int, rank: int) -> str:
    """Join, add up, check the sum; how fast it went, in words."""
    import torch
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=rendezvous, rank=rank, world_size=ranks, timeout=timedelta(seconds=RANK_SECONDS)
    )
    values = torch.empty(ELEMENTS, device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(values.fill_(1.0))  # connections are made now
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(values.fill_(float(rank)))
        total = float(values[-1])
    seconds = (time.perf_counter() - started) / REPEATS
    if total != ranks * (ranks - 1) / 2:
        raise RuntimeError(f"the sum over {ranks} ranks came out as {total}")
    dist.destroy_process_group()
    version = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if backend == "nccl" else ""
    return f"4 MiB in {1000 * seconds:.1f} ms{version}"


def main(arguments: Sequence[str]) -> None:
    backend, rendezvous, ranks, rank = arguments
    print(run_rank(backend, rendezvous, int(ranks), int(rank)))


if __name__ == "__main__":
    main(sys.argv[1:])
