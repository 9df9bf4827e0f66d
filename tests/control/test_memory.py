"""What is said when a GPU is full."""

import pytest
import torch

from mxdist.control.memory import explained
from mxdist.errors import OutOfMemory
from mxdist.learner.worker import LearnerWorker


def test_out_of_memory_says_what_was_done_and_what_to_lower() -> None:
    worker = LearnerWorker.__new__(LearnerWorker)
    said = r"GPU memory in update.*; lower learner\.micro_batch_tokens"
    with pytest.raises(OutOfMemory, match=said), explained(worker, "update"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), explained(object(), "update"):
        raise RuntimeError("a bug")
