"""The step loop of a vLLM engine: requests in, answers out, and a moment before each step to do something else in.

What vLLM calls a step computes one token of each running request (and prompts). On a GPU it schedules a step ahead.
Answers are read from vLLM's scheduler once they are whole. vLLM's output processor, which would take up every token of
every request for text and streams that nobody asks for, is told to forget the requests before the first step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.engine import FinishReason


@dataclass(frozen=True)
class Answer:
    """What a request was answered with."""

    tokens: list[int]  # with the stop token that ended it
    stopped: bool  # by a stop token, rather than at the most tokens it may have


class Generation:
    """Requests of one batch, from their start to the last token of the last. An engine has one at a time."""

    def __init__(self, llm: LLM, prompts: Sequence[tuple[int, ...]], sampling: Sequence[SamplingParams]) -> None:
        """
        Args:
            sampling: one a prompt.
        """
        self._llm = llm
        self._client = llm.llm_engine.engine_core
        self._core = self._client.engine_core  # the engine is in this process
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        self.requests = llm.enqueue(requests, list(sampling), use_tqdm=False)
        self._states = [self._core.scheduler.requests[request] for request in self.requests]
        self._reset = 0
        llm.llm_engine.output_processor.abort_requests(self.requests, internal=True)  # the scheduler keeps them

    def run(self, before_step: Callable[[], None] = lambda: None) -> list[Answer]:
        """Step until all are answered; in the order of the prompts. ``before_step`` may use ``paused``.

        When it or a step raises, the requests are given up, and the engine is free for others.
        """
        try:
            while self._core.scheduler.has_unfinished_requests():
                before_step()
                self._client.get_output()
        except BaseException:
            self._client.abort_requests(self.requests)
            raise
        return [
            Answer(list(state.output_token_ids), state.get_finished_reason() == FinishReason.STOP)
            for state in self._states
        ]

    @contextmanager
    def paused(self) -> Iterator[list[int]]:
        """A block in which no step is under way; yields how many tokens each request has sampled so far."""
        self._core.pause_scheduler("keep", clear_cache=False)
        try:
            while self._core.batch_queue:  # steps that were scheduled ahead
                self._client.get_output()
            yield [state.num_output_tokens for state in self._states]
        finally:
            self._core.resume_scheduler()

    def compute_again(self) -> None:
        """Forget the keys and values of all requests, and the prefix cache; the next steps compute them anew."""
        before = self.preemptions
        self._llm.reset_prefix_cache(reset_running_requests=True)
        self._reset += self.preemptions - before

    @property
    def preemptions(self) -> int:
        """How often a request lost its keys and values because others needed the room, and had to begin again."""
        return sum(state.num_preemptions for state in self._states) - self._reset
