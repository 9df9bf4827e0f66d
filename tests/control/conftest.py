"""What several of these tests start."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from mxdist.config import Config
from mxdist.control.processes import start_ray


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    start_ray(Config())
    yield
    ray.shutdown()
