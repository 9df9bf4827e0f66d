"""A policy on Megatron-core: its data-parallel wrapper and distributed optimizer around our GPT model.

Megatron divides gradients by the number of micro-batches, by the data-parallel size and, at the end, by the number of
tokens. Here they are plain sums (``policy``): with ``calculate_per_token_loss`` the first two are off, for experts as
well, and ``_sum_gradients`` leaves out the third.
"""

from collections.abc import Callable, Sequence
from typing import Any

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
from mxdist.learner.finite import first_not_finite
from mxdist.learner.microbatches import MicroBatch
from mxdist.learner.policy import Finish, Policy
from mxdist.model.attention import Packing
from mxdist.model.draws import GradientDraws
from mxdist.model.quantised_weight import forget_before_step, requantise
from mxdist.quant.transfer import sent


class MegatronPolicy(Policy):
    """``model`` with its gradients and its optimizer state; the model's weights must be set already."""

    model: GPTModel

    def __init__(self, model: GPTModel, settings: AdamSettings, draws: GradientDraws) -> None:
        super().__init__(model, draws)
        self.tensor_parallel = parallel_state.get_tensor_model_parallel_group()
        self._update = 0
        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(self._move_draws, with_kwargs=True)
        model.config.finalize_model_grads_func = _sum_gradients
        self._ddp = DistributedDataParallel(
            model.config,
            # No overlap: quantised linears and experts add to ``main_grad`` themselves, and no hook may wait for those.
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
        return max(int(group.get("step", 0)) for group in self.optimizer.param_groups)

    def _clear_gradients(self) -> None:
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _update_weights(self, learning_rate: float) -> float:
        if (name := first_not_finite(self._ddp)) is not None:
            raise self._not_finite(name)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        _, norm, _ = self.optimizer.step()
        return float(norm)

    def _whole_vocabulary(self, logits: Tensor) -> Tensor:
        return gather_from_tensor_model_parallel_region(logits, group=self.tensor_parallel)

    def _run(self, parts: Sequence[MicroBatch], finish: Finish, forward_only: bool) -> list[Any]:
        """Pipelined over stages."""
        self._update = self.updates

        def forward_step(data: Any, model: torch.nn.Module) -> tuple[Tensor, Callable]:
            index, part = next(data)
            tokens = sent(torch.from_numpy(part.tokens), self._device).unsqueeze(0)  # [1, tokens]
            packing = Packing(part.packed_lengths, self._device, index)
            with self.forwards.running():
                output = model(tokens, packing.positions.unsqueeze(0), attention_mask=None, packed_seq_params=packing)

            def with_count(logits: Tensor) -> tuple[Tensor, Tensor, Any]:
                with self.forwards.running():
                    loss, result = finish(part, logits.squeeze(0))
                return loss, torch.zeros((), dtype=torch.int), result

            return output, with_count

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=enumerate(parts),
            model=[self._ddp],
            num_microbatches=len(parts),
            # Of the pipeline's messages, where these do not say how long they are.
            seq_length=max(len(part.tokens) for part in parts),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _move_draws(self, _: torch.nn.Module, __: tuple, arguments: dict[str, Any]) -> None:
        """Before a layer computes, or computes again in a backward pass while other micro-batches are under way."""
        self._draws.move_to(self._update, arguments["packed_seq_params"].micro_batch)


def _sum_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None, **kwargs: Any) -> None:  # noqa: ARG001
    finalize_model_grads(model, None, **kwargs)
