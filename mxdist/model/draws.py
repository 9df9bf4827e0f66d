"""The seeds of the random draws that quantising gradients takes: reproducible, and never the same twice in a run."""

from mxdist.seeds import derive_seed


class GradientDraws:
    """Shared by all linears of one rank; the training loop says which micro-batch of which update is computed.

    Ranks with tokens of their own have draws of their own: with another layout of data-parallel ranks the rounding of
    gradients is another, equally unbiased one. Tensor-parallel ranks share a linear and its tokens, so they share its
    seed, and each takes the draws of its part (``mxdist.quant.linear.Shard``): none is taken twice, and what all of
    them round is rounded alike. An expert is never divided; the ranks that hold it take tokens of their own to it.
    """

    def __init__(self, run_seed: int, data_rank: int, expert_data_rank: int) -> None:
        self._run_seed = run_seed
        self._data_rank, self._expert_data_rank = data_rank, expert_data_rank
        self._update = self._micro_batch = 0

    def move_to(self, update: int, micro_batch: int) -> None:
        """What follows belongs to this micro-batch of the optimizer update with this number, both from 0."""
        self._update, self._micro_batch = update, micro_batch

    def seed(self, linear: str) -> int:
        """The seed of one linear's draws in the present micro-batch."""
        rank = self._expert_data_rank if ".experts." in linear else self._data_rank
        return derive_seed(self._run_seed, "gradients", self._update, self._micro_batch, rank, linear)
