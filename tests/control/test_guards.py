"""The bounds on a step's metrics."""

import math

import pytest

from mxdist.config.schema import GuardConfig
from mxdist.control.guards import Guards
from mxdist.errors import NotFinite, RollBack, RunStopped

GOOD = {
    "rollout_corr/k3_kl": 0.01,
    "actor/entropy": 0.5,
    "rollout/groups_without_signal": 3.0,
    "guards/skipped_update": 0.0,
}


def guards(notes: list[str], **settings: object) -> Guards:
    return Guards(GuardConfig.model_validate(settings), 4, notes.append)


@pytest.mark.parametrize(
    ("setting", "metric", "bad"),
    [
        ({"max_mismatch": 0.1}, "rollout_corr/k3_kl", 0.2),
        ({"max_mismatch": 0.1}, "rollout_corr/k3_kl", math.nan),
        ({"min_entropy": 0.1}, "actor/entropy", 0.05),
        ({"min_entropy": 0.1}, "actor/entropy", math.nan),
    ],
)
def test_a_bound_that_is_passed_warns_stops_or_rolls_back(setting: dict[str, float], metric: str, bad: float) -> None:
    notes: list[str] = []
    guards(notes, **setting).check(1, GOOD)
    for then, error in (("stop", RunStopped), ("roll_back", RollBack)):
        with pytest.raises(error, match=rf"^step 7: {metric} .*guards\.{next(iter(setting))}="):
            guards(notes, **setting, then=then).check(7, GOOD | {metric: bad})
    assert notes == []
    guards(notes, **setting, then="warn").check(7, GOOD | {metric: bad})
    assert len(notes) == 1
    guards(notes).check(7, GOOD | {metric: bad})  # no bound by default
    assert len(notes) == 1


def test_rewards_are_pinned_when_no_group_has_signal_for_so_many_steps_in_a_row() -> None:
    watch = guards([], pinned_reward_steps=3)
    pinned = GOOD | {"rollout/groups_without_signal": 4.0}
    for step, metrics in enumerate([pinned, pinned, GOOD, pinned, pinned], start=1):
        watch.check(step, metrics)
    with pytest.raises(RunStopped, match="step 6: no group's rewards have differed for 3 steps"):
        watch.check(6, pinned)


def test_a_gradient_that_is_no_number_rolls_back_only_when_asked_to() -> None:
    found = NotFinite("update 3: ...")
    assert guards([]).not_finite(found) is found
    assert isinstance(guards([], not_finite="roll_back").not_finite(found), RollBack)
