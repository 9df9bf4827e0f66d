import pytest

from mxdist.config.schema import OptimizerConfig, WarmStartConfig
from mxdist.control.schedule import learning_rate, warm_start_learning_rate


def test_the_learning_rate_warms_up_linearly_and_then_stays() -> None:
    optimizer = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(optimizer, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(OptimizerConfig(lr=0.5), 0) == 0.5


def test_the_warm_start_rises_and_then_falls_to_a_tenth() -> None:
    section = WarmStartConfig(steps=100, lr=2.0)
    rates = [warm_start_learning_rate(section, step) for step in range(100)]
    assert rates[0] < rates[5] < max(rates) <= 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
