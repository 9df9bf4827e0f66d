"""What a person sees of a run, on a terminal and elsewhere."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mxdist.observe.console import Console, duration

METRICS = {"critic/rewards/mean": 0.5, "actor/entropy": 0.25, "aqn/sigma": 0.01, "perf/throughput": 1234.5, "x": 1.0}


def show(run_dir: Path, stream: io.StringIO | None = None) -> None:
    (run_dir / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.25}\n{"step": 2, "eval/accuracy": 0.75}\n')
    with Console(run_dir, 2, stream) as console:
        console.phase("starting Ray")
        console.note("learner: 3 linears", full=["first.weight", "second.weight", "third.weight"])
        for step in range(1, 41):
            console.warm_start(step, 40, 1 / step)
        console.step(1, METRICS)
        console.step(2, METRICS | {"eval/accuracy": 0.75})
        console.finished(run_dir)


def on_a_terminal(run_dir: Path, columns: int) -> str:
    """What ``show`` writes to a terminal of so many columns."""
    code = "import sys\nfrom pathlib import Path\nfrom tests.observe.test_console import show\nshow(Path(sys.argv[1]))"
    controller, terminal = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code, str(run_dir)], stdout=terminal, env=environment)
    os.close(terminal)
    output = b""
    try:
        while chunk := os.read(controller, 4096):
            output += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(controller)
    assert process.wait() == 0
    return output.decode()


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    show(tmp_path, stream)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["starting Ray", "learner: 3 linears"]
    assert sum(line.startswith("warm start") for line in lines) == 10
    assert re.fullmatch(r"warm start 40/40  loss 0\.025  left 0 s", lines[11])
    assert lines[12] == "step 1/2  reward 0.500  entropy 0.250  sigma 1.0e-02  tokens/s 1,234  left ?"
    assert lines[13] == (
        "step 2/2  reward 0.500  entropy 0.250  sigma 1.0e-02  accuracy 0.750  tokens/s 1,234  left 0 s"
    )
    assert re.fullmatch(r"finished in \d+ s", lines[14])
    assert lines[15:] == ["greedy accuracy: 0.250 at step 0, 0.750 at step 2", f"run directory: {tmp_path}"]
    assert "\x1b" not in stream.getvalue()


def test_the_log_has_every_line_with_its_time_and_lists_in_full(tmp_path: Path) -> None:
    stream = io.StringIO()
    show(tmp_path, stream)
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in log)
    texts = [line[20:] for line in log]
    assert [text for text in texts if not text.startswith("  ")] == stream.getvalue().splitlines()
    assert texts[2:5] == ["  first.weight", "  second.weight", "  third.weight"]


def test_a_resumed_run_appends_to_the_log(tmp_path: Path) -> None:
    for text in ("once", "again"):
        with Console(tmp_path, stream=io.StringIO()) as console:
            console.note(text)
    assert [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["once", "again"]


def test_why_a_run_stopped_is_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Console(tmp_path, stream=io.StringIO()):
        raise KeyboardInterrupt
    assert "stopped: KeyboardInterrupt" in (tmp_path / "log.txt").read_text()


def test_a_terminal_shows_bars_and_is_left_as_it_was(tmp_path: Path) -> None:
    output = on_a_terminal(tmp_path, 100)
    assert "━" in output
    assert "warm start 40/40" in output
    assert "step 2/2  reward 0.500" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") > 0  # the cursor is hidden, and shown again


def test_a_narrow_terminal_gets_lines_that_fit(tmp_path: Path) -> None:
    output = on_a_terminal(tmp_path, 40)
    assert "━" not in output
    lines = output.splitlines()
    assert "step 1/2  reward 0.500  entropy 0.250" in lines
    assert all(len(line) <= 40 or str(tmp_path) in line for line in lines)


def test_text_with_brackets_is_shown_as_it_is(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console(tmp_path, stream=stream) as console:
        console.note("experts [0-7] :smile: [red]")
    assert stream.getvalue() == "experts [0-7] :smile: [red]\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (3600, "1 h 0 min"), (90000, "25 h 0 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
