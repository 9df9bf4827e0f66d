"""What the engine is compared with: random weights, payloads of them, and a transformers model that computes with
the same quantiser written in the plainest way."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mxdist.messages import WeightPayload
from mxdist.model.recipes import ModelRecipes
from mxdist.model.shape import ModelShape
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.reference import fake_quantise, quantise
from tests.sync.entries import dense_entry, mx_entry, payload_of


def operand_of(name: str, recipes: ModelRecipes) -> Operand | None:
    return recipes.of(name.removesuffix(".weight")).w if name.endswith("_proj.weight") else None


def mean_of(name: str) -> float:
    """Of random tensors: norms are near 1."""
    return 1.0 if name.endswith("norm.weight") else 0.0


def random_tensors(shape: ModelShape, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, shape.config.dtype)
    return {
        name: (torch.randn(size, generator=generator) * (0.2 if len(size) == 1 else 0.1) + mean_of(name)).to(dtype)
        for name, size in shape.tensor_shapes().items()
    }


def payloads(tensors: dict[str, Tensor], recipes: ModelRecipes, version: int, ranks: int = 2) -> list[WeightPayload]:
    """Dense tensors go out in float32 and in the model's dtype by turns: both are legal."""
    entries = []
    for number, (name, tensor) in enumerate(tensors.items()):
        if operand := operand_of(name, recipes):
            packed = quantise(tensor, operand)
            entries.append(mx_entry(name, packed, packed.dequantise(tensor.dtype)))
        else:
            entries.append(dense_entry(name, tensor.float() if number % 2 else tensor))
    return [payload_of(version, recipes.to_dict(), entries[rank::ranks]) for rank in range(ranks)]


class ReferenceLinear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> None:
        super().__init__()
        self.weight, self.bias, self.recipe = weight, bias, recipe

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(fake_quantise(x, self.recipe.x_fwd) if self.recipe.x_fwd else x, self.weight, self.bias)


class ReferenceExperts(nn.Module):
    """One token and one expert at a time."""

    def __init__(self, experts: list[dict[str, nn.Module]]) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for x, numbers, shares in zip(hidden, chosen, weights, strict=True):
            total = torch.zeros_like(x)
            for number, share in zip(numbers.tolist(), shares, strict=True):
                expert = self.experts[number]
                total += share * expert["down_proj"](F.silu(expert["gate_proj"](x)) * expert["up_proj"](x))
            rows.append(total)
        return torch.stack(rows)


def reference_model(shape: ModelShape, tensors: dict[str, Tensor], recipes: ModelRecipes) -> nn.Module:
    """A float32 transformers model whose projections are replaced by quantised ones."""
    hf = shape.hf_config()
    config = AutoConfig.for_model(
        hf["model_type"], **{k: v for k, v in hf.items() if k not in ("model_type", "torch_dtype")}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = {
        name: (quantise(tensor, operand).dequantise() if (operand := operand_of(name, recipes)) else tensor.float())
        for name, tensor in tensors.items()
    }

    def linear(name: str) -> ReferenceLinear:
        return ReferenceLinear(weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias", None), recipes.of(name))

    for number, layer in enumerate(model.model.layers):
        at = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, linear(f"{at}.self_attn.{name}"))
        names = ("gate_proj", "up_proj", "down_proj")
        if shape.is_moe:
            layer.mlp.experts = ReferenceExperts(
                [
                    {name: linear(f"{at}.mlp.experts.{e}.{name}") for name in names}
                    for e in range(shape.config.num_experts)
                ]
            )
        else:
            for name in names:
                setattr(layer.mlp, name, linear(f"{at}.mlp.{name}"))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if shape.config.tie_word_embeddings else [], [])
    model.tie_weights()
    return model


def answer_logprobs(model: nn.Module, prompt: tuple[int, ...], answer: list[int], temperature: float) -> Tensor:
    """Log-probabilities of the answer's tokens, float32 [answer], by one teacher-forced pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
