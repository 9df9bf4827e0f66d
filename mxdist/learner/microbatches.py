"""From the batch of a step to the micro-batches of one rank: the same number on every rank, in numpy.

A micro-batch is several sequences in one row of tokens, prompt and answer up to the last response token and nothing in
between, at most so many tokens in all. Experts are shared between ranks, so a rank that made one forward pass more than
the others would wait for ever: who has nothing left to do computes a blank micro-batch, which counts for nothing.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mxdist.messages import Mean, TrainBatch


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch, of one forward pass.

    The row of tokens holds the first ``lengths[i]`` tokens of each, then ``padding`` tokens that belong to none.
    """

    batch: TrainBatch  # the rows, cut behind the last token of the longest
    rows: np.ndarray  # int64, where they stand in the batch they are from; empty for a blank micro-batch
    lengths: np.ndarray  # int64 [sequences], tokens up to the last response token
    padding: int = 0

    @property
    def packed_lengths(self) -> tuple[int, ...]:
        """Of all sequences in the row of tokens; padding is one of its own."""
        return tuple(self.lengths.tolist()) + ((self.padding,) if self.padding else ())

    @property
    def tokens(self) -> np.ndarray:
        """The row, int64 [tokens]."""
        return np.concatenate([self.batch.tokens[self._used], np.zeros(self.padding, dtype=np.int64)])

    @cached_property
    def scored(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column in ``batch`` of every response token; the first token of a sequence is predicted by none."""
        rows, before = self.batch.response_mask[:, 1:].nonzero()
        return rows, before + 1

    @property
    def predicted_at(self) -> np.ndarray:
        """Where in the row of tokens each of the ``scored`` ones is predicted, int64."""
        place = np.zeros(self._used.shape, dtype=np.int64)
        place[self._used] = np.arange(self._used.sum())
        rows, columns = self.scored
        return place[rows, columns - 1]

    @property
    def padding_fraction(self) -> Mean:
        """Tokens of the forward pass that belong to no sequence; a blank micro-batch is nothing else."""
        total = int(self.lengths.sum()) + self.padding
        return Mean(float(self.padding if len(self.rows) else total), float(total))

    @cached_property
    def _used(self) -> np.ndarray:
        return np.arange(self.batch.tokens.shape[1]) < self.lengths[:, None]


def optimizer_batches(batch: TrainBatch, count: int) -> list[TrainBatch]:
    """``count`` runs of consecutive rows of the whole step's batch, one for each optimizer update."""
    return [batch.rows(index) for index in np.array_split(np.arange(len(batch)), count)]


ROWS_OF_GPU_KERNELS = 16
"""What a number of tokens must be a multiple of for all matrix products on a GPU to take it as it is, uncopied."""


def micro_batches(batch: TrainBatch, rank: int, ranks: int, budget: int, multiple: int = 1) -> list[MicroBatch]:
    """What data-parallel rank ``rank`` of ``ranks`` computes of ``batch``. Every rank works the same shares out.

    Rows without a response are left out. The others are shared out by their tokens, so that those of a rank, and the
    micro-batches of all ranks that run at the same time, take about as long.

    Args:
        budget: tokens of a micro-batch, at most; a longer sequence has one of its own.
        multiple: of tokens that a row must be.
    """
    lengths = sequence_lengths(batch)
    rows = np.flatnonzero(lengths)
    shares = _share_out(lengths[rows], ranks, budget)
    return [_micro_batch(batch, rows[index], multiple) for index in shares[rank]]


def one_micro_batch(sequences: Sequence[np.ndarray], multiple: int = 1) -> MicroBatch:
    """All of some sequences, int64 [length] each, with nothing to learn from."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    tokens = np.zeros((len(lengths), int(lengths.max())), dtype=np.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    zeros = np.zeros(tokens.shape, dtype=np.float32)
    batch = TrainBatch(tokens, zeros > 0, zeros, zeros[:, 0], zeros[:, 0])
    return MicroBatch(batch, np.arange(len(lengths)), lengths, padding=-int(lengths.sum()) % multiple)


def sequence_lengths(batch: TrainBatch) -> np.ndarray:
    """Tokens up to the last one of the response, int64 [sequences]; 0 without a response."""
    mask = batch.response_mask
    return np.where(mask.any(axis=1), mask.shape[1] - mask[:, ::-1].argmax(axis=1), 0)


def padding_saved(batch: TrainBatch) -> Mean:
    """The padding if every sequence were filled up to the longest of the update."""
    lengths = sequence_lengths(batch)
    padded = int(lengths.max(initial=0)) * len(lengths)
    return Mean(float(padded - lengths.sum()), float(padded))


def rejoin(pieces: Sequence[np.ndarray], parts: Sequence[MicroBatch], rows: int, length: int) -> np.ndarray:
    """Undo ``micro_batches``: from [sequences, columns] arrays to float32 [rows, length], 0 in rows not among them."""
    joined = np.zeros((rows, length), dtype=np.float32)
    for piece, part in zip(pieces, parts, strict=True):
        joined[part.rows, : piece.shape[1]] = piece[: len(part.rows)]
    return joined


def _share_out(lengths: np.ndarray, ranks: int, budget: int) -> list[list[np.ndarray]]:
    """Indices of ``lengths`` by rank and micro-batch: as few micro-batches as fit into the budget."""
    each = max(1, -(-int(np.minimum(lengths, budget).sum()) // (budget * ranks)))
    bins = _balanced(lengths, each * ranks)
    while any(len(index) > 1 and lengths[index].sum() > budget for index in bins):
        each += 1
        bins = _balanced(lengths, each * ranks)
    bins.sort(key=lambda index: -int(lengths[index].sum()))
    # The largest of each rank first, in turns from the first rank to the last and back.
    rounds = [bins[start : start + ranks][:: -1 if start // ranks % 2 else 1] for start in range(0, len(bins), ranks)]
    return [list(share) for share in zip(*rounds, strict=True)]


def _balanced(lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """``count`` bins of about equal sums: the longest first, each into the bin with least in it (Graham 1969)."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        load, number = heap[0]
        bins[number].append(index)
        heapq.heapreplace(heap, (load + int(lengths[index]), number))
    return [np.array(sorted(index), dtype=np.int64) for index in bins]


def _micro_batch(batch: TrainBatch, rows: np.ndarray, multiple: int) -> MicroBatch:
    if not len(rows):
        return MicroBatch(_blank(batch.temperature), rows, np.ones(1, dtype=np.int64), padding=multiple - 1)
    lengths = sequence_lengths(batch)[rows]
    part, longest = batch.rows(rows), int(lengths.max())
    cut = TrainBatch(
        part.tokens[:, :longest],
        part.response_mask[:, :longest],
        part.rollout_logprobs[:, :longest],
        part.advantages,
        part.weights,
        part.temperature,
    )
    return MicroBatch(cut, rows, lengths, padding=-int(lengths.sum()) % multiple)


def _blank(temperature: float) -> TrainBatch:
    """One sequence of one token and no response."""
    matrix, row = np.zeros((1, 1)), np.zeros(1, np.float32)
    return TrainBatch(matrix.astype(np.int64), matrix > 0, matrix.astype(np.float32), row, row, temperature)
