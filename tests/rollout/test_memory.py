"""What is said when an engine's GPU is full: which pool, how much, what to lower. No GPU."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mxdist.control.memory import explained
from mxdist.errors import OutOfMemory
from mxdist.rollout.memory import POOLS
from mxdist.rollout.worker import RolloutWorker

FULL = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB"


MAPPING = "CUDA Error: out of memory at cumem_allocator.cpp:62"


def raising(function: str) -> Callable[[], None]:
    """A function of that name for which there is no memory."""
    found: dict[str, Callable[[], None]] = {}
    code = f"def {function}():\n    import torch\n    raise torch.OutOfMemoryError({FULL!r})"
    exec(code, found)
    return found[function]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("capture_model", r"for CUDA graphs \(20\.00 GiB more\).*; lower .*rollout\.cuda_graphs=false"),
        ("initialize_kv_cache", r"for the KV cache \(20\.00 GiB more\).*; lower rollout\.kv_cache_mib"),
        ("load_model", r"for the engine's weights \(20\.00 GiB more\)"),
        ("generate", r"for activations and logits \(20\.00 GiB more\)"),
    ],
)
def test_a_full_gpu_is_named_with_the_pool_and_what_makes_it_smaller(function: str, said: str) -> None:
    worker = RolloutWorker.__new__(RolloutWorker)
    with pytest.raises(OutOfMemory, match=f"GPU memory in start {said}"), explained(worker, "start"):
        raising(function)()


def _warm_up() -> None:
    try:
        raising("_dummy_sampler_run")()
    except torch.OutOfMemoryError as error:
        raise RuntimeError("try lowering max_num_seqs") from error


def test_an_error_that_vllm_raises_from_a_full_gpu_is_one_as_well() -> None:
    worker = RolloutWorker.__new__(RolloutWorker)
    said = r"for logits \(20\.00 GiB more\).*; lower rollout\.max_sequences"
    with pytest.raises(OutOfMemory, match=said), explained(worker, "start"):
        _warm_up()


def test_memory_that_vllm_asks_cuda_itself_for_counts_as_well() -> None:
    worker = RolloutWorker.__new__(RolloutWorker)
    with pytest.raises(OutOfMemory, match=r"GPU memory in load_weights; lower"), explained(worker, "load_weights"):
        raise RuntimeError(MAPPING)


@pytest.mark.parametrize("function", [name for name in POOLS if name not in ("load_weights", "generate", "rank_wake")])
def test_the_engine_goes_through_each_function_that_names_a_pool(function: str) -> None:
    """Else a new vLLM, that calls it otherwise, would leave the pool unnamed."""
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs vLLM's sources")
    runner = Path(found.submodule_search_locations[0]) / "v1" / "worker" / "gpu_model_runner.py"
    assert f"def {function}(" in runner.read_text()
