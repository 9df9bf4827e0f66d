"""What the loggers write is read back."""

import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mxdist.config import Config
from mxdist.config.schema import LogConfig
from mxdist.observe.loggers import Loggers
from mxdist.observe.metrics_file import read_metrics

PLAIN = Config()


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_one_json_object_at_once(tmp_path: Path) -> None:
    with Loggers(tmp_path, PLAIN) as loggers:
        for step in range(3):
            loggers.log(step, {"critic/rewards/mean": step / 3, "actor/entropy": math.nan})
            assert lines(tmp_path)[-1] == {"step": step, "critic/rewards/mean": step / 3, "actor/entropy": None}
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_a_step_is_logged_once_and_in_order(tmp_path: Path) -> None:
    with Loggers(tmp_path, PLAIN) as loggers:
        loggers.log(4, {"a": 1.0})
        for late in (4, 3):
            with pytest.raises(ValueError, match=f"metrics of step {late} come after those of step 4"):
                loggers.log(late, {"a": 1.0})


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_a_half_written_line(tmp_path: Path) -> None:
    with Loggers(tmp_path, PLAIN) as loggers:
        for step in range(6):
            loggers.log(step, {"a": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "a": 6.')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    with Loggers(tmp_path, PLAIN, resume_step=3) as loggers:
        loggers.log(4, {"a": 40.0})
    assert [(line["step"], line["a"]) for line in lines(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_line_broken_in_the_middle_is_no_accident(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 1}\n')
    with pytest.raises(ValueError):
        Loggers(tmp_path, PLAIN, resume_step=1)


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    config = Config(log=LogConfig(tensorboard=True))
    with Loggers(tmp_path, config) as loggers:
        for step in range(6):
            loggers.log(step, {"eval/accuracy": step / 8})
    with Loggers(tmp_path, config, resume_step=3) as loggers:
        loggers.log(4, {"eval/accuracy": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("eval/accuracy")]
    assert scalars == [(0, 0.0), (1, 0.125), (2, 0.25), (3, 0.375), (4, 1.0)]


def test_tensorboard_is_written_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom mxdist.config.schema import Config, LogConfig\n"
        "from mxdist.observe.loggers import Loggers\n"
        "with Loggers(Path(sys.argv[1]), Config(log=LogConfig(tensorboard=True))) as loggers:\n"
        "    loggers.log(0, {'a': 1.0})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.fixture
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """A port, and what was sent to it."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(1)
                    received.append(connection.recv(1000))

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1], received
        stop.set()
        thread.join()


WANDB_RUN = (
    "import sys\nfrom pathlib import Path\nfrom mxdist.config.schema import Config, LogConfig\n"
    "from mxdist.observe.loggers import Loggers\n"
    "config = Config(log=LogConfig(wandb='offline', wandb_project='sums'))\n"
    "with Loggers(Path(sys.argv[1]), config, None if sys.argv[2] == 'new' else 1) as loggers:\n"
    "    for step in ((0, 1) if sys.argv[2] == 'new' else (2,)):\n"
    "        loggers.log(step, {'eval/accuracy': step / 8, 'actor/entropy': float('nan')})\n"
)


def run_wandb(run_dir: Path, kind: str, port: int) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with a key in its environment, and every way to the network leading to ``port``."""
    way = f"http://127.0.0.1:{port}"
    network = {"WANDB_BASE_URL": way, "HTTPS_PROXY": way, "HTTP_PROXY": way, "https_proxy": way, "http_proxy": way}
    environment = os.environ | network | {"WANDB_API_KEY": "5ec4e7" * 6 + "abcd", "NO_PROXY": "", "no_proxy": ""}
    command = [sys.executable, "-c", WANDB_RUN, str(run_dir), kind]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def wandb_records(run_dir: Path) -> Iterator[object]:
    """Records of all offline runs: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, position, buffer = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if (left := 32768 - position % 32768) < 7:
                position += left
                continue
            _, length, kind = struct.unpack("<IHB", data[position : position + 7])
            buffer += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                record = Record()
                record.ParseFromString(buffer)
                buffer = b""
                yield record


def test_wandb_offline_is_quiet_keeps_off_the_network_and_can_be_read_back(
    tmp_path: Path, listener: tuple[int, list[bytes]]
) -> None:
    port, received = listener
    for kind in ("new", "resumed"):
        run = run_wandb(tmp_path, kind, port)
        assert run.stdout == run.stderr == ""
    assert received == []
    records = list(wandb_records(tmp_path))
    histories = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"  # type: ignore[attr-defined]
    ]
    assert [(row["_step"], row["eval/accuracy"]) for row in histories] == [(0, 0.0), (1, 0.125), (2, 0.25)]
    assert all("actor/entropy" not in row for row in histories)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]  # type: ignore[attr-defined]
    assert {run.project for run in runs} == {"sums"}
    assert len({run.run_id for run in runs}) == 1  # a resumed run is the same run
    configuration = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert configuration["recipe"] == "mxfp4_mbs_of"


def test_wandb_writes_no_key_no_command_line_and_no_git_remote(
    tmp_path: Path, listener: tuple[int, list[bytes]]
) -> None:
    run_wandb(tmp_path, "new", listener[0])
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    kinds = {record.WhichOneof("record_type") for record in wandb_records(tmp_path)}  # type: ignore[attr-defined]
    assert "history" in kinds
    assert not kinds & {"environment", "output", "output_raw", "stats"}
    assert not {path.name for path in files} & {"wandb-metadata.json", "output.log", "diff.patch"}
    content = b"\n".join(path.read_bytes() for path in files)
    assert b"5ec4e7" not in content
