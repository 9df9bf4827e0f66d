"""How much host memory each learner rank takes to load a Hugging Face checkpoint, against 1.2 x its shard + 1 GiB.

    python tools/make_checkpoint.py /tmp/2gb --shape qwen2.5-3b --gigabytes 2
    python tools/measure_loading.py /tmp/2gb --ranks 2 --tensor-parallel 2

Counts the whole process, libraries included, up to the loaded parameters; gradients and optimizer are not there yet.
Exit code 1 when a rank takes more.
"""

import multiprocessing
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import typer

from mxdist.config.hf_config import model_settings
from mxdist.config.schema import LearnerConfig, ModelConfig
from mxdist.model.shape import ModelShape

MIB = 2**20
DEADLINE = 600.0  # seconds, of a collective


def measure(rank: int, learner: LearnerConfig, directory: Path, rendezvous: str, result: Connection) -> None:
    """One rank: send (bytes of its parameters, peak bytes of the process, seconds of loading)."""
    from mxdist.model import megatron_cpu

    megatron_cpu.install()
    from mxdist.learner import parallel
    from mxdist.model.gpt import build_gpt
    from mxdist.model.loading import load_checkpoint
    from mxdist.model.weights import hf_tensors

    settings = model_settings(str(directory))
    config = ModelConfig(**settings, path=str(directory), dtype="bfloat16")
    shape = ModelShape(config, settings["vocab_size"], None, (0,), 0)
    parallel.start(rank, learner.ranks, rendezvous, learner, 0, DEADLINE)
    model = build_gpt(shape, learner)
    started = time.monotonic()
    load_checkpoint(model, list(hf_tensors(model, shape)), shape, directory)
    seconds = time.monotonic() - started
    shard = sum(parameter.nbytes for parameter in model.parameters())
    result.send((shard, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seconds))
    parallel.stop()


def main(
    directory: Annotated[Path, typer.Argument(help="Safetensors and config.json.")],
    ranks: Annotated[int, typer.Option(min=1)] = 1,
    tensor_parallel: Annotated[int, typer.Option(min=1)] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1)] = 1,
    expert_parallel: Annotated[int, typer.Option(min=1)] = 1,
    port: Annotated[int, typer.Option(help="For the ranks to meet at.")] = 29531,
) -> None:
    """Load a checkpoint as learner ranks do and print the memory that each took."""
    learner = LearnerConfig(
        ranks=ranks,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
    )
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    where = f"tcp://127.0.0.1:{port}"
    processes = [
        context.Process(target=measure, args=(rank, learner, directory, where, pipe[1]))
        for rank, pipe in enumerate(pipes)
    ]
    for process, (_, end) in zip(processes, pipes, strict=True):
        process.start()
        end.close()  # so that a rank that dies is an end of file here
    exceeded = False
    for rank, (own, _) in enumerate(pipes):
        shard, peak, seconds = own.recv()
        bound = 1.2 * shard + 1024 * MIB
        exceeded |= peak > bound
        print(
            f"rank {rank}: shard {shard / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB, allowed {bound / MIB:.0f} MiB, "
            f"loaded in {seconds:.1f} s"
        )
    for process in processes:
        process.join()
    sys.exit(int(exceeded))


if __name__ == "__main__":
    typer.run(main)
