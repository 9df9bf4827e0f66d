"""How long training stops for a checkpoint, against the time of a save that it would wait for to the end.

    python -m tools.measure_checkpoint /tmp/checkpoints             # two ranks, a dense model
    python -m tools.measure_checkpoint /tmp/checkpoints --experts   # ... of experts, half of them on each rank

Each save follows an update, which touches all weights and optimizer states. Prints the medians over the saves after the
first (which also plans), the slower rank's: the stop, the whole save with the ranks idle, and the learner's bytes.
A disk in memory (/dev/shm) is the hardest place: the whole save is fastest there. Exit code 1 beyond 10 %.
"""

import argparse
import multiprocessing
import shutil
import socket
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from mxdist.config.schema import Config, LearnerConfig, ModelConfig, Supervised
from mxdist.learner.worker import LearnerWorker
from mxdist.messages import TrainBatch
from mxdist.model.shape import ModelShape

MIB = 2**20
RANKS = 2
ALLOWED = 0.1
DENSE = ModelConfig(
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=8192,
)
EXPERTS = DENSE.model_copy(update={"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192})


def small_batch(vocab_size: int) -> TrainBatch:
    """A short sequence for each rank: the update only has to move every weight."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, vocab_size, (RANKS, 32)).astype(np.int64)
    mask = np.ones(tokens.shape, dtype=bool)
    mask[:, 0] = False
    return TrainBatch(
        tokens,
        mask,
        np.zeros(tokens.shape, dtype=np.float32),
        np.ones(RANKS, dtype=np.float32),
        np.full(RANKS, 1 / mask.sum(), dtype=np.float32),
    )


def measure(
    rank: int, config: Config, shape: ModelShape, rendezvous: str, folders: list[Path], pipe: Connection
) -> None:
    """One rank: send, for each folder, the seconds of the stop and of the whole save."""
    worker = LearnerWorker(config, shape, rank, RANKS, rendezvous)
    worker.build()
    import torch.distributed

    batch, seconds = small_batch(shape.vocab_size), []
    for folder in folders:
        worker.update(batch, Supervised(), 1e-4)
        torch.distributed.barrier()
        started = time.perf_counter()
        worker.save(folder)
        stopped = time.perf_counter() - started
        worker.save_finished(True)
        seconds.append((stopped, time.perf_counter() - started))
    worker.shutdown()
    pipe.send(seconds)


def run(model: ModelConfig, folders: list[Path]) -> list[list[tuple[float, float]]]:
    """By rank and save, the seconds of the stop and of the whole save."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    learner = LearnerConfig(ranks=RANKS, expert_parallel=RANKS if model.num_experts else 1)
    config = Config(model=model, recipe="bf16", learner=learner)
    shape = ModelShape(model, model.vocab_size or 0, 1, (2,), 0)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
    processes = [
        context.Process(target=measure, args=(rank, config, shape, rendezvous, folders, end))  # they fork: not daemons
        for rank, (_, end) in enumerate(pipes)
    ]
    try:
        for process, (_, end) in zip(processes, pipes, strict=True):
            process.start()
            end.close()  # so that a rank that dies is an end of file here
        return [own.recv() for own, _ in pipes]
    finally:
        for process in processes:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write; what is written is removed")
    parser.add_argument("--experts", action="store_true", help="a model of experts")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--saves", type=int, default=6)
    options = parser.parse_args()
    model = (EXPERTS if options.experts else DENSE).model_copy(
        update={"num_hidden_layers": options.layers, "dtype": options.dtype}
    )
    options.directory.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=options.directory))
    folders = [place / str(index) for index in range(options.saves)]
    for folder in folders:
        folder.mkdir()
    try:
        ranks = run(model, folders)
        size = sum(path.stat().st_size for path in folders[-1].iterdir())
    finally:
        shutil.rmtree(place)
    stops = [max(rank[save][0] for rank in ranks) for save in range(options.saves)]
    wholes = [max(rank[save][1] for rank in ranks) for save in range(options.saves)]
    stop, whole = statistics.median(stops[1:]), statistics.median(wholes[1:])
    print(
        f"{size / MIB:.0f} MiB: training stops for {stop:.3f} s of {whole:.2f} s, {100 * stop / whole:.1f} % "
        f"(the first: {stops[0]:.2f} s of {wholes[0]:.2f} s)"
    )
    return int(stop > ALLOWED * whole)


if __name__ == "__main__":
    sys.exit(main())
