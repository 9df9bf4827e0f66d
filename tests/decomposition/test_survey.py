"""The figures: right for Gaussian weights, the same however the checkpoint is cut, in bounded memory."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mxdist.decomposition.huggingface import HuggingFaceSource
from mxdist.decomposition.report import Report, json_text
from mxdist.decomposition.selection import select
from mxdist.decomposition.survey import Measured, survey
from mxdist.quant.decompose import components, measure
from mxdist.quant.moments import Moments
from mxdist.quant.recipe import PRESETS, Operand
from tests.decomposition.conftest import ROOT, normal
from tools.make_checkpoint import SHAPES, write_checkpoint

MXFP4 = {"mxfp4": Operand()}
LAYER = "model.layers.0"


def measured(folder: Path, portion: int | None = None, workers: int = 1, **settings: object) -> list[Measured]:
    source = HuggingFaceSource(folder)
    if portion is not None:
        source.portion_elements = portion
    return survey(source, select(source.tensors)[0], MXFP4, workers=workers, **settings)  # type: ignore[arg-type]


def total(results: list[Measured]) -> Moments:
    return sum((item.moments["mxfp4"] for item in results), start=Moments())


def assert_equal_sums(first: Moments, second: Moments) -> None:
    one, two = first.to_dict(), second.to_dict()
    assert one.pop("histogram") == two.pop("histogram")
    assert one == pytest.approx(two, rel=1e-5, abs=1e-9)


def test_gaussian_weights_read_as_the_gaussian_row(gaussian: Path) -> None:
    figures = total(measured(gaussian)).report()
    assert figures["scale"] == pytest.approx(1.774, rel=0.02)
    assert figures["deadzone"] == pytest.approx(0.021, rel=0.03)  # two digits are published
    assert figures["grid"] == pytest.approx(0.746, rel=0.02)
    assert figures["cos_scale_grid"] == pytest.approx(-0.670, rel=0.02)
    assert figures["nmse"] == pytest.approx(1.335e-2, rel=0.02)
    assert figures["closure"] == pytest.approx(1, abs=1e-4)


def test_sums_do_not_depend_on_shards_portions_or_threads(gaussian: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", SHAPES["tiny-moe"], seed=0, std=2.0**-6, shard_bytes=1 << 40)
    assert len(list(gaussian.glob("*.safetensors"))) > 5
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    whole = {item.linear.tensor.name: item.moments["mxfp4"] for item in measured(tmp_path / "one")}
    for results in (measured(gaussian), measured(gaussian, portion=1000, workers=3)):
        assert whole.keys() == {item.linear.tensor.name for item in results}
        for item in results:
            assert_equal_sums(item.moments["mxfp4"], whole[item.linear.tensor.name])


def test_groups_are_the_exact_parts_of_their_tensors(gaussian: Path) -> None:
    results = measured(gaussian)
    report = Report.build("path", "command", [PRESETS["mxfp4"]], results, [])
    weights = {name: tensor for file in gaussian.glob("*.safetensors") for name, tensor in load_file(file).items()}
    group = next(group for group in report.kinds if group.name == "experts.down_proj")
    parts = [components(weights[name], Operand()) for name in weights if "experts" in name and "down_proj" in name]
    assert group.tensors == len(parts) == 8
    energies = [sum(getattr(part, key).square().sum().item() for part in parts) for key in ("error", "scale", "grid")]
    figures = group.figures("mxfp4")
    assert figures["scale"] == pytest.approx(energies[1] / energies[0], rel=1e-3)  # ties are frequent in bfloat16
    assert figures["grid"] == pytest.approx(energies[2] / energies[0], rel=1e-3)
    assert [group.name for group in report.kinds] == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("experts.gate_proj", "experts.up_proj", "experts.down_proj"),
    ]
    assert [layer.name for layer in report.layers] == ["0", "1"]
    for groups in (report.kinds, report.layers, report.tensors):
        assert sum(group.elements for group in groups) == report.total.elements
        assert report.total.sums is not None
        assert_equal_sums(sum((g.sums["mxfp4"] for g in groups if g.sums), start=Moments()), report.total.sums["mxfp4"])


def test_experts_stored_with_their_inputs_first_are_quantised_along_their_inputs(
    saved: Callable[[dict[str, Tensor]], Path],
) -> None:
    gate_up, down = normal(3, 64, 256), normal(3, 128, 64, seed=1)  # [experts, in, out]
    stacked = {f"{LAYER}.mlp.experts.gate_up_proj": gate_up, f"{LAYER}.mlp.experts.down_proj": down}
    results = measured(saved(stacked), portion=2048)
    for item in results:
        expected = measure(stacked[item.linear.tensor.name].transpose(1, 2), Operand())
        assert_equal_sums(item.moments["mxfp4"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_float_types_are_read_as_they_are(saved: Callable[[dict[str, Tensor]], Path], dtype: torch.dtype) -> None:
    weight = torch.randn(32, 100, generator=torch.Generator().manual_seed(0)).to(dtype)  # 100: no multiple of a block
    assert_equal_sums(total(measured(saved({f"{LAYER}.mlp.up_proj.weight": weight}))), measure(weight, Operand()))


def test_nan_reaches_what_holds_it_and_nothing_else(saved: Callable[[dict[str, Tensor]], Path]) -> None:
    good, bad = normal(4, 256), normal(40, 256, seed=1)
    bad[30, 5], bad[20, 7], bad[20, 200] = math.nan, -math.inf, math.nan
    folder = saved({f"{LAYER}.mlp.up_proj.weight": good, "model.layers.1.mlp.down_proj.weight": bad})
    for portion in (1 << 20, 256):
        results = measured(folder, portion=portion, workers=3, nonfinite="propagate")
        report = Report.build("path", "command", [PRESETS["mxfp4"]], results, [])
        assert [group.sums is None for group in (*report.kinds, *report.layers)] == [False, True, False, True]
        assert all(math.isnan(value) for value in report.total.figures("mxfp4").values())
        name = "model.layers.1.mlp.down_proj.weight"
        assert report.nonfinite == ({"name": name, "position": [20, 7], "value": "-inf"},)
        assert '"nmse":null' in json_text(report)
        assert "NaN" not in json_text(report)


def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path: Path) -> None:
    # 0.5 GB in two tensors of awkward shape: few long rows, and inputs first. Zeros are a hole in the file.
    shapes = {f"{LAYER}.mlp.up_proj.weight": (2, 1 << 26), f"{LAYER}.mlp.experts.down_proj": (1, 1 << 13, 1 << 14)}
    shapes[f"{LAYER}.mlp.experts.gate_up_proj"] = (1, 1 << 14, 1 << 14)
    _write_zeros(tmp_path / "model.safetensors", shapes)
    code = (
        "import sys; from pathlib import Path; import torch; from mxdist.decomposition.command import *;"
        "o = Options(Path(sys.argv[1]), ['mxfp4'], ['*up_proj.weight', '*down_proj'], (), None, 2, 'error', '');"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]);"
        "torch.zeros(1); before = peak(); decompose(o); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 450 * 1024  # KiB; whole rows would need 2 GiB


def _write_zeros(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:

    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
