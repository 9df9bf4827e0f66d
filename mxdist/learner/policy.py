"""The model in training: Megatron's data-parallel wrapper and distributed optimizer around our GPT model.

Gradients are plain sums over micro-batches and ranks, because the weights of a batch hold the normaliser of the whole
optimizer update already. Megatron divides by the number of micro-batches, by the data-parallel size and, at the end,
by the number of tokens. With ``calculate_per_token_loss`` the first two are off, for experts as well, and
``_sum_gradients`` leaves out the third.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mxdist.config.schema import OptimizerConfig as AdamSettings
from mxdist.errors import RunStopped
from mxdist.learner.losses import LossInputs, LossOutput, Objective
from mxdist.learner.scoring import token_scores
from mxdist.messages import EntropyStatistics, Mean, TrainBatch
from mxdist.model.draws import GradientDraws
from mxdist.model.quantised_weight import forget_before_step, requantise


@dataclass(frozen=True)
class Scored:
    """What one micro-batch gave."""

    logprobs: np.ndarray  # float32 [rows, length]
    entropy: EntropyStatistics
    loss: float
    metrics: dict[str, Mean]


class Policy:
    """``model`` with its gradients and its optimizer state; the model's weights must be set already."""

    def __init__(self, model: GPTModel, settings: AdamSettings, draws: GradientDraws) -> None:
        self.model = model
        self._draws = draws
        model.config.finalize_model_grads_func = _sum_gradients
        self._ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False
            ),
            model,
        )
        self.optimizer: ChainedOptimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.eps,
                clip_grad=settings.clip_grad,
                bf16=model.config.bf16,
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self._ddp],
            use_gloo_process_groups=torch.cuda.is_available(),
        )
        for group in self.optimizer.param_groups:
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]  # norms have wd_mult 0
        for part in self.optimizer.chained_optimizers:
            forget_before_step(model, part.optimizer)
            part.init_state_fn(part.optimizer)  # a checkpoint may be asked for before the first step
        requantise(model)

    @property
    def updates(self) -> int:
        """Optimizer updates made so far; a checkpoint carries the count on."""
        return max(int(group.get("step", 0)) for group in self.optimizer.param_groups)

    def score(self, batches: Sequence[TrainBatch]) -> list[Scored]:
        """Forward only."""
        with torch.no_grad():
            return self._run(batches, None, forward_only=True)

    def forward(self, tokens: np.ndarray) -> Tensor:
        """Logits [sequences, length, vocabulary] of tokens int64 [sequences, length]; every rank must call it."""
        return _logits(self.model, torch.from_numpy(tokens).to(self._device))

    def accumulate(
        self, batches: Sequence[TrainBatch], objective: Objective, old_logprobs: Sequence[np.ndarray] | None
    ) -> list[Scored]:
        """Forward and backward of the micro-batches of one optimizer update; leaves the summed gradients.

        Args:
            old_logprobs: by micro-batch, as ``score`` gave them before the first update of this step; None when this
                is the only update, so that they are those of this very pass.
        """
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        old = itertools.repeat(None) if old_logprobs is None else iter(old_logprobs)

        def loss(batch: TrainBatch, logprobs: Tensor) -> LossOutput:
            return objective.loss(_loss_inputs(batch, logprobs, next(old)))

        return self._run(batches, loss, forward_only=False)

    def step(self, learning_rate: float) -> float:
        """Clip, update the weights and quantise them anew. Returns the gradients' norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        _, norm, _ = self.optimizer.step()
        if not np.isfinite(norm):
            raise RunStopped(
                f"the gradients are not finite (norm {norm}); lower optimizer.lr or look at the data of this step"
            )
        requantise(self.model)
        return float(norm)

    def _run(
        self,
        batches: Sequence[TrainBatch],
        loss: Callable[[TrainBatch, Tensor], LossOutput] | None,
        forward_only: bool,
    ) -> list[Scored]:
        update = self.updates

        def forward_step(data: Any, model: torch.nn.Module) -> tuple[Tensor, Callable]:
            index, batch = next(data)
            self._draws.move_to(update, index)
            tokens = torch.from_numpy(batch.tokens).to(self._device)
            logits = _logits(model, tokens)

            def finish(logits: Tensor) -> tuple[Tensor, Tensor, Scored]:
                mask = torch.from_numpy(batch.response_mask).to(self._device)
                logprobs, entropy = token_scores(logits, tokens, mask, batch.temperature)
                output = LossOutput(logprobs.sum(), {}) if loss is None else loss(batch, logprobs)
                scored = Scored(logprobs.detach().cpu().numpy(), entropy, float(output.loss.detach()), output.metrics)
                return output.loss, torch.zeros((), dtype=torch.int), scored

            return logits, finish

        rows, length = batches[0].tokens.shape
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=enumerate(batches),
            model=[self._ddp],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    # No mask: attention is causal and the padding is on the right.
    return model(input_ids=tokens, position_ids=positions, attention_mask=None)


def _loss_inputs(batch: TrainBatch, logprobs: Tensor, old_logprobs: np.ndarray | None) -> LossInputs:
    device = logprobs.device
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() if old_logprobs is None else torch.from_numpy(old_logprobs).to(device),
        rollout_logprobs=torch.from_numpy(batch.rollout_logprobs).to(device),
        advantages=torch.from_numpy(batch.advantages).to(device),
        mask=torch.from_numpy(batch.response_mask).to(device),
        weights=torch.from_numpy(batch.weights).to(device),
    )


def _sum_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None, **kwargs: Any) -> None:  # noqa: ARG001
    finalize_model_grads(model, None, **kwargs)
