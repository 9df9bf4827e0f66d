"""The step loop of a vLLM engine: requests in, answers out, and a moment before each step to do something else in.

What vLLM calls a step computes one token of each running request (and prompts). On a GPU it schedules a step ahead.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import CompletionOutput, RequestOutput


class Generation:
    """Requests of one batch, from their start to the last token of the last. An engine has one at a time."""

    def __init__(self, llm: LLM, prompts: Sequence[tuple[int, ...]], sampling: Sequence[SamplingParams]) -> None:
        """
        Args:
            sampling: one a prompt.
        """
        self._llm = llm
        self._core = llm.llm_engine.engine_core.engine_core  # the engine is in this process
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        self.requests = llm.enqueue(requests, list(sampling), use_tqdm=False)
        self._finished: dict[str, CompletionOutput] = {}

    def run(self, before_step: Callable[[], None] = lambda: None) -> list[CompletionOutput]:
        """Step until all are answered; in the order of the prompts. ``before_step`` may use ``paused``.

        When it or a step raises, the requests are given up, and the engine is free for others.
        """
        try:
            while self._llm.llm_engine.has_unfinished_requests():
                before_step()
                self._step()
        except BaseException:
            self._llm.llm_engine.abort_request(self.requests, internal=True)
            raise
        return [self._finished[_number(request)] for request in self.requests]

    @contextmanager
    def paused(self) -> Iterator[list[int]]:
        """A block in which no step is under way; yields how many tokens each request has sampled so far."""
        self._core.pause_scheduler("keep", clear_cache=False)
        try:
            while self._core.batch_queue:  # steps that were scheduled ahead
                self._step()
            yield [self._sampled(request) for request in self.requests]
        finally:
            self._core.resume_scheduler()

    def compute_again(self) -> None:
        """Forget the keys and values of all requests, and the prefix cache; the next steps compute them anew."""
        self._llm.reset_prefix_cache(reset_running_requests=True)

    def _step(self) -> None:
        for output in self._llm.llm_engine.step():
            assert isinstance(output, RequestOutput)
            if output.finished:
                self._finished[output.request_id] = output.outputs[0]

    def _sampled(self, request: str) -> int:
        done = self._finished.get(_number(request))
        return len(done.token_ids) if done else self._core.scheduler.requests[request].num_output_tokens


def _number(request: str) -> str:
    """What an output calls a request: its name without what vLLM has put behind it."""
    return request.partition("-")[0]
