"""The command as a user meets it: tables at several widths, files, mistakes, interruption."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from mxdist.decomposition.command import HTML_FILE, JSON_FILE, Options, decompose, open_source
from mxdist.decomposition.plots import components_by_layer, cosines_by_layer, html_text
from mxdist.decomposition.report import Report, json_text
from mxdist.decomposition.selection import select
from mxdist.decomposition.survey import survey
from mxdist.decomposition.table import show
from mxdist.errors import UserError
from mxdist.quant.recipe import PRESETS
from tests.decomposition.conftest import ROOT, mxdist, normal

RECIPES = ("mxfp4", "mxfp4_mbs", "mxfp4_of", "mxfp4_mbs_of")
Save = Callable[[dict[str, Tensor]], Path]


@pytest.fixture(scope="module")
def report(gaussian: Path) -> Report:
    """All four recipes, on the first layer."""
    source = open_source(gaussian)
    linears, left = select(source.tensors, only=["*.layers.0.*"])
    recipes = [PRESETS[name] for name in RECIPES]
    measured = survey(source, linears, {recipe.name: recipe.w for recipe in recipes if recipe.w})
    return Report.build(source.title, "mxdist decompose", recipes, measured, left)


def shown(report: Report, width: int) -> str:
    stream = io.StringIO()
    show(report, Console(file=stream, width=width))
    return stream.getvalue()


def options(path: Path, out: Path | None = None, **changes: object) -> Options:
    settings = {"recipes": ["mxfp4"], "only": (), "skip": (), "workers": 1, "nonfinite": "error", "command": ""}
    return Options(path=path, out=out, **(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(report: Report, width: int) -> None:
    text = shown(report, width)
    assert max(map(len, text.splitlines())) <= width
    rows = [line for line in text.splitlines() if line.startswith("total ")]
    assert len(rows) == 5  # of four recipes and their comparison
    assert "…" not in text
    for heading in ("scale", "deadzone", "grid", "cos", "NMSE", "experts.down_proj", *RECIPES):
        assert heading in text
    assert re.findall(r"\(not shown .*", text) == (
        ["(not shown at this width: gain, gamma, zeroed)"] * 2
        + ["(not shown at this width: gain, gamma, zeroed, cross)"] * 2
        if width == 60
        else []
    )


def test_recipes_that_do_not_fit_side_by_side_continue_below(report: Report) -> None:
    rows = [line.split() for line in shown(report, 50).splitlines() if line.startswith("total ")]
    assert len(rows) == 6
    assert max(map(len, shown(report, 50).splitlines())) <= 50


def test_the_table_shows_what_was_measured(report: Report) -> None:
    rows = [line.split() for line in shown(report, 120).splitlines() if line.startswith("total ")]
    figures = report.total.figures("mxfp4")
    keys = ("scale", "deadzone", "grid", "cos_scale_grid")
    assert rows[0][1:5] == [f"{figures[key]:.3f}" for key in keys]
    assert float(rows[0][7]) == pytest.approx(figures["nmse"], rel=1e-3)
    assert len(rows[0]) == len(rows[1]) == 9  # no cross term without fallback
    assert len(rows[2]) == len(rows[3]) == 10
    nmse = [report.total.figures(name)["nmse"] for name in RECIPES]
    assert [float(cell) for cell in rows[4][2::2]] == pytest.approx([value / nmse[0] for value in nmse], abs=1e-3)


def test_the_json_round_trips(report: Report) -> None:
    again = Report.from_dict(json.loads(json_text(report)))
    assert again.to_dict() == report.to_dict()
    assert (again.recipes, again.total, again.kinds) == (report.recipes, report.total, report.kinds)
    data = report.to_dict()
    assert data["recipes"]["mxfp4_of"]["w"]["fallback"]["alpha"] == 0.5
    assert {"reason": "router", "dtype": "BF16", "shape": [4, 256], "name": "model.layers.0.mlp.gate.weight"} in data[
        "left"
    ]
    with pytest.raises(ValueError, match="format 0"):
        Report.from_dict(data | {"format": 0})


def test_the_page_needs_nothing_else_and_shows_four_figures(report: Report) -> None:
    page = html_text(report)
    assert page.count('class="plotly-graph-div"') == 4
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=", page)
    for title in ("Parts of the error", "Cosine", "Scale bias", "Effect of each correction"):
        assert f"<h2>{title}" in page


def test_layers_of_the_figures_are_marked_by_whole_numbers(report: Report) -> None:
    for figure in (components_by_layer(report), cosines_by_layer(report)):
        assert all(axis.dtick == 1 for axis in figure.select_xaxes())


def test_the_page_shows_the_names_of_a_checkpoint_and_does_not_run_them(report: Report) -> None:
    hostile = "<script>alert(1)</script>"
    data = json.loads(json_text(report).replace("q_proj", hostile)) | {"path": hostile, "command": hostile}
    page = html_text(Report.from_dict(data))
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 3


def test_the_command_prints_tables_and_writes_files_once(gaussian: Path, tmp_path: Path) -> None:
    arguments = (gaussian, "--only", "*.layers.1.*", "--out", tmp_path / "new" / "out")
    done = mxdist(*arguments)
    assert done.returncode == 0, done.stderr
    assert "16 of 45 tensors" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert re.search(r"measured 0\.00 GB in [\d.]+ s, \d+ MB/s, at most \d\.\d\d GiB of memory", done.stderr)
    written = tmp_path / "new" / "out"
    assert {file.name for file in written.iterdir()} == {JSON_FILE, HTML_FILE}
    data = json.loads((written / JSON_FILE).read_text())
    assert data["command"].startswith("mxdist decompose")
    assert "--only '*.layers.1.*'" in data["command"]
    before = {file: file.stat().st_mtime_ns for file in written.iterdir()}
    again = mxdist(*arguments)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"mxdist: {written / JSON_FILE} exists already; choose another --out, or remove it\n"
    assert {file: file.stat().st_mtime_ns for file in written.iterdir()} == before


def test_starting_the_command_imports_nothing_heavy() -> None:
    code = "import sys; import mxdist.decomposition.command; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["transformers", "ray", "megatron", "vllm", "plotly", "pandas", "torch.distributed.checkpoint"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_control_c_ends_it_in_one_line(tmp_path: Path) -> None:
    from tests.decomposition.test_survey import _write_zeros

    _write_zeros(tmp_path / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": (1 << 17, 1 << 17)})
    command = [sys.executable, "-m", "mxdist", "decompose", str(tmp_path), "--recipe", "mxfp4_mbs"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=-1,
        stderr=-1,
        text=True,
        # A test run in the background of a script ignores interrupts, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "model.safetensors" not in maps.read_text():  # until it measures
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "mxdist: interrupted\n")


# Mistakes


def test_recipes_that_do_not_exist_or_do_not_quantise_are_refused(gaussian: Path) -> None:
    with pytest.raises(UserError, match="unknown recipe 'mxfp5'; choose among mxfp4, mxfp4_mbs, mxfp4_of"):
        decompose(options(gaussian, recipes=["mxfp4", "mxfp5"]))
    with pytest.raises(UserError, match="the recipe 'bf16' does not quantise weights"):
        decompose(options(gaussian, recipes=["bf16"]))


def test_paths_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none does not exist; check the path"):
        open_source(tmp_path / "none")
    with pytest.raises(UserError, match="holds no checkpoint; give a directory with safetensors files"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="only pickled weights"):
        open_source(tmp_path)


def test_damaged_shards_are_named(gaussian: Path, tmp_path: Path) -> None:
    for file in gaussian.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    content = shard.read_bytes()
    for damaged in (content[:-1], content[:50], b"", b"\xff" * 100):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{shard.name} is truncated or no safetensors file"):
            open_source(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=rf"the shard .*{shard.name} is missing"):
        open_source(tmp_path)
    other = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=rf"{shard.name} lacks model.layers"):
        open_source(tmp_path)
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(UserError, match=r"model.safetensors.index.json is no index"):
            open_source(tmp_path)


def test_a_nan_stops_the_command_with_its_place(saved: Save) -> None:
    weight = normal(300, 128)
    weight[251, 3] = torch.inf
    folder = saved({"model.layers.0.mlp.up_proj.weight": weight, "model.layers.0.mlp.ids": torch.arange(3)})
    done = mxdist(folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"mxdist: model.layers.0.mlp.up_proj.weight of shape \[300, 128\] in .*/model.safetensors holds inf at "
        r"\[251, 3\]; mend it, .*--nonfinite propagate\n",
        done.stderr,
    )
    done = mxdist(folder, "--nonfinite", "propagate", "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    assert "1 tensor(s) with NaN or Inf" in (folder / "out" / HTML_FILE).read_text()
    assert re.search(r"^total( +nan){8}$", done.stdout, re.M)
    assert "holds inf at [251, 3]" in done.stdout
    assert "Skipped, for integer tensors cannot be quantised: model.layers.0.mlp.ids." in done.stdout


def test_an_output_directory_that_cannot_be_made_is_found_before_the_work(gaussian: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        decompose(options(gaussian, out=tmp_path / "file" / "out"))
