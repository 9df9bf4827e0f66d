"""The sampler of an engine's processes, in the place of vLLM's own: `sampling.sample` for every row of a batch.

vLLM's draws a request's noise from a generator of its own, one call for each request and step, and reads the logits
several times. Requests come from `engine.sampling_params` alone, hence nothing but a temperature, a seed and the
sampled token's log-probability is known here.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from mxdist.rollout.sampling import sample

SEED = "mxdist_seed"
"""Of SamplingParams.extra_args. Its own field would make vLLM keep a generator for the request, which it winds back
after a piece of a prompt although nothing was drawn from it."""


class SeededSampler(Sampler):
    """Draws a token for every request from its seed and the number of tokens that it has had.

    That number is the model runner's own and is right after a request was put off and taken up again.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(logprobs_mode="processed_logprobs")
        self._runner = runner
        self._rows: SamplingMetadata | None = None
        """The last batch: vLLM makes new metadata whenever a row changes."""

    def forward(
        self,
        logits: Tensor,  # [requests, vocabulary]
        sampling_metadata: SamplingMetadata,
        *_: Any,
        **__: Any,
    ) -> SamplerOutput:
        if sampling_metadata is not self._rows:
            self._rows = sampling_metadata
            self._seeds, self._temperature = self._of_requests(logits.device)
        batch = self._runner.input_batch
        rows = len(logits)
        drawn = torch.from_numpy((batch.num_tokens_no_spec[:rows] - batch.num_prompt_tokens[:rows]).astype("int64"))
        tokens, logprobs = sample(logits, self._temperature, self._seeds, to_device(drawn, logits.device))
        ranks = torch.zeros(rows, dtype=torch.int32)  # nobody asks for the place among all words
        found = LogprobsTensors(tokens.unsqueeze(-1), logprobs.unsqueeze(-1), ranks)
        return SamplerOutput(tokens.unsqueeze(-1), found)

    def _of_requests(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Seeds int64 and temperatures float32 of the batch's requests, [requests]."""
        runner = self._runner
        every: list[SamplingParams] = [
            runner.requests[request].sampling_params for request in runner.input_batch.req_ids
        ]
        seeds = torch.tensor([(one.extra_args or {}).get(SEED, 0) for one in every], dtype=torch.int64)
        temperature = torch.tensor([one.temperature for one in every], dtype=torch.float32)
        return to_device(seeds, device), to_device(temperature, device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy there without waiting for what the device is at."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)
