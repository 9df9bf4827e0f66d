"""Our modules in a Megatron-core GPTModel: parallel linears and experts that compute with ``mx_linear``.

Megatron's hook is used as it is: a ``BackendSpecProvider`` says which classes a layer is built from. Each linear gets
its recipe once the model is built (``hf_tensors.set_up_linears``), by its Hugging Face name, as in the engine.
"""

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from mxdist.model.activation import swiglu
from mxdist.model.attention import PackedAttention
from mxdist.model.experts import MxExperts
from mxdist.model.moe_layer import MxMoELayer
from mxdist.model.quantised_weight import QuantisedWeight
from mxdist.quant.backend import nonfinite_in_passing
from mxdist.quant.linear import Shard, mx_linear


class _MxLinear(QuantisedWeight):
    """What the column and the row parallel linear share: the matrix product on this rank's part of the weight."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup | None,
        **fusions: object,
    ) -> Tensor:
        if self.recipe is None:
            return super()._forward_impl(  # type: ignore[misc]
                input,
                weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **fusions,
            )
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = mx_linear(
            input,
            weight,
            self.prepared(),
            self.recipe,
            bias,
            seed=self.seed(),
            shard=self.shard(tp_group),
            name=self.name,
            nonfinite=nonfinite_in_passing(input.device),
            # Megatron's float32 gradient, to which its hook would add one of the weight's dtype.
            total=getattr(weight, "main_grad", None),
        )
        self.show(input, output)
        return output

    def shard(self, group: torch.distributed.ProcessGroup | None) -> Shard:
        """Where this rank's part lies in the whole linear. An expert is whole on its rank."""
        raise NotImplementedError


class MxColumnParallelLinear(_MxLinear, ColumnParallelLinear):
    """Output features are divided over the tensor-parallel ranks."""

    @property
    def input_is_repeated(self) -> bool:
        return not self.is_expert and parallel_state.get_tensor_model_parallel_rank() > 0

    def shard(self, group: torch.distributed.ProcessGroup | None) -> Shard:
        rank, size = _place(group)
        return Shard(output=rank * len(self.weight), outputs=size * len(self.weight))


class MxRowParallelLinear(_MxLinear, RowParallelLinear):
    """Input features are divided over the tensor-parallel ranks."""

    @property
    def output_is_repeated(self) -> bool:
        return not self.is_expert and parallel_state.get_tensor_model_parallel_rank() > 0

    def shard(self, group: torch.distributed.ProcessGroup | None) -> Shard:
        rank, size = _place(group)
        return Shard(input=rank * self.weight.shape[1], inputs=size * self.weight.shape[1])


def _place(group: torch.distributed.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


class RmsNorm(torch.nn.RMSNorm):
    """Root-mean-square norm that, unlike Megatron's torch wrapper, may be used under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Megatron sums the gradients of such parameters over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class MxSpecProvider(LocalSpecProvider):
    """The modules of this project where Megatron asks for a linear, a norm or experts."""

    def column_parallel_linear(self) -> type:
        return MxColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return MxRowParallelLinear

    def core_attention(self) -> type:
        return PackedAttention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:  # noqa: ARG002
        return RmsNorm

    def grouped_mlp_modules(
        self,
        moe_use_grouped_gemm: bool,  # noqa: ARG002
        moe_use_legacy_grouped_gemm: bool,  # noqa: ARG002
    ) -> tuple[type, MLPSubmodules]:
        return MxExperts, MLPSubmodules(linear_fc1=MxColumnParallelLinear, linear_fc2=MxRowParallelLinear)


def decoder_spec(
    layers: int, num_experts: int | None, qk_norms: bool, rotary_base: float
) -> TransformerBlockSubmodules:
    """The ``layers`` equal layers of one pipeline stage; ``num_experts`` None is the dense model."""
    backend = MxSpecProvider()
    norm = backend.layer_norm(rms_norm=True)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=ModuleSpec(module=backend.core_attention(), params={"rotary_base": rotary_base}),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm if qk_norms else IdentityOp,
            k_layernorm=norm if qk_norms else IdentityOp,
        ),
    )
    mlp = get_mlp_module_spec_for_backend(backend=backend, num_experts=num_experts)
    if num_experts is None:
        mlp.submodules.activation_func = swiglu
    else:
        mlp.module = MxMoELayer
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_cross_attn_layernorm=IdentityOp,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
