"""A policy on DeepSpeed: its engine, with ZeRO (arXiv 1910.02054), around a dense model of transformers.

DeepSpeed averages gradients over the ranks; here they are plain sums (``policy``), so the loss is multiplied by the
number of ranks. The engine is told which micro-batch is the last of an update, so that it divides by no count of them.
"""

import contextlib
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdist.config.schema import Config
from mxdist.learner.finite import of_lowest_rank
from mxdist.learner.microbatches import MicroBatch
from mxdist.learner.policy import Finish, Policy
from mxdist.model.draws import GradientDraws
from mxdist.model.packing import PackedSequences
from mxdist.model.quantised_weight import forget_before_step, requantise
from mxdist.quant.transfer import sent

BUCKET = 200_000_000
"""Numbers that DeepSpeed reduces or gathers together, at most."""


class ZeroPolicy(Policy):
    """``model`` with its gradients and its optimizer state; the model's weights must be set already."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, config: Config, draws: GradientDraws) -> None:
        super().__init__(model, draws)
        self._update = 0
        for layer in model.model.layers:
            layer.register_forward_pre_hook(self._move_draws, with_kwargs=True)
        adam = config.optimizer
        optimizer = torch.optim.AdamW(
            _groups(model, adam.weight_decay), lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps
        )
        forget_before_step(model, optimizer)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the memory in use as it goes along
            self.engine = deepspeed.initialize(
                model=model, optimizer=optimizer, config=engine_settings(config), dist_init_required=False
            )[0]
        self._watch = _GradientWatch(model)
        requantise(model)

    @property
    def updates(self) -> int:
        return self.engine.global_steps - self.engine.skipped_steps

    def _clear_gradients(self) -> None:
        self._watch.clear()  # DeepSpeed's own are cleared by every step, also one that it leaves out

    def _update_weights(self, learning_rate: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        if not self.engine.was_step_applied():
            mine = self._watch.first()
            raise self._not_finite(of_lowest_rank(mine, self._device) or "an overflowing sum")
        return float(self.engine.get_global_grad_norm())

    def _run(self, parts: Sequence[MicroBatch], finish: Finish, forward_only: bool) -> list[Any]:
        self._update = self.updates
        ranks, results = torch.distributed.get_world_size(), []
        for index, part in enumerate(parts):
            tokens = sent(torch.from_numpy(part.tokens), self._device).unsqueeze(0)  # [1, tokens]
            packing = PackedSequences(part.packed_lengths, self._device, index)
            self.engine.set_gradient_accumulation_boundary(index == len(parts) - 1)
            with self.forwards.running():
                output = self.engine(
                    input_ids=tokens, position_ids=packing.positions.unsqueeze(0), use_cache=False, packing=packing
                )
                loss, result = finish(part, output.logits.squeeze(0))
            if not forward_only:
                self.engine.backward(loss * ranks)
            results.append(result)
        return results

    def _move_draws(self, _: nn.Module, __: tuple, arguments: dict[str, Any]) -> None:
        """Before a layer computes, or computes again in a backward pass."""
        self._draws.move_to(self._update, arguments["packing"].micro_batch)


class _GradientWatch:
    """Remembers which parameters' gradients were not finite on this rank, without waiting for the device."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        device = next(model.parameters()).device
        self._bad = torch.zeros(len(self._names), dtype=torch.bool, device=device)
        for index, parameter in enumerate(model.parameters()):
            parameter.register_hook(partial(self._look, index))

    def clear(self) -> None:
        self._bad.zero_()

    def first(self) -> str | None:
        """The one that the backward pass met first: the last in the order of the forward pass."""
        bad = self._bad.nonzero()
        return self._names[int(bad[-1])] if len(bad) else None

    def _look(self, index: int, gradient: Tensor) -> None:
        self._bad[index] |= ~torch.isfinite(gradient.sum())


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 has divided it
        (matrices if len(shape) > 1 else others).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def engine_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's configuration, in its own names (deepspeed.ai/docs/config-json)."""
    learner = config.learner
    zero: dict[str, Any] = {
        "stage": learner.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if learner.zero_offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if learner.zero_offload == "weights":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # one row of packed sequences
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # its own Adam for the CPU is compiled when it is first used
        "steps_per_print": None,
    }
