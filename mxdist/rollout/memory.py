"""For what an engine's GPU had no memory left, and which settings make that smaller. Imports neither torch nor vLLM."""

from collections.abc import Iterator

POOLS = {
    "capture_model": (
        "CUDA graphs",
        "lower rollout.max_sequences, or set rollout.cuda_graphs=false",
    ),
    "initialize_kv_cache": ("the KV cache", "lower rollout.kv_cache_mib"),
    "load_model": ("the engine's weights", "give the engine a GPU of its own, or use a smaller model"),
    "profile_run": ("the activations of the longest step", "lower rollout.max_sequences or rollout.max_context"),
    "_dummy_sampler_run": ("logits", "lower rollout.max_sequences"),
    "rank_wake": ("the sleeping engine's weights and KV cache", "lower rollout.kv_cache_mib"),
    "load_weights": ("weights on their way into the engine", "lower rollout.kv_cache_mib"),
    "generate": ("activations and logits", "lower rollout.kv_cache_mib or rollout.max_sequences"),
}
"""By the function, of vLLM's or of the worker's, that was running: the pool, and what to change. Inner ones first."""


def pool_of(error: BaseException) -> tuple[str, str] | None:
    """The pool that ``error`` was raised for and the advice; None when it was raised elsewhere."""
    running = set(_functions(error))
    return next((found for function, found in POOLS.items() if function in running), None)


def _functions(error: BaseException) -> Iterator[str]:
    """Names of the functions that the error, or the one it was raised from, came through."""
    one: BaseException | None = error
    while one is not None:
        frames = one.__traceback__
        while frames is not None:
            yield frames.tb_frame.f_code.co_name
            frames = frames.tb_next
        one = one.__cause__
