"""Where a run's metrics go: metrics.jsonl always, TensorBoard and Weights & Biases when asked."""

import math
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from mxdist.config import Config
from mxdist.observe.metrics_file import FILE_NAME, MetricsFile


class Logger(Protocol):
    """One place that takes the metrics of a step."""

    def append(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """All loggers of a run. Use as a context manager, or call ``close``."""

    def __init__(self, run_dir: Path, config: Config, resume_step: int | None = None) -> None:
        """Open them. ``resume_step``: the step the run goes on from; what was logged after it is dropped."""
        self._loggers: list[Logger] = [MetricsFile(run_dir / FILE_NAME, resume_step)]
        if config.log.tensorboard:
            self._loggers.append(TensorBoard(run_dir / "tensorboard", resume_step))
        if config.log.wandb != "disabled":
            self._loggers.append(WeightsAndBiases(run_dir, config, resume_step))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log all metrics of a step, which comes once and after every earlier one."""
        for logger in self._loggers:
            logger.append(step, metrics)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
        self._loggers = []

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class TensorBoard:
    """Event files, written without importing torch."""

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory), flush_secs=10)
        if resume_step is not None:  # readers then drop what an earlier process wrote of later steps
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run below the run directory. It learns the configuration and the metrics, nothing else:

    no source code, git remote, machine data, command line or terminal output. Offline it makes no connection;
    ``wandb sync`` uploads it later. A resumed run is the same run to Weights & Biases.
    """

    def __init__(self, run_dir: Path, config: Config, resume_step: int | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
        import wandb

        settings = wandb.Settings(silent=True, console="off", disable_code=True, x_disable_machine_info=True)
        offline = config.log.wandb == "offline"
        self._run = wandb.init(
            mode="offline" if offline else "online",
            dir=run_dir,
            project=config.log.wandb_project,
            name=run_dir.name,
            id=_run_id(run_dir / "wandb" / "run_id"),
            resume=None if offline or resume_step is None else "allow",
            config=config.model_dump(mode="json"),
            settings=settings,
        )

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        with suppress(KeyboardInterrupt):
            self._run.finish()


def _run_id(path: Path) -> str:
    """The run's id at Weights & Biases: made once, kept in the run directory."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex[:16])
    return path.read_text()
