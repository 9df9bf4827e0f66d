"""A run from outside: what ends it early, mistakes that only the running system finds, and who can reach it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tests.e2e.command import QUICKSTART, SHORT, mxdist

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SECRET = "5ec4e7" * 6 + "abcd"


def start(run_dir: Path, *settings: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-u", "-m", "mxdist", "train", str(QUICKSTART), f"run.dir={run_dir}", *SHORT, *settings]
    return subprocess.Popen(
        command,
        cwd=run_dir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A test run in the background of a script ignores interrupts, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came; the output was:\n{seen}")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[str]"]:
    """A run in training, which the tests that stand first leave as it is."""
    with pytest.MonkeyPatch.context() as environment:
        for name in SECRETS:
            environment.setenv(name, SECRET)
        process = start(tmp_path_factory.mktemp("training") / "run", "run.steps=5000")
    read_until(process, "/5000  reward")
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)


def test_every_socket_of_a_run_on_one_machine_is_on_loopback(training: "subprocess.Popen[str]") -> None:
    root = psutil.Process(training.pid)
    names = {member.pid: member.name() for member in [root, *root.children(recursive=True)]}
    # One that waits to be reached: it listens (TCP), or has no peer (UDP).
    sockets = [
        (names[found.pid], found.laddr.ip.removeprefix("::ffff:"), found.laddr.port)
        for found in psutil.net_connections("inet")
        if found.pid in names and not found.raddr
    ]
    assert {"gcs_server", "raylet"} <= {name for name, *_ in sockets}
    assert any(name.startswith("ray::") for name, *_ in sockets)  # such as gloo's in the learner's ranks
    assert [found for found in sockets if not ip_address(found[1]).is_loopback] == []


def test_secrets_of_the_environment_reach_no_file_and_no_list_of_processes(training: "subprocess.Popen[str]") -> None:
    root = psutil.Process(training.pid)
    members = [root, *root.children(recursive=True)]
    assert [member.pid for member in members if SECRET in member.environ().values()]  # it was there to be told
    assert [member.cmdline() for member in members if any(SECRET in part for part in member.cmdline())] == []
    run_dir = Path(root.cwd()) / "run"
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert run_dir / "config.yaml" in files
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_control_c_in_training_ends_every_process_and_says_so_in_one_line(training: "subprocess.Popen[str]") -> None:
    _interrupt(training)


def test_control_c_while_processes_start_does_as_well(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "run.steps=500")
    read_until(process, "starting learner")
    time.sleep(4)  # into the imports of the workers
    _interrupt(process)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "asked to stop (SIGTERM); go on with 'mxdist resume'")],
)
def test_a_run_that_is_ended_while_ray_starts_says_so_in_one_line_and_leaves_nothing(
    number: signal.Signals, code: int, said: str, tmp_path: Path
) -> None:
    process = start(tmp_path / "run", "run.steps=500")
    read_until(process, "starting Ray")
    root, family = psutil.Process(process.pid), set()
    while not family:
        family |= set(root.children(recursive=True))
    process.send_signal(number)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= set(root.children(recursive=True))
        time.sleep(0.05)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == code
    [line] = rest.strip().splitlines()
    assert line.startswith(f"mxdist: {said}")
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [member for member in alive if member.status() != psutil.STATUS_ZOMBIE]


def _interrupt(process: "subprocess.Popen[str]") -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 3
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert rest.strip().splitlines()[-1] == "mxdist: interrupted"
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [member for member in alive if member.status() != psutil.STATUS_ZOMBIE]


def test_a_taken_port_is_found_and_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = mxdist("train", QUICKSTART, f"run.dir={tmp_path / 'run'}", f"learner.port={port}", cwd=tmp_path)
    assert outcome.code == 2
    assert f"learner.port={port} is taken" in outcome.err
    assert not (tmp_path / "run").exists()  # so that the mended command can be repeated
    assert len(outcome.err.splitlines()) == 1


def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "run.steps=500")
    try:
        read_until(process, "starting Ray")
        outcome = mxdist("train", QUICKSTART, f"run.dir={tmp_path / 'run'}", cwd=tmp_path)
        assert outcome.code == 2
        assert f"in use by process {process.pid}" in outcome.err
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
