"""The noise controller: the schedule's shape, the closed loop's bounds, and its life across a resume."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxdist.aqn.controller import AqnController
from mxdist.config.schema import AqnConfig
from mxdist.messages import EntropyStatistics

configs = st.builds(
    lambda mode, end, ratio, stages, low, width, gain: AqnConfig(
        mode=mode,
        sigma_end=end,
        sigma_start=end * ratio,
        stages=stages,
        entropy_low=low,
        entropy_high=low + width,
        gain=gain,
    ),
    st.sampled_from(["schedule", "entropy_band"]),
    st.floats(1e-5, 1e-1),
    st.floats(1, 1e3),
    st.integers(2, 20),
    st.floats(0, 3),
    st.floats(0.01, 3),
    st.floats(1.01, 4),
)
entropies = st.builds(
    lambda mean, tokens: EntropyStatistics(mean * tokens, tokens), st.floats(0, 8), st.integers(0, 1000)
)


@given(configs, st.integers(1, 300), st.lists(entropies, max_size=60))
def test_sigma_is_zero_or_within_its_bounds_and_zero_in_the_first_stage(
    config: AqnConfig, steps: int, observed: list[EntropyStatistics]
) -> None:
    controller = AqnController(config, steps)
    for step in range(steps):
        sigma = controller.sigma(step)
        assert sigma == 0 or config.sigma_end * (1 - 1e-9) <= sigma <= config.sigma_start * (1 + 1e-9)
        if step * config.stages < steps:
            assert sigma == 0
        if observed:
            controller.observe(step, observed[step % len(observed)])


@given(configs, st.integers(1, 300))
def test_the_schedule_never_rises_after_the_silent_stage(config: AqnConfig, steps: int) -> None:
    controller = AqnController(config.model_copy(update={"mode": "schedule"}), steps)
    loud = [sigma for sigma in map(controller.sigma, range(steps)) if sigma]
    assert loud == sorted(loud, reverse=True)
    if steps >= config.stages:
        assert loud[0] == pytest.approx(config.sigma_start)
        assert len(set(loud)) <= config.stages - 1
        if config.stages > 2:
            assert loud[-1] == pytest.approx(config.sigma_end)


def test_default_schedule_has_ten_equal_stages_that_fall_by_equal_factors() -> None:
    controller = AqnController(AqnConfig(), 100)
    stages = [{controller.sigma(step) for step in range(start, start + 10)} for start in range(0, 100, 10)]
    assert all(len(stage) == 1 for stage in stages)
    sigmas = [stage.pop() for stage in stages]
    assert sigmas[0] == 0
    assert sigmas[1:] == pytest.approx([1e-2 * 10 ** (-i / 8) for i in range(9)])


def test_disabled_noise_is_silent_throughout() -> None:
    controller = AqnController(AqnConfig(mode="disabled"), 20)
    assert {controller.sigma(step) for step in range(20)} == {0.0}


def band(steps: int = 1000) -> AqnController:
    return AqnController(AqnConfig(mode="entropy_band", entropy_low=0.1, entropy_high=0.5, gain=2.0), steps)


def observe(controller: AqnController, step: int, mean: float) -> float:
    controller.observe(step, EntropyStatistics(mean * 10, 10))
    return controller.sigma(step + 1)


def test_the_band_raises_sigma_below_lowers_it_above_and_holds_it_within() -> None:
    controller = band()
    assert observe(controller, 100, 0.3) == 0.0
    assert observe(controller, 101, 0.9) == 0.0
    assert [observe(controller, step, 0.05) for step in (102, 103, 104)] == pytest.approx([1e-3, 2e-3, 4e-3])
    assert observe(controller, 105, 0.3) == pytest.approx(4e-3)
    assert observe(controller, 106, 0.9) == pytest.approx(2e-3)
    assert [observe(controller, step, 0.05) for step in (107, 108, 109)] == pytest.approx([4e-3, 8e-3, 1e-2])
    assert [observe(controller, step, 0.9) for step in range(110, 120)][-1] == pytest.approx(1e-3)


def test_the_band_ignores_the_silent_stage_steps_without_tokens_and_steps_seen_before() -> None:
    controller = band()
    assert observe(controller, 99, 0.0) == 0.0
    controller.observe(100, EntropyStatistics())
    assert controller.sigma(101) == 0.0
    assert observe(controller, 101, 0.0) == pytest.approx(1e-3)
    assert observe(controller, 101, 0.0) == pytest.approx(1e-3)


def test_the_band_looks_at_the_mean_over_all_workers() -> None:
    controller = band()
    controller.observe(200, EntropyStatistics(0.0, 10) + EntropyStatistics(9.0, 30))  # mean 0.225, in the band
    assert controller.sigma(201) == 0.0


@given(configs, st.lists(entropies, min_size=1, max_size=30), st.integers(0, 29))
def test_a_restored_controller_goes_on_exactly_as_the_saved_one(
    config: AqnConfig, observed: list[EntropyStatistics], cut: int
) -> None:
    whole, before = AqnController(config, 30), AqnController(config, 30)
    after = AqnController(config, 30)
    for step, entropy in enumerate(observed):
        whole.observe(step, entropy)
    for step, entropy in enumerate(observed[:cut]):
        before.observe(step, entropy)
    after.restore(json.loads(json.dumps(before.state())))
    for step, entropy in enumerate(observed):  # steps before the cut are replayed: they must not count twice
        after.observe(step, entropy)
    assert [after.sigma(step) for step in range(30)] == [whole.sigma(step) for step in range(30)]


@pytest.mark.parametrize("sigma", [math.nan, -1.0])
def test_a_damaged_state_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="not a standard deviation"):
        band().restore({"sigma": sigma, "observed_step": 3})


@given(st.integers(0, 2**40), st.integers(0, 10_000))
def test_noise_seeds_depend_on_run_and_step(run_seed: int, step: int) -> None:
    controller = AqnController(AqnConfig(), 20_000)
    noise = controller.noise(step, run_seed)
    assert noise == controller.noise(step, run_seed)
    assert noise.sigma == controller.sigma(step)
    assert len({noise.seed, controller.noise(step + 1, run_seed).seed, controller.noise(step, run_seed + 1).seed}) == 3
