"""One process with Megatron in it for the tests of the model."""

from collections.abc import Iterator

import pytest

from tests.model.ranks import RankProcesses


@pytest.fixture(scope="package")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(1)
    yield processes
    processes.close()
