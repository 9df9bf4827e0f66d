"""A dense Qwen2 or Qwen3 of transformers, with our linears and with attention within packed sequences.

Linears are replaced once the model stands, parameters and all, so that whatever is known of a parameter stays true.
Attention is registered under a name of its own, the way transformers has for it; a ``PackedSequences`` reaches it as
the keyword ``packing`` of the model's call.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from mxdist.model.hf_tensors import HfTensor
from mxdist.model.packing import PackedSequences, attend
from mxdist.model.quantised_weight import QuantisedWeight
from mxdist.model.shape import ModelShape
from mxdist.quant.backend import nonfinite_in_passing
from mxdist.quant.linear import mx_linear

if TYPE_CHECKING:
    from mxdist.quant.kernels.prepared import HopperWeight

ATTENTION = "mxdist_packed"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MxLinear(QuantisedWeight, nn.Linear):  # type: ignore[misc]  # both say what ``weight`` is
    """Takes the place of a linear, with its parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.recipe is None:
            return F.linear(input, self.weight, self.bias)
        return self.product(input, self.prepared())

    def product(self, x: Tensor, weight_q: "Tensor | HopperWeight | None") -> Tensor:
        """``x`` times W_q, as ``prepared`` gives it."""
        assert self.recipe is not None
        output = mx_linear(
            x,
            self.weight,
            weight_q,
            self.recipe,
            self.bias,
            seed=self.seed(),
            name=self.name,
            nonfinite=nonfinite_in_passing(x.device),
        )
        self.show(x, output)
        return output


def build_transformers(shape: ModelShape, recompute: bool) -> PreTrainedModel:
    """The model on torch's default device, its weights not yet set, its linears transformers' own."""
    AttentionInterface.register(ATTENTION, packed_attention)
    config = shape.hf_config()
    of_type = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "torch_dtype")}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(str(config["model_type"]), **of_type),
            dtype=DTYPES[shape.config.dtype],
            attn_implementation=ATTENTION,
        )
    model.tie_weights()  # which is left out with the initial weights
    if recompute:
        # The comparison of what is computed again with what was kept does not know that ZeRO empties parameters.
        settings = {"use_reentrant": False, "determinism_check": "none"}
        model.gradient_checkpointing_enable(settings)
    return model.train()


def replace_linears(model: PreTrainedModel, kind: type[MxLinear]) -> None:
    """Our linears in every decoder layer."""
    for layer in model.model.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, kind(child))


def hf_tensors(model: PreTrainedModel, shape: ModelShape, kind: type[HfTensor] = HfTensor) -> Iterator[HfTensor]:
    """Every tensor of the model, in the order of the layers."""
    for name, size in shape.tensor_shapes().items():
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        linear = module if leaf == "weight" and isinstance(module, QuantisedWeight) else None
        yield kind(name, getattr(module, leaf), (slice(0, size[0]),), linear)


def packed_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,  # noqa: ARG001
    packing: PackedSequences,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, as transformers asks for it.

    Args:
        query: [1, heads, tokens, head].
        key, value: [1, groups, tokens, head].
    Returns:
        [1, tokens, heads, head].
    """
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return attend(query, key, value, packing).unsqueeze(0), None
