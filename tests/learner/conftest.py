"""Two processes with Megatron in them for the tests of the learner."""

from collections.abc import Iterator

import pytest

import tests.interpreted  # noqa: F401  (before anything else imports Triton)
from tests.model.ranks import RankProcesses


@pytest.fixture(scope="package")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(2)
    yield processes
    processes.close()
