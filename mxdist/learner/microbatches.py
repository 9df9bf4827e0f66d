"""From the batch of a step to the micro-batches of one rank: the same number on every rank, in numpy.

Experts are shared between ranks, so a rank that made one forward pass more than the others would wait for ever. What
does not divide is filled up with copies of a row that have no response tokens and weight 0.
"""

from collections.abc import Sequence

import numpy as np

from mxdist.messages import TrainBatch


def optimizer_batches(batch: TrainBatch, count: int) -> list[TrainBatch]:
    """``count`` runs of consecutive rows of the whole step's batch, one for each optimizer update."""
    return [batch.rows(index) for index in np.array_split(np.arange(len(batch)), count)]


def rank_share(batch: TrainBatch, rank: int, ranks: int) -> TrainBatch:
    """Rows rank, rank + ranks, ... after filling up to a multiple of ``ranks``."""
    return fill_up(batch, -(-len(batch) // ranks) * ranks).rows(slice(rank, None, ranks))


def micro_batches(batch: TrainBatch, size: int) -> list[TrainBatch]:
    """Consecutive pieces of at most ``size`` rows, each cut off behind its last response token."""
    return [_cut(batch.rows(slice(start, start + size))) for start in range(0, len(batch), size)]


def fill_up(batch: TrainBatch, rows: int) -> TrainBatch:
    """``batch`` with rows that count for nothing added at the end, ``rows`` in all."""
    missing = rows - len(batch)
    if missing <= 0:
        return batch
    if len(batch) == 0:
        batch = _blank(max(batch.tokens.shape[1], 2), batch.temperature)
        missing = rows - 1
    index = np.concatenate([np.arange(len(batch)), np.zeros(missing, dtype=np.int64)])
    filled = batch.rows(index)
    counts = np.arange(rows) < rows - missing
    return TrainBatch(
        filled.tokens,
        filled.response_mask & counts[:, None],
        filled.rollout_logprobs,
        filled.advantages,
        np.where(counts, filled.weights, 0).astype(np.float32),
        batch.temperature,
    )


def rejoin(pieces: Sequence[np.ndarray], rows: int, length: int) -> np.ndarray:
    """Undo ``fill_up`` and ``micro_batches``: [piece rows, piece length] arrays to one float32 [rows, length]."""
    joined = np.zeros((rows, length), dtype=np.float32)
    start = 0
    for piece in pieces:
        kept = piece[: rows - start]
        joined[start : start + len(kept), : kept.shape[1]] = kept
        start += len(kept)
    return joined


def _cut(batch: TrainBatch) -> TrainBatch:
    """Without the columns behind the last response token: nothing depends on them, attention being causal."""
    used = np.flatnonzero(batch.response_mask.any(axis=0))
    length = max(int(used[-1]) + 1 if len(used) else 0, 2)
    return TrainBatch(
        batch.tokens[:, :length],
        batch.response_mask[:, :length],
        batch.rollout_logprobs[:, :length],
        batch.advantages,
        batch.weights,
        batch.temperature,
    )


def _blank(length: int, temperature: float) -> TrainBatch:
    return TrainBatch(
        np.zeros((1, length), np.int64),
        np.zeros((1, length), bool),
        np.zeros((1, length), np.float32),
        np.zeros(1, np.float32),
        np.zeros(1, np.float32),
        temperature,
    )
