"""Settings of all tests."""

from hypothesis import settings

# The same examples on every run, and no limit of time for one example: the machine may be busy.
settings.register_profile("mxdist", derandomize=True, deadline=None)
settings.load_profile("mxdist")
