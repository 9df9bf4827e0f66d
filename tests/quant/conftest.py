"""Hypothesis settings: no deadline, because the machines that run the tests are shared."""

from hypothesis import settings

settings.register_profile("quant", max_examples=80, deadline=None)
settings.load_profile("quant")
