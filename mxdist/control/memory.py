"""What a worker says when its GPU has no memory left: for what, what it held, and which settings make it smaller."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mxdist.errors import OutOfMemory
from mxdist.rollout.memory import pool_of

LOWER = {
    "mxdist.learner.worker": "lower learner.micro_batch_tokens, or raise learner.ranks",
    "mxdist.rollout.worker": "lower rollout.kv_cache_mib or rollout.max_sequences",
}
"""By the module of the worker's class, where no pool is known."""
FULL = re.compile(r"CUDA (error: )?out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
"""Of torch's allocator, of CUDA itself and of its libraries."""


@contextmanager
def explained(worker: object, method: str) -> Iterator[None]:
    """Turn an error of a full GPU inside the block into one sentence. The controller adds the process's name.

    Raises:
        OutOfMemory: instead of a RuntimeError that says so.
    """
    try:
        yield
    except RuntimeError as error:
        said = f"{error}\n{error.__cause__ or ''}"  # vLLM raises another error from some of them
        if not FULL.search(said):
            raise
        pool, advice = pool_of(error) or ("", LOWER.get(type(worker).__module__, "lower what this process holds"))
        asked = re.search(r"allocate ([\d.]+ \wi?B)", said)
        wanted = (f" for {pool}" if pool else "") + (f" ({asked[1]} more)" if asked else "")
        raise OutOfMemory(f"ran out of GPU memory in {method}{wanted}{_held()}; {advice}") from error


def _held() -> str:
    """How full the GPU is, and by whom; empty without one."""
    if "torch" not in sys.modules:
        return ""
    cuda = sys.modules["torch"].cuda
    if not cuda.is_available():
        return ""
    free, total = cuda.mem_get_info()
    own, cached = cuda.memory_allocated(), cuda.memory_reserved()
    others = max(total - free - cached, 0)
    sizes = [f"{size / 2**30:.1f} GiB" for size in (own, cached - own, others, total)]
    return f": it holds {sizes[0]} and {sizes[1]} in torch's cache, other processes {sizes[2]}, of {sizes[3]}"
