"""What a person sees of a run: phases, progress, steps and a summary; all of it with times also in log.txt.

On a terminal a bar shows what is under way. Where the output is no terminal, or a narrow one, there are plain lines.
"""

import atexit
import sys
import textwrap
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from mxdist.observe.metrics_file import FILE_NAME, read_metrics

LOG_FILE = "log.txt"
NARROW = 70  # columns; a bar needs more
STEPS_FOR_ESTIMATE = 20  # the time left is judged by the latest so many steps
WARM_START_LINES = 10  # lines of a warm start where no bar shows it, and in log.txt

STEP_FIELDS = (  # what a step's line shows: label, metric, format
    ("reward", "critic/rewards/mean", "{:.3f}"),
    ("entropy", "actor/entropy", "{:.3f}"),
    ("sigma", "aqn/sigma", "{:.1e}"),
    ("accuracy", "eval/accuracy", "{:.3f}"),
    ("tokens/s", "perf/throughput", "{:,.0f}"),
)


class Console:
    """Shows one run. Use as a context manager, or call ``close``; a second ``close`` does nothing."""

    def __init__(self, run_dir: Path, steps: int = 0, stream: TextIO | None = None) -> None:
        """Append to the run's log.txt and show on ``stream``, standard output by default.

        Args:
            steps: steps of the whole run; 0 where no step will come.
        """
        self._log = open(run_dir / LOG_FILE, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        self._out = RichConsole(file=stream or sys.stdout, highlight=False, markup=False, emoji=False)
        self._steps = steps
        self._started = self._step_ended = time.monotonic()
        self._kind = ""  # of the steps under way: warm start or training
        self._step_seconds: deque[float] = deque(maxlen=STEPS_FOR_ESTIMATE)
        self._width = self._out.width if self._out.is_terminal else None  # None: nothing wraps
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._width is not None and self._width >= NARROW:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._out, transient=True)
        atexit.register(self.close)

    def phase(self, text: str) -> None:
        """Something that takes a while begins, such as "starting Ray"."""
        self._line(text)
        self._show_bar(text, None, 0)

    def note(self, text: str, full: Sequence[str] = ()) -> None:
        """A line. ``full``: what it sums up, item by item, for log.txt alone."""
        self._line(text)
        for item in full:
            self._record(f"  {item}")

    def working(self, text: str) -> None:
        """What is under way within a step. Only a terminal's bar shows it."""
        self._show_bar(text, None, 0)

    def warm_start(self, step: int, steps: int, loss: float) -> None:
        """Supervised step ``step`` of ``steps`` is done."""
        self._ended_step("warm start")
        text = f"warm start {step}/{steps}  loss {loss:.3f}  left {self._time_left(steps - step)}"
        self._show_bar(text, steps, step)
        if step % max(steps // WARM_START_LINES, 1) == 0 or step == steps:
            self._record(text) if self._bar else self._line(text)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step ``step`` (from 1) is done, with these metrics."""
        self._ended_step("training")
        digits = len(str(self._steps))
        fields = [f"step {step:{digits}d}/{self._steps}"]
        fields += [f"{label} {form.format(metrics[name])}" for label, name, form in STEP_FIELDS if name in metrics]
        left = self._time_left(self._steps - step)
        self._line("  ".join([*fields, f"left {left}"]))
        self._show_bar(f"training {step}/{self._steps}  left {left}", self._steps, step)

    def finished(self, run_dir: Path) -> None:
        """The run is at its end: sum it up."""
        self._hide_bar()
        lines = list(read_metrics(run_dir / FILE_NAME))
        accuracies = [(line["step"], line["eval/accuracy"]) for line in lines if "eval/accuracy" in line]
        self._line(f"finished in {duration(time.monotonic() - self._started)}")
        if accuracies:
            (first, before), (last, after) = accuracies[0], accuracies[-1]
            self._line(f"greedy accuracy: {before:.3f} at step {first}, {after:.3f} at step {last}")
        self._line(f"run directory: {run_dir}")

    def close(self) -> None:
        self._hide_bar()
        if not self._log.closed:
            self._log.close()
        atexit.unregister(self.close)

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not self._log.closed:
            self._record(f"stopped: {type(error).__name__}: {error}")
        self.close()

    def _line(self, text: str) -> None:
        """Show a line and record it. A narrow terminal breaks it between words, later parts indented."""
        if self._width:
            shown = textwrap.fill(
                text, self._width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
        else:
            shown = text
        self._out.print(shown, soft_wrap=True)
        if self._bar is None:
            self._out.file.flush()
        self._record(text)

    def _record(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._log.flush()

    def _show_bar(self, text: str, total: int | None, done: int) -> None:
        if self._bar is None:
            return
        self._bar.start()
        if self._task is None or self._bar.tasks[-1].total != total:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(text, total=total)
        self._bar.update(self._task, description=text, completed=done, refresh=done == total)

    def _hide_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _ended_step(self, kind: str) -> None:
        """Note how long a step took. Nothing is known about the first of its kind: other work came before it."""
        now = time.monotonic()
        if kind == self._kind:
            self._step_seconds.append(now - self._step_ended)
        else:
            self._step_seconds.clear()
        self._kind, self._step_ended = kind, now

    def _time_left(self, steps: int) -> str:
        if steps and not self._step_seconds:
            return "?"
        return duration(steps * sum(self._step_seconds) / max(len(self._step_seconds), 1))


def duration(seconds: float) -> str:
    """As people say it: 9 s, 2 min 5 s, 1 h 3 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
