"""The promise of the quickstart: a small model learns to carry, in minutes, in little memory, without a GPU."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.e2e.command import QUICKSTART, metrics_of

MINUTES = 8
GIBIBYTES = 12


def resident_bytes(process: psutil.Process) -> int:
    """Of the process and all its descendants, pages they share counted for each."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def test_the_quickstart_learns_within_its_time_and_memory(tmp_path: Path) -> None:
    run_dir, started, peak = tmp_path / "run", time.monotonic(), 0
    with open(tmp_path / "output", "w") as output:
        command = [sys.executable, "-m", "mxdist", "train", str(QUICKSTART), f"run.dir={run_dir}"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, resident_bytes(psutil.Process(process.pid)))
            time.sleep(2)
    seconds = time.monotonic() - started
    assert process.returncode == 0, (tmp_path / "output").read_text()
    metrics = metrics_of(run_dir)
    before, after = metrics[0]["eval/accuracy"], metrics[max(metrics)]["eval/accuracy"]
    print(f"greedy accuracy {before:.3f} -> {after:.3f}, {seconds:.0f} s, peak {peak / 2**30:.2f} GiB")
    assert after - before >= 0.20
    assert after > 0.60  # more than the half that always carrying, or never, would score
    assert seconds < MINUTES * 60
    assert peak < GIBIBYTES << 30
