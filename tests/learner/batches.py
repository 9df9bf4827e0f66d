"""Batches for the tests of the learner."""

import numpy as np

from mxdist.messages import TrainBatch


def random_batch(rows: int = 12, length: int = 14, seed: int = 0, temperature: float = 1.0) -> TrainBatch:
    """Prompts of 4 tokens, answers of 1 to 9, padding behind, any advantages; weights sum to 1 over the tokens."""
    generator = np.random.default_rng(seed)
    mask = np.zeros((rows, length), dtype=bool)
    for row, answer in enumerate(generator.integers(1, length - 4, rows)):
        mask[row, 4 : 4 + answer] = True
    tokens = generator.integers(3, 40, (rows, length)).astype(np.int64)
    tokens[:, 4:][~mask[:, 4:]] = 0
    rollout = np.where(mask, generator.normal(-3.6, 0.3, mask.shape), 0).astype(np.float32)
    weights = np.full(rows, 1 / mask.sum(), dtype=np.float32)
    return TrainBatch(tokens, mask, rollout, generator.normal(size=rows).astype(np.float32), weights, temperature)
