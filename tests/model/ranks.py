"""Learner ranks for tests, each in a process of its own: Megatron and its patches never enter pytest's process."""

import contextlib
import multiprocessing
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import psutil

from mxdist.config.schema import Config, LearnerConfig, ModelConfig
from mxdist.learner.worker import LearnerWorker
from mxdist.messages import LearnerReport
from mxdist.model.shape import ModelShape

MOE = ModelConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    initializer_range=0.1,
    rope_theta=50.0,
    rms_norm_eps=1e-3,
)  # far from the defaults, so that leaving them out would show
DENSE = MOE.model_copy(update={"num_experts": 0, "intermediate_size": 96})


def shape_of(model: ModelConfig) -> ModelShape:
    return ModelShape(model, vocab_size=model.vocab_size or 40, bos_token_id=1, stop_token_ids=(2,), pad_token_id=0)


class Learners:
    """The ranks of one learner. Every call goes to all of them at the same time."""

    def __init__(self, pipes: list[Connection], *start: Any) -> None:
        self._pipes = pipes
        self.reports: list[LearnerReport] = self._ask([("start", *start, rank) for rank in range(len(pipes))])

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call ``LearnerWorker.method`` on every rank; results in the order of the ranks."""
        return self.each(method, [arguments] * len(self._pipes))

    def each(self, method: str, arguments: list[tuple]) -> list[Any]:
        """The same with arguments of its own for every rank."""
        return self._ask([("call", method, *own) for own in arguments])

    def run(self, function: Callable, *arguments: Any) -> list[Any]:
        """``function(worker, *arguments)`` inside every rank's process; a function of a module, not a lambda."""
        return self._ask([("run", function, *arguments)] * len(self._pipes))

    def _ask(self, messages: list[tuple]) -> list[Any]:
        for pipe, message in zip(self._pipes, messages, strict=True):
            pipe.send(message)
        answers = [pipe.recv() for pipe in self._pipes]
        for error, trace, _ in answers:
            if error is not None:
                error.add_note(trace)
                raise error
        return [result for _, _, result in answers]


MOST_THREADS = 300
"""Of a rank's process; each learner built in it leaves about 50."""


class RankProcesses:
    """Processes that live through a test session: importing Megatron costs seconds."""

    def __init__(self, count: int) -> None:
        self._ranks = [_start() for _ in range(count)]

    @contextlib.contextmanager
    def learners(self, model: ModelConfig, recipe: str, ranks: int = 1, **settings: Any) -> Iterator[Learners]:
        """Build a learner of ``ranks`` ranks, with expert parallelism over all of them where there are experts.

        Settings of the section learner may be given among the ``settings``, which are sections otherwise.
        """
        expert_parallel = ranks // settings.get("pipeline_parallel", 1) if model.num_experts else 1
        layout = {"ranks": ranks, "expert_parallel": expert_parallel, "micro_batch_tokens": 80}
        layout |= {key: settings.pop(key) for key in [*settings] if key in LearnerConfig.model_fields}
        learner = LearnerConfig(**layout)
        config = Config(model=model, recipe=recipe, learner=learner, **settings)
        rendezvous = f"tcp://127.0.0.1:{_free_port()}"
        self._replace_crowded()
        learners = Learners([pipe for pipe, _ in self._ranks[:ranks]], config, shape_of(model), ranks, rendezvous)
        try:
            yield learners
        finally:
            learners.call("shutdown")

    def close(self) -> None:
        for pipe, _ in self._ranks:
            pipe.send(("stop",))
        for _, process in self._ranks:
            process.join(30)
            if process.is_alive():
                process.kill()

    def _replace_crowded(self) -> None:
        """Some of gloo's threads outlive the learner they served, and thousands of them slow the machine down."""
        for index, (_, process) in enumerate(self._ranks):
            if psutil.Process(process.pid).num_threads() > MOST_THREADS:
                process.kill()
                process.join()
                self._ranks[index] = _start()


def _start() -> "tuple[Connection, multiprocessing.process.BaseProcess]":
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=_serve, args=(other,))
    process.start()
    return own, process


def _serve(pipe: Connection) -> None:
    worker: LearnerWorker | None = None
    while True:
        what, *arguments = pipe.recv()
        try:
            result = None
            if what == "stop":
                return
            if what == "start":
                config, shape, world_size, rendezvous, rank = arguments
                if worker is not None:
                    worker.shutdown()  # one that could not be built
                worker = LearnerWorker(config, shape, rank, world_size, rendezvous)
                result = worker.build()
            elif what == "call":
                result = getattr(worker, arguments[0])(*arguments[1:])
            elif what == "run":
                result = arguments[0](worker, *arguments[1:])
            pipe.send((None, "", result))
        except Exception as error:
            pipe.send((error, traceback.format_exc(), None))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
