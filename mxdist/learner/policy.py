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
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from mxdist.config.schema import OptimizerConfig as AdamSettings
from mxdist.errors import NotFinite
from mxdist.learner.finite import first_not_finite
from mxdist.learner.losses import LossInputs, LossOutput, Objective
from mxdist.learner.microbatches import MicroBatch, one_micro_batch
from mxdist.learner.scoring import token_scores
from mxdist.messages import EntropyStatistics, Mean
from mxdist.model.attention import Packing
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
        self._update = 0
        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(self._move_draws, with_kwargs=True)
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

    def score(self, parts: Sequence[MicroBatch]) -> list[Scored]:
        """Forward only. Empty on the ranks of all pipeline stages but the last."""
        with torch.no_grad():
            return self._run(parts, self._finish(None), forward_only=True)

    def forward(self, sequences: Sequence[np.ndarray]) -> list[Tensor]:
        """Logits [length, vocabulary] of each sequence, int64 [length], from one pass; every rank must call it.

        Empty on the ranks of all pipeline stages but the last.
        """
        part = one_micro_batch(sequences, self._tensor_parallel.size())

        def finish(_: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
            whole = gather_from_tensor_model_parallel_region(logits, group=self._tensor_parallel)
            return logits.new_zeros(()), whole[: len(part.tokens) - part.padding]

        with torch.no_grad():
            found = self._run([part], finish, forward_only=True)
        return list(found[0].split(part.lengths.tolist())) if found else []

    def accumulate(
        self, parts: Sequence[MicroBatch], objective: Objective, old_logprobs: Sequence[np.ndarray] | None
    ) -> list[Scored]:
        """Forward and backward of the micro-batches of one optimizer update; leaves the summed gradients.

        Args:
            old_logprobs: by micro-batch, as ``score`` gave them before the first update of this step; None when this
                is the only update, so that they are those of this very pass.
        Returns:
            As ``score`` does.
        """
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        old = itertools.repeat(None) if old_logprobs is None else iter(old_logprobs)

        def loss(part: MicroBatch, logprobs: Tensor) -> LossOutput:
            return objective.loss(_loss_inputs(part, logprobs, next(old)))

        return self._run(parts, self._finish(loss), forward_only=False)

    def step(self, learning_rate: float) -> float:
        """Clip, update the weights and quantise them anew. Returns the gradients' norm before clipping.

        Raises:
            NotFinite: a gradient is not finite; no weight has changed.
        """
        if (name := first_not_finite(self._ddp)) is not None:
            raise NotFinite(
                f"a gradient is not finite, first that of {name} in the backward pass of update {self.updates + 1}; "
                f"lower optimizer.lr, look at the data of this step, or set guards.not_finite"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        _, norm, _ = self.optimizer.step()
        requantise(self.model)
        return float(norm)

    def _finish(
        self, loss: Callable[[MicroBatch, Tensor], LossOutput] | None
    ) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Scored]]:
        """From the logits of a micro-batch to its loss and what is reported of it."""

        def finish(part: MicroBatch, logits: Tensor) -> tuple[Tensor, Scored]:
            rows, columns = (torch.from_numpy(index).to(logits.device) for index in part.scored)
            places = torch.from_numpy(part.predicted_at).to(logits.device)
            tokens = torch.from_numpy(part.batch.tokens).to(logits.device)[rows, columns]
            chosen, entropy = token_scores(logits, places, tokens, part.batch.temperature, self._tensor_parallel)
            logprobs = torch.zeros(part.batch.tokens.shape, device=logits.device).index_put((rows, columns), chosen)
            output = LossOutput(logprobs.sum(), {}) if loss is None else loss(part, logprobs)
            scored = Scored(logprobs.detach().cpu().numpy(), entropy, float(output.loss.detach()), output.metrics)
            return output.loss, scored

        return finish

    def _run(
        self,
        parts: Sequence[MicroBatch],
        finish: Callable[[MicroBatch, Tensor], tuple[Tensor, Any]],
        forward_only: bool,
    ) -> list[Any]:
        """One pass over micro-batches, pipelined over stages.

        Args:
            finish: given a micro-batch and its logits, [tokens, this rank's vocabulary], returns the loss and a result.
        Returns:
            The results on the last stage, nothing on the others.
        """
        self._update = self.updates

        def forward_step(data: Any, model: torch.nn.Module) -> tuple[Tensor, Callable]:
            index, part = next(data)
            tokens = torch.from_numpy(part.tokens).to(self._device).unsqueeze(0)  # [1, tokens]
            packing = Packing(part.packed_lengths, self._device, index)
            output = model(tokens, packing.positions.unsqueeze(0), attention_mask=None, packed_seq_params=packing)

            def with_count(logits: Tensor) -> tuple[Tensor, Tensor, Any]:
                loss, result = finish(part, logits.squeeze(0))
                return loss, torch.zeros((), dtype=torch.int), result

            return output, with_count

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=enumerate(parts),
            model=[self._ddp],
            num_microbatches=len(parts),
            seq_length=max(
                len(part.tokens) for part in parts
            ),  # of the pipeline's messages, unless they tell their own
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _move_draws(self, _: torch.nn.Module, __: tuple, arguments: dict[str, Any]) -> None:
        """Before a layer computes, or computes again in a backward pass while other micro-batches are under way."""
        self._draws.move_to(self._update, arguments["packed_seq_params"].micro_batch)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _tensor_parallel(self) -> torch.distributed.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()


def _loss_inputs(part: MicroBatch, logprobs: Tensor, old_logprobs: np.ndarray | None) -> LossInputs:
    batch, device = part.batch, logprobs.device
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
