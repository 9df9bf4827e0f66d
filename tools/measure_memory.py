"""Measure what a learner rank holds and needs at its peak, beside what ``mxdist doctor`` estimates.

    python -m tools.measure_memory CONFIG [key=value ...]

Starts the learner ranks of CONFIG on this machine with random weights (model.path gives the shape alone), makes two
updates of full-length sequences and prints a line for each rank. On a GPU the allocator counts; on a CPU every tensor
that an operation makes is followed until it is freed, which is exact and slow: use small models there.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import socket
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mxdist.config import Config, load_config
from mxdist.doctor.activations import full_pass
from mxdist.doctor.memory import learner_memory
from mxdist.doctor.model_size import vocabulary
from mxdist.learner.worker import LearnerWorker
from mxdist.messages import TrainBatch
from mxdist.model.shape import ModelShape

GIB = 2**30


@dataclass(frozen=True, order=True)
class Measured:
    """Bytes of one rank: between updates, and at the worst moment of an update."""

    resident: int
    peak: int


class LivePeak(TorchDispatchMode):
    """Follows the storages that operations make: ``live`` bytes now, ``peak`` bytes at most. CPU only."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {storage._cdata for storage in _storages()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def live_bytes() -> int:
    """Bytes of all tensors of this process that Python can reach, each storage once."""
    return sum(storage.nbytes() for storage in _storages())


def _storages() -> list[torch.UntypedStorage]:
    gc.collect()
    found: dict[int, torch.UntypedStorage] = {}
    for thing in gc.get_objects():
        # type(): isinstance would ask lazy objects for their class and wake them.
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage._cdata] = storage
    return list(found.values())


def full_batch(config: Config, vocab_size: int, sequences: int) -> TrainBatch:
    """``sequences`` sequences as long as the context and the longest answer allow."""
    length, answer = config.context, config.rollout.max_new_tokens
    generator = np.random.default_rng(0)
    mask = np.zeros((sequences, length), dtype=bool)
    mask[:, length - answer :] = True
    return TrainBatch(
        generator.integers(0, vocab_size, (sequences, length)).astype(np.int64),
        mask,
        np.where(mask, -np.log(vocab_size), 0).astype(np.float32),
        generator.normal(size=sequences).astype(np.float32),
        np.full(sequences, 1 / mask.sum(), dtype=np.float32),
    )


def measure_update(worker: LearnerWorker, batch: TrainBatch) -> Measured:
    """Of one rank, by an update of ``batch`` after a first one that warms up caches; all ranks call it together."""
    algorithm = worker.config.algorithm.model_copy(update={"minibatches": 1})
    worker.update(batch, algorithm, 1e-6)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        worker.update(batch, algorithm, 1e-6)
        return Measured(resident, torch.cuda.max_memory_allocated())
    resident = live_bytes()
    with LivePeak() as peak:
        worker.update(batch, algorithm, 1e-6)
    return Measured(resident, resident + peak.peak)


def _serve(config: Config, shape: ModelShape, rank: int, rendezvous: str, sequences: int, results: Any) -> None:
    worker = LearnerWorker(config, shape, rank, config.learner.ranks, rendezvous)
    worker.build()
    results.put((rank, measure_update(worker, full_batch(config, shape.vocab_size, sequences))))
    worker.shutdown()


@contextlib.contextmanager
def _processes(config: Config, shape: ModelShape, sequences: int) -> Iterator[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = []
    for rank in range(config.learner.ranks):
        os.environ["LOCAL_RANK"] = str(rank)  # inherited by the process that is started next
        processes.append(
            context.Process(target=_serve, args=(config, shape, rank, rendezvous, sequences, results), daemon=True)
        )
        processes[-1].start()
    try:
        yield results
    finally:
        for process in processes:
            process.join(60)
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.settings)
    vocab_size = vocabulary(config)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": None})})
    shape = ModelShape(config.model, vocab_size, 1, (2,), 0)
    on_gpu = torch.cuda.is_available()
    at_a_time = full_pass(config, on_gpu).tokens // config.context * config.data_parallel
    sequences = at_a_time * config.learner.pipeline_parallel  # enough to fill the pipeline
    stages = learner_memory(config, on_gpu)
    with _processes(config, shape, sequences) as results:
        for rank, measured in sorted(results.get(timeout=3600) for _ in range(config.learner.ranks)):
            stage = stages[rank // (config.learner.ranks // len(stages))]
            # The allocator does not see the CUDA context.
            estimate = stage.total - (stage.items["work space"] if on_gpu else 0)
            print(
                f"rank {rank}: resident {measured.resident / GIB:.3f} GiB, peak {measured.peak / GIB:.3f} GiB; "
                f"estimated peak {estimate / GIB:.3f} GiB ({100 * (estimate / measured.peak - 1):+.1f} %)"
            )
            for name, size in stage.items.items():
                print(f"    {name:<20} {size / GIB:.3f} GiB")


if __name__ == "__main__":
    main()
