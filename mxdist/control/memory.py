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


@contextmanager
def explained(worker: object, method: str) -> Iterator[None]:
    """Turn torch's out-of-memory error inside the block into one sentence. The controller adds the process's name.

    Raises:
        OutOfMemory: instead of ``torch.OutOfMemoryError``.
    """
    try:
        yield
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        # vLLM raises another error from some of them.
        found = error.__cause__ or error
        if torch is None or not isinstance(found, torch.OutOfMemoryError):
            raise
        pool, advice = pool_of(error) or ("", LOWER.get(type(worker).__module__, "lower what this process holds"))
        asked = re.search(r"allocate ([\d.]+ \wi?B)", str(found))
        wanted = (f" for {pool}" if pool else "") + (f" ({asked[1]} more)" if asked else "")
        raise OutOfMemory(f"ran out of GPU memory in {method}{wanted}{_held(torch)}; {advice}") from error


def _held(torch: object) -> str:
    """How full the GPU is, and by whom; empty without one."""
    cuda = torch.cuda  # type: ignore[attr-defined]
    if not cuda.is_available():
        return ""
    free, total = cuda.mem_get_info()
    own, cached = cuda.memory_allocated(), cuda.memory_reserved()
    others = max(total - free - cached, 0)
    sizes = [f"{size / 2**30:.1f} GiB" for size in (own, cached - own, others, total)]
    return f": it holds {sizes[0]} and {sizes[1]} in torch's cache, other processes {sizes[2]}, of {sizes[3]}"
