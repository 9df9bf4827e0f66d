"""Recipes by module name through the whole system: printed, agreed on by both sides, watched, refused in time."""

from pathlib import Path

from tests.e2e.command import QUICKSTART, SHORT, metrics_of, mxdist

OVERRIDES = 'recipe_overrides=[{modules: "*.0.self_attn.*", recipe: bf16}, {modules: "*.down_proj", recipe: mxfp4_g4}]'


def test_a_run_with_overrides_trains_and_both_sides_hold_the_same_bytes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = mxdist("train", QUICKSTART, f"run.dir={run_dir}", *SHORT, OVERRIDES, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    lists = {line.split(": ")[1] for line in done.out.splitlines() if "linears in" in line}
    assert lists == {"36 linears in mxfp4_mbs_of", "16 linears in mxfp4_g4"}
    metrics = metrics_of(run_dir)
    assert metrics[2]["parity/checked_tensors"] > 0
    for kind in ("weights", "activations", "gradients"):  # watched in steps 1, 11, ...
        nmse = metrics[1][f"quant/nmse/{kind}"]
        # A model this fresh earns no reward: its gradients are zero, and so is what quantising them could lose.
        assert nmse is None if kind == "gradients" else 0 < nmse < 0.1
        assert f"quant/nmse/{kind}" not in metrics[2]


def test_an_override_that_matches_nothing_is_refused_before_anything_starts(tmp_path: Path) -> None:
    wrong = 'recipe_overrides=[{modules: "model.layers.9.*", recipe: bf16}]'
    done = mxdist("train", QUICKSTART, f"run.dir={tmp_path / 'run'}", wrong, cwd=tmp_path)
    assert done.code == 2
    assert "'model.layers.9.*' (recipe bf16) matches none of the model's 56 linears" in done.err
    assert not (tmp_path / "run").exists()
