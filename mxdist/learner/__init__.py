"""Learner ranks: the training backends, the algorithms' losses, distributed checkpoints."""
