"""The command `mxdist decompose`: from its options to tables and files."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mxdist.decomposition.huggingface import HuggingFaceSource
from mxdist.decomposition.progress import progress
from mxdist.decomposition.report import Report, json_text, refuse_existing, write_new
from mxdist.decomposition.run_checkpoint import RunSource, is_run
from mxdist.decomposition.selection import select
from mxdist.decomposition.source import Source
from mxdist.decomposition.survey import OnNonFinite, survey
from mxdist.decomposition.table import show
from mxdist.errors import UserError
from mxdist.model.checkpoint_files import is_huggingface
from mxdist.quant.recipe import PRESETS, Operand, Recipe

JSON_FILE = "decomposition.json"
HTML_FILE = "decomposition.html"
WIDTH_WITHOUT_TERMINAL = 100


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; see `mxdist decompose --help`."""

    path: Path
    recipes: Sequence[str]
    only: Sequence[str]
    skip: Sequence[str]
    out: Path | None
    workers: int
    nonfinite: OnNonFinite
    command: str  # as it was typed, for the record


def decompose(options: Options) -> Report:
    """Measure a checkpoint, print the tables, write the files.

    Raises:
        UserError: for anything wrong with the options or the checkpoint, as far as possible before the work begins.
    """
    recipes = [_recipe(name) for name in dict.fromkeys(options.recipes)]
    operands: dict[str, Operand] = {recipe.name: recipe.w for recipe in recipes if recipe.w is not None}
    _prepare(options.out)
    source = open_source(options.path)
    linears, left = select(source.tensors, options.only, options.skip)
    nbytes = sum(linear.tensor.nbytes for linear in linears)
    started = time.monotonic()
    with progress(nbytes) as on_read:
        measured = survey(
            source, linears, operands, workers=options.workers, nonfinite=options.nonfinite, on_read=on_read
        )
    seconds = time.monotonic() - started
    report = Report.build(source.title, options.command, recipes, measured, left)
    console = Console()
    show(report, console if console.is_terminal else Console(width=WIDTH_WITHOUT_TERMINAL))
    if options.out is not None:
        _write(report, options.out)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    rate = f"{nbytes / 1e9:.2f} GB in {seconds:.1f} s, {nbytes / 1e6 / seconds:.0f} MB/s"
    print(f"measured {rate}, at most {math.ceil(memory * 100) / 100:.2f} GiB of memory", file=sys.stderr)
    return report


def open_source(path: Path) -> Source:
    """Return the checkpoint at `path`, whatever its form.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path")
    if is_huggingface(path):
        return HuggingFaceSource(path)
    if is_run(path):
        return RunSource(path)
    pickled = path.is_dir() and any(path.glob("*.bin"))
    what = "only pickled weights (*.bin); convert them to safetensors" if pickled else "no checkpoint"
    advice = "" if pickled else "; give a directory with safetensors files, or a run directory"
    raise UserError(f"{path} holds {what}{advice}")


def _recipe(name: str) -> Recipe:
    recipe = PRESETS.get(name)
    if recipe is None or recipe.w is None:
        wrong = f"unknown recipe {name!r}" if recipe is None else f"the recipe {name!r} does not quantise weights"
        raise UserError(f"{wrong}; choose among {', '.join(preset for preset, r in PRESETS.items() if r.w)}")
    return recipe


def _prepare(out: Path | None) -> None:
    """Find out before the work whether its results can be written."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}; choose another") from None
    for name in (JSON_FILE, HTML_FILE):
        refuse_existing(out / name)


def _write(report: Report, out: Path) -> None:
    from mxdist.decomposition.plots import html_text

    write_new(out / JSON_FILE, json_text(report))
    write_new(out / HTML_FILE, html_text(report))
    print(f"written: {out / JSON_FILE}, {out / HTML_FILE}", file=sys.stderr)
