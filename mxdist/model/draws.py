"""The seeds of the random draws that quantising gradients takes: reproducible, and never the same twice in a run."""

from mxdist.seeds import derive_seed


class GradientDraws:
    """Shared by all linears of one rank; the training loop says which micro-batch of which update is computed.

    A rank has tokens of its own, so its draws are its own too: with another layout of ranks the rounding of gradients
    is another, equally unbiased one.
    """

    def __init__(self, run_seed: int, rank: int) -> None:
        self._run_seed = run_seed
        self._rank = rank
        self._update = self._micro_batch = 0

    def move_to(self, update: int, micro_batch: int) -> None:
        """What follows belongs to this micro-batch of the optimizer update with this number, both from 0."""
        self._update, self._micro_batch = update, micro_batch

    def seed(self, linear: str) -> int:
        """The seed of one linear's draws in the present micro-batch."""
        return derive_seed(self._run_seed, "gradients", self._update, self._micro_batch, self._rank, linear)
