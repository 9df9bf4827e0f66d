"""The launch scripts' complaints: one sentence each, with the node's name."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODE = socket.gethostname()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("0" * 64)
    return path


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def refusal(script: str, *arguments: str, **environment: str) -> str:
    """What a script says that is expected to end with code 2 and one line."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    return line


def test_a_head_that_cannot_be_reached_is_named_with_the_node(token: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        head = f"127.0.0.1:{closed.getsockname()[1]}"
        said = refusal("ray_worker.sh", head, JOIN_SECONDS="1", RAY_AUTH_TOKEN_PATH=str(token))
    assert f"node {NODE} cannot reach the Ray head at {head}" in said


def test_a_head_whose_port_is_taken_says_which_and_where(token: Path, taken: int) -> None:
    said = refusal("ray_head.sh", RAY_PORT=str(taken), RAY_AUTH_TOKEN_PATH=str(token), NODE_ADDRESS="127.0.0.1")
    assert f"port {taken} is taken on node {NODE}" in said


def test_a_worker_whose_port_is_taken_says_which_and_where(token: Path, taken: int) -> None:
    ports = {"RAY_OBJECT_MANAGER_PORT": str(taken), "RAY_NODE_MANAGER_PORT": "0"}
    said = refusal("ray_worker.sh", f"127.0.0.1:{taken}", RAY_AUTH_TOKEN_PATH=str(token), **ports)
    assert f"port {taken} is taken on node {NODE}" in said


def test_a_worker_without_the_clusters_token_says_where_it_belongs(tmp_path: Path) -> None:
    said = refusal("ray_worker.sh", "127.0.0.1:1", RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert f"node {NODE} has no {tmp_path / 'none'}" in said


@pytest.mark.parametrize(("script", "wanted"), [("ray_worker.sh", "HEAD:PORT"), ("train_or_resume.sh", "RUN_DIR")])
def test_missing_arguments_are_named(script: str, wanted: str) -> None:
    assert wanted in refusal(script)


def test_a_run_that_sigterm_ends_early_says_so_with_its_exit_code(tmp_path: Path) -> None:
    """In place of mxdist, a program that only waits: what is tried is the script."""
    package = tmp_path / "mxdist"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys, time\nprint(*sys.argv[1:], flush=True)\ntime.sleep(60)\n")
    (tmp_path / "run").mkdir()
    for made, command in ((False, "train a.yaml run.dir=run x=1"), (True, "resume run x=1")):
        if made:
            (tmp_path / "run" / "config.yaml").touch()
        process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "train_or_resume.sh"), "a.yaml", "run", "x=1"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().strip() == command
        process.terminate()
        assert process.wait(timeout=30) == 75


def test_the_exit_code_of_a_run_is_passed_on(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert str(missing) in refusal("train_or_resume.sh", str(missing), str(tmp_path / "run"), PYTHONPATH=str(ROOT))
