"""Recipes by module name that match nothing. tests/e2e/test_missed_weights.py trains with some that do."""

from pathlib import Path

from tests.e2e.command import QUICKSTART, mxdist


def test_an_override_that_matches_nothing_is_refused_before_anything_starts(tmp_path: Path) -> None:
    wrong = 'recipe_overrides=[{modules: "model.layers.9.*", recipe: bf16}]'
    done = mxdist("train", QUICKSTART, f"run.dir={tmp_path / 'run'}", wrong, cwd=tmp_path)
    assert done.code == 2
    assert "'model.layers.9.*' (recipe bf16) matches none of the model's 56 linears" in done.err
    assert not (tmp_path / "run").exists()
