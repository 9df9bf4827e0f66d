"""The ``mxdist`` command. Thin: it reads the configuration, then imports what does the work.

Exit codes: 0 done, 1 a run's own guards stopped it, 2 the user's mistake, 75 asked to stop by a scheduler (SIGTERM),
to be queued again with 'mxdist resume', 130 interrupted. Anything else is a bug and shows its traceback.
"""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Literal, NoReturn

import typer

from mxdist import __version__
from mxdist.config import Config, load_config
from mxdist.errors import RunStopped, UserError
from mxdist.interrupts import INTERRUPTED, MESSAGE, ending_at_once
from mxdist.observe.run_directory import CONFIG_FILE, require_run
from mxdist.observe.third_party_output import quieten_third_party

# The base class of all mistakes in arguments, which typer does not export.
UsageError: type[typer.BadParameter] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="Post-train language models by reinforcement learning in MXFP4.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, which any width and any pager can show
    context_settings={"help_option_names": ["-h", "--help"], "terminal_width": min(get_terminal_size().columns, 100)},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory that 'mxdist train' made.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings that replace the file's, such as run.seed=1, or more .yaml files."
    ),
]


@app.command()
def train(config: ConfigFile, settings: Settings = None) -> None:
    """Start a new run and train it to its end.

    Everything about it goes into its run directory: run.dir, or runs/NAME-DATE-TIME.
    """
    resolved = load_config(config, settings or [])
    _protect_ray(resolved)
    with ending_at_once():
        from mxdist.control import app as control

    control.train(resolved)


@app.command()
def resume(run_dir: RunDir, settings: Settings = None) -> None:
    """Go on from a run's newest checkpoint.

    Checkpoints that are damaged are passed over. Most settings may change, such as run.steps or the learner's layout;
    what the checkpoint does not fit, such as another shape of the model, is refused before anything is started.
    """
    _protect_ray(_check_run(run_dir, settings))
    with ending_at_once():
        from mxdist.control import app as control

    control.resume(run_dir, settings or [])


