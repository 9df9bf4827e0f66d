"""The benchmark of weight syncs runs to its end, here with a tiny model on a CPU."""

import json
import subprocess
import sys
from pathlib import Path


def test_both_recipes_are_timed_by_phase_and_packed_tensors_are_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    out = tmp_path / "sync.json"
    options = ["--shape", "tiny", "--layers", "1", "--gpus", "0", "--syncs", "1", "--out", str(out)]
    options += ["--transports", "broadcast"]
    done = subprocess.run([sys.executable, "-m", "tools.bench.sync", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_transport = json.loads(out.read_text())["transports"]
    assert by_transport.keys() == {"broadcast"}
    for found in by_transport.values():
        assert 3.6 < found["ratios"]["bytes_of_quantised_tensors"] < 4
        for measured in found["recipes"].values():
            assert measured["bytes"] == measured["sent_bytes"]
            seconds = measured["seconds"]
            phases = sum(value for name, value in seconds.items() if name != "all")
            assert abs(seconds["all"] - phases) < 1e-9
            assert all(value > 0 for value in seconds.values())
