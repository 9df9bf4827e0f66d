"""What a profile makes of the metrics of a few steps."""

import pytest

from mxdist.observe.profile import MFU, PHASES, breakdown, measure, ratios, table

LINE = {
    "timing_s/step": 10.0,
    "timing_s/rollout": 4.0,
    "timing_s/generate": 3.0,
    "timing_s/reward": 0.5,
    "timing_s/update": 5.0,
    "timing_s/old_logprobs": 0.0,
    "timing_s/forward": 1.0,
    "timing_s/backward": 2.0,
    "timing_s/optimizer": 1.5,
    "timing_s/sync": 0.75,
    "perf/tokens": 2000.0,
    "perf/response_tokens": 600.0,
    "sync/bytes": 4e6,
    "perf/memory_mib/learner": 500.0,
    "perf/memory_mib/rollout": 700.0,
}


def test_the_phases_of_a_step_add_up_to_the_step() -> None:
    parts = breakdown(LINE)
    assert set(parts) == {*PHASES, "step"}
    assert sum(parts[phase] for phase in PHASES) == pytest.approx(parts["step"]) == 10.0
    assert parts["waiting"] == pytest.approx(0.5 + 0.5)  # around the engines' work, and around the learner's
    assert parts["unaccounted"] == pytest.approx(0.25)


def test_sampling_that_ran_beside_the_learner_costs_only_what_was_waited_for() -> None:
    parts = breakdown({**LINE, "timing_s/rollout": 1.0, "timing_s/step": 7.0})
    assert parts["rollout"] == 0.5  # of the 3 s of sampling
    assert sum(parts[phase] for phase in PHASES) == pytest.approx(7.0)


def test_telemetry_is_a_phase_of_its_own_in_the_steps_that_have_it() -> None:
    watched = {**LINE, "timing_s/telemetry": 0.4}
    assert breakdown(watched)["telemetry"] == 0.4
    assert measure("mxfp4", [watched, LINE], gpus=0).seconds["telemetry"] == pytest.approx(0.2)


def test_what_was_not_measured_is_absent() -> None:
    speed = measure("bf16", [LINE, LINE], gpus=0)
    assert "old log-probs" not in speed.seconds
    assert "telemetry" not in speed.seconds
    assert "tokens/s/GPU" not in speed.rates
    assert MFU not in speed.rates
    assert "GPU MiB of learner" not in speed.amounts


def test_rates_are_tokens_over_the_seconds_they_took() -> None:
    on_gpu = {**LINE, "perf/mfu/actor": 0.25, "perf/gpu_memory_mib/learner": 9000.0}
    speed = measure("bf16", [on_gpu, {**on_gpu, "timing_s/step": 30.0}], gpus=2)
    assert speed.rates["tokens/s"] == pytest.approx(4000 / 40)
    assert speed.rates["tokens/s/GPU"] == pytest.approx(50)
    assert speed.rates["sampled tokens/s"] == pytest.approx(1200 / 6)
    assert speed.rates["learner tokens/s"] == pytest.approx(4000 / 6)
    assert speed.rates[MFU] == pytest.approx(25)
    assert speed.amounts["GPU MiB of learner"] == 9000


def test_a_ratio_is_ours_over_the_other_where_both_have_the_figure() -> None:
    ours = measure("mxfp4", [{**LINE, "timing_s/telemetry": 0.4, "sync/bytes": 1e6}], gpus=0)
    both = ratios(ours, measure("bf16", [LINE], gpus=0))
    assert both["MB of a sync"] == 0.25
    assert both["step"] == 1.0
    assert "telemetry" not in both


def test_the_table_fits_sixty_columns_and_shows_a_dash_for_what_is_absent() -> None:
    long = {name: value * 1e6 for name, value in LINE.items()}
    lines = table(measure("mxfp4_mbs_of_g4", [{**long, "timing_s/telemetry": 1.0}], 0), measure("bf16", [long], 0))
    assert max(map(len, lines)) <= 60
    [telemetry] = [line.split() for line in lines if "telemetry" in line]
    assert telemetry == ["telemetry", "1.000", "-", "-"]
