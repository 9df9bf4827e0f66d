"""A RolloutWorker in a process of its own, for tests: vLLM wants one engine per process, and pytest is one process.

Functions sent to ``EngineProcess.run`` execute next to the live engine, with the worker as their first argument.
"""

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mxdist.config.schema import Config
from mxdist.messages import EngineReport, RolloutRequest, RolloutResult, WeightPayload
from mxdist.model.shape import ModelShape
from mxdist.rollout.worker import RolloutWorker

DEADLINE = 240  # seconds


class EngineProcess:
    def __init__(self, config: Config, shape: ModelShape, model_dir: Path) -> None:
        self.config, self.shape = config, shape
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.found_by_vllm = self._submit(_find_plugin, model_dir, config.rollout.tensor_parallel)
        self.report: EngineReport = self._submit(_start, config, shape, model_dir)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._submit(_with_worker, function, *args)

    def load(self, payloads: list[WeightPayload]) -> dict[str, dict[str, int]]:
        return self.run(RolloutWorker.load_weights, payloads)

    def generate(self, request: RolloutRequest) -> RolloutResult:
        return self.run(RolloutWorker.generate, request)

    def close(self) -> None:
        self.run(RolloutWorker.shutdown)
        self._pool.shutdown()

    def _submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._pool.submit(function, *args).result(timeout=DEADLINE)


WORKER: list[RolloutWorker] = []  # of the child process


def _find_plugin(directory: Path, tensor_parallel: int) -> list[str]:
    """Let vLLM itself find the plugin, as installed; return the quantisation methods it then knows.

    The project need not be installed where tests run, so its entry point is written out as pip would write it.
    """
    import tomllib

    import mxdist
    from mxdist.rollout.worker import prepare_vllm

    prepare_vllm(tensor_parallel)
    project = tomllib.loads((Path(mxdist.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    installed = directory / "site" / "mxdist_under_test-0.dist-info"
    installed.mkdir(parents=True)
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["vllm.general_plugins"].items()]
    (installed / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines]) + "\n")
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mxdist-under-test\nVersion: 0\n")
    sys.path.insert(0, str(installed.parent))
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return [method for method in QUANTIZATION_METHODS if method == "mxdist"]


def _start(*args: Any) -> EngineReport:
    WORKER.append(RolloutWorker(*args))
    return WORKER[0].start()


def _with_worker(function: Callable[..., Any], *args: Any) -> Any:
    return function(WORKER[0], *args)
