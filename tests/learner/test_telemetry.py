"""Quantisation errors watched during real updates: exact sums, sums over ranks, and nothing when it is off."""

import pytest
import torch

from mxdist.config.schema import Grpo
from mxdist.learner.worker import LearnerWorker
from mxdist.messages import Mean
from tests.learner.batches import random_batch
from tests.model.ranks import DENSE, MOE, Learners, RankProcesses

SHARES = ("scale_bias", "deadzone", "grid", "cross_scale_grid", "cross_scale_deadzone")


def watched(learners: Learners, lr: float = 1e-3) -> dict[str, Mean]:
    """The means of one update, summed over ranks, which all have the same names."""
    reports = learners.call("update", random_batch(), Grpo(), lr, True)
    assert len({frozenset(report.means) for report in reports}) == 1
    return {name: sum((r.means[name] for r in reports), Mean(0, 0)) for name in reports[0].means}


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4_mbs_of", "mxfp4_mbs_of_g4"])
def test_components_and_crosses_add_to_the_whole_error(recipe: str, ranks: RankProcesses) -> None:
    with ranks.learners(MOE, recipe, 2) as learners:
        means = watched(learners)
    kinds = ["weights", "activations"] + ["gradients"] * recipe.endswith("g4")
    assert {name.rpartition("/")[2] for name in means if name.startswith("quant/nmse")} == set(kinds)
    for kind in kinds:
        shares = [means[f"quant/{share}/{kind}"].value for share in SHARES]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert min(shares[:3]) > 0
        assert 0.002 < means[f"quant/nmse/{kind}"].value < 0.1
        assert means[f"quant/gain/{kind}"].value == pytest.approx(1, abs=0.1)
        assert 0 <= means[f"quant/zeroed/{kind}"].value < 0.5
        assert means[f"quant/saturated/{kind}"].value == 0  # the ceil rule never saturates
        assert -1 < means[f"quant/cosine/{kind}"].value < 0.5
    residual = "of" in recipe.split("_")
    assert {means[f"quant/flagged_fraction/{kind}"].value == 1 for kind in kinds[:2]} == {residual}


def test_weight_figures_of_two_ranks_add_to_those_of_one(ranks: RankProcesses) -> None:
    found = []
    for count in (1, 2):
        with ranks.learners(MOE, "mxfp4_mbs", count) as learners:
            found.append(watched(learners, lr=0.0))
    names = [name for name in found[0] if name.endswith("/weights") and "cosine" not in name]
    assert len(names) == 10
    for name in names:  # attention counts once, though both ranks hold it
        assert found[1][name].total == pytest.approx(found[0][name].total, rel=1e-4)
        assert found[1][name].weight == pytest.approx(found[0][name].weight, rel=1e-4)


def test_weight_figures_are_those_of_the_exact_decomposition(ranks: RankProcesses) -> None:
    with ranks.learners(DENSE, "mxfp4_mbs_of") as learners:
        means = watched(learners)
        [expected] = learners.run(exact_energies)
    for name, (part, whole) in expected.items():
        assert means[f"quant/{name}/weights"].total == pytest.approx(part, rel=1e-4)
        assert means[f"quant/{name}/weights"].weight == pytest.approx(whole, rel=1e-4)


def exact_energies(worker: LearnerWorker) -> dict[str, tuple[float, float]]:
    """In float64, of the same rows: 16 of a matrix, evenly spread."""
    from mxdist.model.quantised_weight import quantised_weights
    from mxdist.quant.decompose import components

    sums = torch.zeros(5, dtype=torch.float64)
    for linear in quantised_weights(worker._policy.model):
        rows = linear.weight.detach()[:: -(-len(linear.weight) // 16)]
        parts = components(rows, linear.recipe.w)
        assert torch.equal(parts.scale + parts.deadzone + parts.grid, parts.error)
        energies = [parts.scale, parts.deadzone, parts.grid, parts.error, rows.double()]
        sums += torch.stack([part.square().sum() for part in energies])
    scale, deadzone, grid, error, energy = sums.tolist()
    return {"scale_bias": (scale, error), "deadzone": (deadzone, error), "grid": (grid, error), "nmse": (error, energy)}


def test_codes_change_with_the_step_and_not_without_one(ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "mxfp4", 2) as learners:
        assert watched(learners, lr=0.0)["quant/codes_changed"].value == 0
        small, large = (watched(learners, lr)["quant/codes_changed"].value for lr in (1e-4, 1e-1))
    assert 0 < small < 0.2 < large < 1


def test_routers_flip_under_quantisation_and_not_without_it(ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "mxfp4", 2) as learners:
        assert 0 < watched(learners)["router/flip_rate"].value < 0.5
    last = {"recipe_overrides": [{"modules": "*.experts.*", "recipe": "mxfp4"}], "bf16_layers": {"first": 1}}
    with ranks.learners(MOE, "bf16", 2, **last) as learners:  # nothing quantised lies before a router
        assert watched(learners)["router/flip_rate"].value == 0


def test_watching_changes_nothing_that_is_trained(ranks: RankProcesses) -> None:
    norms = []
    for watch in (False, True):
        with ranks.learners(MOE, "mxfp4_mbs_of_g4", 2) as learners:
            run = [learners.call("update", random_batch(), Grpo(), 1e-2, watch)[0].grad_norm for _ in range(3)]
        norms.append(run)
    assert norms[0] == norms[1]


@pytest.mark.parametrize(("recipe", "watch"), [("mxfp4", False), ("bf16", True)])
def test_nothing_is_measured_when_off_or_when_nothing_is_quantised(
    recipe: str, watch: bool, ranks: RankProcesses
) -> None:
    with ranks.learners(MOE, recipe, 2) as learners:
        reports = learners.call("update", random_batch(), Grpo(), 1e-3, watch)
        assert learners.run(observed) == [False, False]
    for report in reports:
        assert not [name for name in report.means if name.startswith(("quant/", "router/"))]
        assert "telemetry" not in report.seconds


def observed(worker: LearnerWorker) -> bool:
    from mxdist.model.quantised_weight import QuantisedWeight

    linears = [module for module in worker._policy.model.modules() if isinstance(module, QuantisedWeight)]
    return any(linear.observer is not None for linear in linears)
