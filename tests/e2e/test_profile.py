"""``mxdist profile`` on real processes."""

import gzip
import json
from pathlib import Path

from mxdist.observe.profile import PHASES
from tests.e2e.command import QUICKSTART, SHORT, mxdist


def test_profile_measures_both_recipes_and_saves_table_json_and_trace(tmp_path: Path) -> None:
    one_rank = ("learner.ranks=1", "learner.expert_parallel=1")
    done = mxdist(
        "profile", QUICKSTART, *SHORT, *one_rank, "--steps", 2, "--warmup", 1, "--trace", "--out", tmp_path / "out",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "out" / "profile.json").read_text())
    ours, other = result["runs"]["mxfp4_mbs_of"], result["runs"]["bf16"]
    for run in (ours, other):
        assert len(run["steps"]) == 2
        for step in run["steps"]:
            assert abs(sum(step[phase] for phase in PHASES) - step["step"]) < 1e-9
            assert step["rollout"] > 0
            assert 0 < step["forward"] < 2 * step["backward"]
            assert abs(step["unaccounted"]) < 0.2 * step["step"]
        assert run["amounts"]["MiB of learner"] > 100
    assert ours["amounts"]["MB of a sync"] < 0.5 * other["amounts"]["MB of a sync"]
    table = (tmp_path / "out" / "profile.txt").read_text()
    assert max(map(len, table.splitlines())) <= 60
    assert table.splitlines()[0] in done.out
    assert table.splitlines()[0] in (tmp_path / "out" / "log.txt").read_text()
    for recipe in ("mxfp4_mbs_of", "bf16"):
        with gzip.open(tmp_path / "out" / f"trace_{recipe}.json.gz", "rt") as stream:
            names = {event.get("name") for event in json.load(stream)["traceEvents"]}
        assert {"forward_backward", "forward", "optimizer"} <= names
        assert not list((tmp_path / "out" / recipe / "checkpoints").glob("step_*"))


def test_a_recipe_is_not_compared_with_itself(tmp_path: Path) -> None:
    done = mxdist("profile", QUICKSTART, "--against", "mxfp4_mbs_of", cwd=tmp_path)
    assert done.code == 2
    assert "name another with --against" in done.err