@app.command(name="eval")
def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR|CONFIG",
            help="A run's directory: its newest checkpoint. Or a YAML file: its model before any training.",
        ),
    ],
    settings: Settings = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Answers to each problem; with several pass@k and maj@N.")
    ] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", min=0, help="0 is greedy, as one answer is unless told; else rollout.temperature."),
    ] = None,
) -> None:
    """Accuracy on held-out problems.

    With standard errors, for the run's recipe and for BF16 weights. To evaluate a Hugging Face model, give a
    configuration that names the task: mxdist eval CONFIG model.path=DIR. That makes a run directory, as train does.

    Every answer goes into eval/ of the run directory.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give the directory of a run, or a configuration file")
    if path.is_dir() and not (path / CONFIG_FILE).is_file() and (path / "config.json").is_file():
        raise UserError(f"{path} is a model without a task; give a configuration: mxdist eval CONFIG model.path={path}")
    _protect_ray(_check_run(path, settings) if path.is_dir() else load_config(path, settings or []))
    with ending_at_once():
        from mxdist.control import eval_command

    eval_command.evaluate(path, samples, temperature, settings or [])


@app.command()
def profile(
    config: ConfigFile,
    settings: Settings = None,
    against: Annotated[str, typer.Option(metavar="RECIPE", help="The recipe to compare with.")] = "bf16",
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them.")] = 2,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to save, instead of under runs/.")] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Save a torch profiler trace of one learner step too.")
    ] = False,
) -> None:
    """Where the time of a step goes.

    The same few steps with two recipes, one after the other: same seeds and prompts, no warm start, evaluation or
    checkpoint. Prints a table and saves it with profile.json.
    """
    _protect_ray(load_config(config, settings or []))  # and mistakes in the settings show before the heavy imports
    with ending_at_once():
        from mxdist.control import profiling

    profiling.profile(profiling.Options(config, settings or [], against, steps, warmup, out, trace))


@app.command()
def decompose(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A directory of safetensors, or a run directory.")],
    recipe: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A recipe, mxfp4 unless given; repeat to compare.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only tensors of such names.")] = None,
    skip: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="All but tensors of such names.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write JSON and plots (HTML) into it.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = len(os.sched_getaffinity(0)),
    nonfinite: Annotated[
        Literal["error", "propagate"], typer.Option(help="What NaN and Inf do: stop, or make the figures NaN.")
    ] = "error",
) -> None:
    """Where a checkpoint's error comes from.

    Splits the error of quantising its weights exactly into scale, deadzone and grid, for every linear that a recipe
    quantises. Of a run the newest checkpoint that is not damaged is taken, as by resume.
    """
    with ending_at_once():
        from mxdist.decomposition import command

    typed = shlex.join(["mxdist", *sys.argv[1:]])
    recipes = recipe or ["mxfp4"]
    command.decompose(command.Options(path, recipes, only or (), skip or (), out, workers, nonfinite, typed))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Also: would this YAML file start?")] = None,
    settings: Settings = None,
    gpu: Annotated[
        Literal["A100-80", "H100", "H200", "B200"] | None,
        typer.Option(help="Estimate for such GPUs, and look at nothing of this machine."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """What would fail here, and the fix.

    Looks at versions, GPUs, limits and disk; with CONFIG also at its checkpoint, its data and the memory it needs.

    Exit code 0: it would start; 1: it would not.
    """
    with ending_at_once():
        from mxdist.doctor import command

    return command.doctor(config, settings or [], gpu, json)


@app.command()
def settings(
    prefix: Annotated[
        str, typer.Argument(metavar="[PREFIX]", help="Only keys that begin so, such as rollout or learner.zero.")
    ] = "",
) -> None:
    """List the settings and their defaults."""
    from mxdist.config.listing import listing

    print("\n".join(listing(prefix, min(get_terminal_size((100, 24)).columns, 100))))


@app.command()
def export(
    run_dir: RunDir,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A new directory, or an empty one.")],
    form: Annotated[
        Literal["bf16", "mxfp4"],
        typer.Option(help="bf16, for any software; mxfp4, packed, for vLLM with this project's plugin."),
    ] = "bf16",
) -> None:
    """Write a Hugging Face directory.

    It holds the model of the run's newest checkpoint.
    """
    require_run(run_dir)
    with ending_at_once():
        from mxdist.control import exporting

    exporting.export(run_dir, out_dir, form)


@app.callback()
def _without_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"mxdist {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(UserError.exit_code)


def main() -> NoReturn:
    """The console script."""
    quieten_third_party()
    sys.exit(exit_code_of(lambda: app(prog_name="mxdist", standalone_mode=False)))


def exit_code_of(command: Callable[[], object]) -> int:
    """Run a command; say in one line why it failed, unless that is a bug."""
    try:
        result = command()
    except (UserError, RunStopped) as error:
        return _failed(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except UsageError as error:
        asked = error.ctx.command_path if error.ctx else "mxdist"
        return _failed(f"{error.format_message()} (see '{asked} --help')", UserError.exit_code)
    if result == INTERRUPTED:  # typer turns an interrupt inside a command into this, and says nothing
        return _interrupted()
    return result if isinstance(result, int) else 0


def _failed(message: str, code: int) -> int:
    print(f"mxdist: {message}", file=sys.stderr)
    return code


def _interrupted() -> int:
    print(MESSAGE, file=sys.stderr)
    return INTERRUPTED


def _protect_ray(config: Config) -> None:
    """Who can reach Ray's processes, which run any code that they are sent. Before Ray is imported, which reads this.

    On a machine alone they listen on its loopback interface. There as on a cluster they ask for Ray's token.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if config.cluster.address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def _check_run(run_dir: Path, settings: list[str] | None) -> Config:
    """Find mistakes in the settings before the heavy imports."""
    require_run(run_dir)
    return load_config(run_dir / CONFIG_FILE, settings or [])
