"""The sampler of an engine's processes, in the place of vLLM's own: `sampling.sample` for every row of a batch.

vLLM's draws a request's noise from a generator of its own, one call for each request and step, and reads the logits
several times. Requests come from `engine.sampling_params` alone, hence nothing but a temperature and a seed is known
here. Log-probabilities stay on the device until the last token is drawn: vLLM would take them apart and put them
together again for every token of every request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from mxdist.quant.transfer import sent
from mxdist.rollout.sampling import sample

SEED = "mxdist_seed"
"""Of SamplingParams.extra_args. Its own field would make vLLM keep a generator for the request, which it winds back
after a piece of a prompt although nothing was drawn from it."""


@dataclass(frozen=True)
class _Step:
    """What was drawn at once."""

    requests: list[str]
    positions: np.ndarray  # int64 [requests], in their answers
    logprobs: Tensor  # float32 [requests]


class SeededSampler(Sampler):
    """Draws a token for every request from its seed and the number of tokens that it has had.

    That number is the model runner's own and is right after a request was put off and taken up again.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self._runner = runner
        self._rows: SamplingMetadata | None = None
        """The last batch: vLLM makes new metadata whenever a row changes."""
        self._steps: list[_Step] = []

    def forward(
        self,
        logits: Tensor,  # [requests, vocabulary]
        sampling_metadata: SamplingMetadata,
        *_: Any,
        **__: Any,
    ) -> SamplerOutput:
        batch, device = self._runner.input_batch, logits.device
        if sampling_metadata is not self._rows:
            self._rows = sampling_metadata
            self._requests = list(batch.req_ids)
            self._seeds, self._temperature = self._of_requests(device)
        rows = len(logits)
        positions = (batch.num_tokens_no_spec[:rows] - batch.num_prompt_tokens[:rows]).astype(np.int64)
        places = sent(torch.from_numpy(positions), device)
        tokens, logprobs = sample(logits, self._temperature, self._seeds, places)
        self._steps.append(_Step(self._requests, positions, logprobs))
        return SamplerOutput(tokens.unsqueeze(-1), None)

    def take(self, requests: Sequence[str]) -> np.ndarray:
        """Log-probabilities float32 [requests, longest answer or a few more] since the last call, NaN where none is.

        A token that was drawn again, by newer weights or because vLLM dropped it, has that of its last draw.
        """
        steps, self._steps = self._steps, []
        numbers = {request: number for number, request in enumerate(requests)}
        rows = np.array([numbers.get(request, -1) for step in steps for request in step.requests], dtype=np.int64)
        asked = rows >= 0  # others were given up
        if not asked.any():
            return np.empty((len(requests), 0), dtype=np.float32)
        positions = np.concatenate([step.positions for step in steps])[asked]
        logprobs = torch.cat([step.logprobs for step in steps]).cpu().numpy()[asked]
        found = np.full((len(requests), positions.max() + 1), np.nan, dtype=np.float32)
        found[rows[asked], positions] = logprobs  # the last of several counts
        return found

    def _of_requests(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Seeds int64 and temperatures float32 of the batch's requests, [requests]."""
        runner = self._runner
        every: list[SamplingParams] = [runner.requests[request].sampling_params for request in self._requests]
        seeds = torch.tensor([(one.extra_args or {}).get(SEED, 0) for one in every], dtype=torch.int64)
        temperature = torch.tensor([one.temperature for one in every], dtype=torch.float32)
        return sent(seeds, device), sent(temperature, device)
