"""The command line: help, exit codes, and mistakes found before anything heavy is imported."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mxdist import __version__
from mxdist.cli import exit_code_of
from mxdist.config import Config, dump_config
from mxdist.errors import DeadlineExceeded, ParityError, UserError
from tools.make_checkpoint import SHAPES, write_checkpoint

ROOT = Path(__file__).parents[2]


def mxdist(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mxdist", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def one_sentence(run: subprocess.CompletedProcess[str]) -> str:
    """Check that a command failed as a user's mistake does, and return the sentence."""
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("mxdist: ")
    assert run.stderr.count("\n") == 1
    return run.stderr.removeprefix("mxdist: ").rstrip()


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("run: {seed: 0}\n")
    return str(path)


@pytest.mark.parametrize("columns", [40, 120])
@pytest.mark.parametrize("command", [(), ("train",), ("resume",), ("eval",), ("export",)])
def test_help_fits_the_terminal(command: tuple[str, ...], columns: int) -> None:
    run = mxdist(*command, "--help", columns=columns)
    assert run.returncode == 0
    assert run.stdout.startswith("Usage: mxdist")
    assert max(len(line) for line in run.stdout.splitlines()) <= columns


def test_help_names_every_command_and_what_it_takes() -> None:
    listing = mxdist("--help", columns=60).stdout
    assert "..." not in listing.replace("[ARGS]...", "")  # each is summed up in a line
    assert all(f"\n  {command} " in listing for command in ("train", "resume", "eval", "settings", "export"))
    assert "CONFIG" in mxdist("train", "--help").stdout
    assert "KEY=VALUE" in mxdist("train", "--help").stdout
    assert "RUN_DIR" in mxdist("resume", "--help").stdout


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_2() -> None:
    run = mxdist()
    assert (run.returncode, run.stdout) == (2, mxdist("--help").stdout)


def test_the_version_is_printed() -> None:
    assert mxdist("--version").stdout == f"mxdist {__version__}\n"


def test_mistakes_in_the_arguments_are_one_sentence(file: str) -> None:
    assert one_sentence(mxdist("trian", file)).startswith("No such command 'trian'")
    assert one_sentence(mxdist("train")) == "Missing argument 'CONFIG'. (see 'mxdist train --help')"
    assert one_sentence(mxdist("train", file, "--seed", "1")).startswith("No such option: --seed")
    assert one_sentence(mxdist("train", file, "seed")).endswith("'seed' is no key=value; write for example run.seed=1")


def test_mistakes_in_the_configuration_are_one_sentence(file: str) -> None:
    assert (
        one_sentence(mxdist("train", "none.yaml")) == "the configuration file none.yaml does not exist; check the path"
    )
    sentence = "unknown key run.sed (the command line); did you mean run.seed?"
    assert one_sentence(mxdist("train", file, "run.seed=1", "run.sed=1")) == sentence


def test_what_is_no_run_is_neither_resumed_nor_evaluated_nor_exported(tmp_path: Path) -> None:
    for command in ("resume", "eval"):
        assert "holds no run" in one_sentence(mxdist(command, str(tmp_path)))
    assert "holds no run" in one_sentence(mxdist("export", str(tmp_path), str(tmp_path / "out")))


def test_what_cannot_be_evaluated_is_one_sentence(file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    sentence = one_sentence(mxdist("eval", str(tmp_path)))
    assert sentence.endswith(
        f"is a model without a task; give a configuration: mxdist eval CONFIG model.path={tmp_path}"
    )
    sentence = "none does not exist; give the directory of a run, or a configuration file"
    assert one_sentence(mxdist("eval", "none")) == sentence
    assert "did you mean run.seed?" in one_sentence(mxdist("eval", file, "run.sed=1"))
    sentence = one_sentence(mxdist("eval", file, "--samples", "4", "--temperature", "0", f"run.dir={tmp_path / 'run'}"))
    assert sentence.startswith("--samples 4 with --temperature 0 would give the same answer 4 times")
    assert not (tmp_path / "run").exists()


def test_settings_of_a_resumed_run_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(Config()))
    for command in ("resume", "eval"):
        assert "did you mean run.steps?" in one_sentence(mxdist(command, str(tmp_path), "run.stps=5"))


def test_a_damaged_checkpoint_is_found_before_any_process_starts(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    write_checkpoint(checkpoint, SHAPES["tiny"], seed=0, std=0.02, shard_bytes=1_000_000)
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "run.yaml").write_text("learner: {expert_parallel: 1}\n")
    run = mxdist("train", str(tmp_path / "run.yaml"), f"model.path={checkpoint}", f"run.dir={tmp_path / 'run'}")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert f"{shard} is truncated" in run.stderr
    assert "Ray" not in run.stdout
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_found_within_two_seconds_and_without_ray_or_torch(file: str) -> None:
    code = (
        "import sys\nfrom mxdist.cli import main\n"
        "sys.argv = ['mxdist', 'train', sys.argv[1], 'run.sed=1']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code)\n"
        "print(sorted({'ray', 'torch', 'vllm', 'transformers', 'megatron', 'wandb'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.stdout == "2\n[]\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # processor time: others may be busy


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("change this"), 2),
        (ParityError("change this"), 1),
        (DeadlineExceeded("change this", ("rank 0",)), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_tell_who_has_to_act(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    assert exit_code_of(command) == code
    assert capsys.readouterr().err == f"mxdist: {'interrupted' if code == 130 else 'change this'}\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 / 0)
    assert exit_code_of(lambda: None) == 0
