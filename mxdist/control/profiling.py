"""The command profile: the same few steps with two recipes, one after the other, and what each of them cost."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mxdist import __version__
from mxdist.config import Config, dump_config, load_config
from mxdist.control import app
from mxdist.control.loop import Measurement
from mxdist.control.processes import gpus_wanted
from mxdist.errors import UserError
from mxdist.observe.console import Console
from mxdist.observe.metrics_file import FILE_NAME, read_metrics
from mxdist.observe.profile import MFU, Speed, measure, ratios, table
from mxdist.observe.run_directory import new_directory

RESULT = "profile.json"
TABLE = "profile.txt"


@dataclass(frozen=True)
class Options:
    config: Path
    settings: Sequence[str]
    against: str  # a recipe
    steps: int  # measured
    warmup: int  # before them
    out: Path | None  # None: a new directory under runs/
    trace: bool  # of the learner's update in one more step


def profile(options: Options) -> None:
    """Measure both recipes, print the table, and save it with everything behind it.

    Raises:
        UserError: both recipes are the same, or the directory is in use; and whatever a run raises.
    """
    ours, other = (_config(options, *changes) for changes in ((), (f"recipe={options.against}", "recipe_overrides=[]")))
    if ours.recipe == other.recipe:
        raise UserError(f"CONFIG has recipe={ours.recipe} itself; name another with --against, or set recipe=NAME")
    out = _directory(options.out, ours.run.name)
    with Console(out) as console:
        speeds = []
        for config in (ours, other):
            console.phase(f"{config.recipe}: steps to warm up {options.warmup}, measured {options.steps}")
            speeds.append(_run(config, options, out))
        for line in (lines := table(*speeds)):
            console.note(line)
        if MFU not in speeds[0].rates:
            lines.append("no MFU: the peak of this device is not known")
            console.note(lines[-1])
        (out / TABLE).write_text("\n".join(lines) + "\n")
        _save(out, options, ours, speeds)
        console.note(f"saved in {out}")


def _config(options: Options, *changes: str) -> Config:
    fixed = (
        "warm_start.steps=0",
        f"run.steps={options.warmup + options.steps + options.trace}",
        "run.restarts=0",
        "log.tensorboard=false",
        "log.wandb=disabled",
    )
    return load_config(options.config, [*options.settings, *fixed, *changes])


def _directory(asked: Path | None, name: str) -> Path:
    if asked is None:
        return new_directory(f"{name}-profile")
    if (asked / RESULT).exists() or (asked.exists() and not asked.is_dir()):
        raise UserError(f"--out {asked} holds a profile or is no directory; choose another")
    asked.mkdir(parents=True, exist_ok=True)
    return asked.absolute()


def _run(config: Config, options: Options, out: Path) -> Speed:
    run = config.run.model_copy(update={"dir": out / config.recipe})
    trace = out / f"trace_{config.recipe}.json.gz" if options.trace else None
    app.train(config.model_copy(update={"run": run}), Measurement(trace))
    first, last = options.warmup + 1, options.warmup + options.steps
    lines = [line for line in read_metrics(out / config.recipe / FILE_NAME) if first <= line["step"] <= last]
    return measure(config.recipe, lines, gpus_wanted(config))


def _save(out: Path, options: Options, config: Config, speeds: Sequence[Speed]) -> None:
    result = {
        "mxdist": __version__,
        "recipe": speeds[0].recipe,
        "against": speeds[1].recipe,
        "steps": options.steps,
        "warmup": options.warmup,
        "gpus": gpus_wanted(config),
        "ratios": ratios(*speeds),
        "runs": {speed.recipe: speed.as_json() for speed in speeds},
        "config": dump_config(config),
    }
    (out / RESULT).write_text(json.dumps(result, indent=2) + "\n")
