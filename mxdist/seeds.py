"""Every random draw of a run has a seed derived from (run, step, what); this is the only place that derives them."""

import hashlib


def derive_seed(run_seed: int, *what: int | str, bits: int = 63) -> int:
    """Return a seed in [0, 2**bits) that depends on the run's seed and on every part of ``what``.

    The same arguments give the same seed in every process and on every platform, whatever was drawn before.

    Example:
        >>> derive_seed(0, "rollout", 3) == derive_seed(0, "rollout", 3) != derive_seed(0, "rollout", 4)
        True
    """
    text = "\x1f".join([str(run_seed), *(f"{type(part).__name__}:{part}" for part in what)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % (1 << bits)
