"""Run directories are never overwritten and never shared."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mxdist.config import Config, load_config
from mxdist.config.schema import RunConfig
from mxdist.errors import UserError
from mxdist.observe.run_directory import RunDirectory


def config(path: Path | None, name: str = "run") -> Config:
    return Config(run=RunConfig(dir=path, name=name, steps=7))


def test_a_new_run_directory_holds_the_resolved_configuration(tmp_path: Path) -> None:
    with RunDirectory.create(config(tmp_path / "a/b")) as directory:
        assert directory.path == tmp_path / "a/b"
        assert load_config(directory.config_path) == config(tmp_path / "a/b")


def test_default_directories_of_one_second_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directories = [RunDirectory.create(config(None, "tiny")) for _ in range(5)]
    assert len({directory.path for directory in directories}) == 5
    assert all(directory.path.parent == tmp_path / "runs" for directory in directories)
    assert all(directory.path.name.startswith("tiny-") for directory in directories)
    assert load_config(directories[0].config_path).run.dir == directories[0].path


def test_an_empty_directory_may_be_used_and_one_with_other_things_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunDirectory.create(config(tmp_path / "empty")).release()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no run; choose another"):
        RunDirectory.create(config(tmp_path / "full"))
    assert (tmp_path / "full/thesis.tex").read_text() == "years of work"


def test_an_existing_run_is_to_be_resumed_and_stays_as_it_was(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "run")).release()
    (tmp_path / "run/checkpoints/step_3").mkdir(parents=True)
    before = (tmp_path / "run/config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"holds a run; continue it with 'mxdist resume .*run', or choose another"):
        RunDirectory.create(config(tmp_path / "run", "other"))
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_an_existing_run_that_cannot_be_resumed_is_not_said_to_be(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "run")).release()
    (tmp_path / "run/checkpoints/step_3.partial").mkdir(parents=True)
    with pytest.raises(UserError, match="without a checkpoint; choose another"):
        RunDirectory.create(config(tmp_path / "run"))


def test_a_directory_in_use_names_the_process_that_uses_it(tmp_path: Path) -> None:
    with RunDirectory.create(config(tmp_path / "run")):
        for claim in (
            lambda: RunDirectory.open(tmp_path / "run"),
            lambda: RunDirectory.create(config(tmp_path / "run")),
        ):
            with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .*; wait for it"):
                claim()
    RunDirectory.open(tmp_path / "run").release()


def test_a_killed_process_leaves_no_lock_behind_and_its_children_hold_none(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\nfrom pathlib import Path\n"
        "from mxdist.observe.run_directory import RunDirectory\n"
        "from mxdist.config import Config\nfrom mxdist.config.schema import RunConfig\n"
        "RunDirectory.create(Config(run=RunConfig(dir=Path(sys.argv[1]))))\n"
        "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match=rf"in use by process {holder.pid} "):
                RunDirectory.open(tmp_path / "run")
            holder.kill()
            holder.wait()
            RunDirectory.open(tmp_path / "run").release()
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("place", ["nowhere", "file", ""])
def test_what_is_no_run_cannot_be_opened(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="holds no run"):
        RunDirectory.open(tmp_path / place)


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made or written: Not a directory; choose another"):
        RunDirectory.create(config(tmp_path / "file/run"))
