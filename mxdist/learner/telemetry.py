"""What quantisation does to this rank's numbers, measured beside a training step on samples of rows.

    weights      rows of every quantised matrix this rank exports, as they are after the step
    activations  input rows of every quantised linear, in a forward pass of a few sequences before the step
    gradients    dY rows of the step's first micro-batch, as dX takes them; only for recipes that quantise gradients

The error decomposition is that of ``mxdist.quant.decompose``. A router decision counts as flipped when a token's chosen
expert is not chosen in a pass of the same tokens through the same model with nothing quantised. Every figure is a
``Mean`` that adds over ranks: a pipeline stage reports its own layers, a tensor-parallel rank its part. Nothing here
changes what is trained.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.learner.microbatches import MicroBatch
from mxdist.learner.policy import Policy
from mxdist.messages import Mean
from mxdist.model.hf_tensors import HfTensor
from mxdist.model.linear_names import linear_names
from mxdist.model.quantised_weight import Observer, QuantisedWeight
from mxdist.model.recipes import ModelRecipes
from mxdist.model.shape import ModelShape
from mxdist.quant.decompose import measure
from mxdist.quant.moments import Moments
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import quantise
from mxdist.quant.telemetry import codes_changed, flagged_fraction, router_flip_rate
from mxdist.quant.tensor import MXTensor

ROWS = 16
"""Rows sampled of a matrix, of a linear's input and of its gradient."""

SEQUENCES = 8
"""Sequences of the forward passes that activations and router decisions are taken from."""


@dataclass
class _Sample:
    """Rows that are quantised alike, of many linears."""

    rows: list[Tensor] = field(default_factory=list)
    seed: int | None = None


class Telemetry:
    """One watched step: ``before_step``, the step inside ``watching_gradients``, then ``after_step``."""

    def __init__(self, policy: Policy, owned: Iterable[HfTensor], shape: ModelShape, recipes: ModelRecipes) -> None:
        """
        Args:
            owned: the tensors that this rank exports.
        """
        self._policy, self._shape, self._recipes = policy, shape, recipes
        self._linears = [module for module in policy.model.modules() if isinstance(module, QuantisedWeight)]
        self._owned = list(dict.fromkeys(tensor.module for tensor in owned if tensor.module is not None))
        self._samples: dict[tuple[str, Operand, int], _Sample] = {}
        self._means: dict[str, Mean] = {}

    @property
    def kinds(self) -> list[str]:
        """Which of weights, activations and gradients are quantised anywhere in the model, in other stages too."""
        recipes = [self._recipes.of(name) for name in linear_names(self._shape.config)]
        fields = {"weights": "w", "activations": "x_fwd", "gradients": "dy_dgrad"}
        return [kind for kind, name in fields.items() if any(getattr(recipe, name) is not None for recipe in recipes)]

    @torch.no_grad()
    def before_step(self, part: MicroBatch) -> None:
        """Look at activations, routers and the present codes. Collective; ``part`` is the first micro-batch."""
        sequences = [tokens[:length] for tokens, length in zip(part.batch.tokens, part.lengths, strict=True)]
        with self._observing(self._take_input):
            quantised = self._router_logits(sequences[:SEQUENCES])
        if self._shape.is_moe:
            with self._high_precision():
                exact = self._router_logits(sequences[:SEQUENCES])
            top_k = self._shape.config.num_experts_per_tok
            decisions = [len(logits) * top_k for logits in quantised]
            rates = [router_flip_rate(*pair, top_k) for pair in zip(exact, quantised, strict=True)]
            flipped = sum(rate * count for rate, count in zip(rates, decisions, strict=True))
            self._means["router/flip_rate"] = Mean(flipped, sum(decisions))
        self._codes = self._sampled_codes()

    @contextmanager
    def watching_gradients(self) -> Iterator[None]:
        """Sample dY of every quantised linear that computes in here, the first time it does."""
        seen: set[str] = set()

        def watch(linear: QuantisedWeight, _: Tensor, output: Tensor) -> None:
            operand = None if linear.recipe is None else linear.recipe.dy_dgrad
            if linear.output_is_repeated:
                return
            if operand is not None and output.requires_grad and linear.name not in seen:
                seen.add(linear.name)
                seed = linear.seed()
                output.register_hook(lambda gradient: self._take("gradients", operand, gradient, seed))

        with self._observing(watch):
            yield

    @torch.no_grad()
    def after_step(self) -> dict[str, Mean]:
        """All figures by metric name."""
        after = self._sampled_codes()
        changed = zip(self._codes, after, strict=True)
        elements = [mx.codes.numel() for mx in after]
        fractions = [codes_changed(*pair) * size for pair, size in zip(changed, elements, strict=True)]
        if "weights" in self.kinds:
            self._means["quant/codes_changed"] = Mean(sum(fractions), sum(elements))
            self._means["quant/flagged_fraction/weights"] = _flagged(after)
        owned = set(self._owned)
        for linear in self._linears:  # all of them: ranks may have to come together to read one
            if linear.recipe is not None and linear.recipe.w is not None:
                with linear.whole_weights([linear]):
                    if linear in owned:
                        self._take("weights", linear.recipe.w, linear.weight.detach())
        return self._means | self._decomposition()

    def _decomposition(self) -> dict[str, Mean]:
        means: dict[str, Mean] = {}
        for kind in self.kinds:
            total, packed = Moments(), []
            for (of, operand, _), sample in self._samples.items():
                if of == kind:
                    rows = torch.cat(sample.rows)
                    total = total + measure(rows, operand, seed=sample.seed, name=kind)
                    packed += [quantise(rows, operand)] if kind == "activations" and operand.fallback else []
            means |= {f"quant/{name}/{kind}": mean for name, mean in component_means(total).items()}
            if kind == "activations":
                means["quant/flagged_fraction/activations"] = _flagged(packed)
        return means

    def _take_input(self, linear: QuantisedWeight, x: Tensor, _: Tensor) -> None:
        if linear.recipe is not None and linear.recipe.x_fwd is not None and not linear.input_is_repeated:
            self._take("activations", linear.recipe.x_fwd, x)

    def _take(self, kind: str, operand: Operand, tensor: Tensor, seed: int | None = None) -> None:
        rows = tensor.detach().flatten(0, -2)[_spread(tensor.flatten(0, -2).shape[0])]
        if len(rows):
            sample = self._samples.setdefault((kind, operand, rows.shape[1]), _Sample(seed=seed))
            sample.rows.append(rows.float())

    def _sampled_codes(self) -> list[MXTensor]:
        return [linear.quantised()[_spread(linear.weight_size[0])] for linear in self._owned]

    def _router_logits(self, sequences: Sequence[np.ndarray]) -> list[Tensor]:
        """By layer of this rank's, float32 [its tokens, experts]; without experts the pass is made all the same."""
        logits: list[Tensor] = []

        def take(router: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            logits.append(F.linear(inputs[0].flatten(0, -2).float(), router.weight.float()))  # type: ignore[arg-type]

        routers = [module for name, module in self._policy.model.named_modules() if name.endswith(".mlp.router")]
        handles = [router.register_forward_pre_hook(take) for router in routers]
        self._policy.forward(sequences)
        for handle in handles:
            handle.remove()
        return logits

    @contextmanager
    def _observing(self, observer: Observer) -> Iterator[None]:
        for linear in self._linears:
            linear.observer = observer
        try:
            yield
        finally:
            for linear in self._linears:
                linear.observer = None

    @contextmanager
    def _high_precision(self) -> Iterator[None]:
        recipes = [linear.recipe for linear in self._linears]
        for linear in self._linears:
            linear.recipe = None
        try:
            yield
        finally:
            for linear, recipe in zip(self._linears, recipes, strict=True):
                linear.recipe = recipe


def component_means(moments: Moments) -> dict[str, Mean]:
    """The decomposition as means that add over ranks.

    The three components and both crosses are shares of ||e||^2 and add to 1. The cosine is that between scale bias and
    grid noise; over several ranks, the mean weighted by the product of their norms.
    """
    m = moments
    return {
        "scale_bias": Mean(m.scale, m.error),
        "deadzone": Mean(m.deadzone, m.error),
        "grid": Mean(m.grid, m.error),
        "cross_scale_grid": Mean(2 * m.scale_grid, m.error),
        "cross_scale_deadzone": Mean(2 * m.scale_deadzone, m.error),
        "cosine": Mean(m.scale_grid, (m.scale * m.grid) ** 0.5),
        "nmse": Mean(m.error, m.energy),
        "gain": Mean(m.product, m.energy),
        "zeroed": Mean(m.zeroed, m.elements),
        "saturated": Mean(m.saturated, m.blocks),
    }


def _flagged(tensors: list[MXTensor]) -> Mean:
    blocks = [mx.scales.numel() for mx in tensors]
    return Mean(sum(flagged_fraction(mx) * count for mx, count in zip(tensors, blocks, strict=True)), sum(blocks))


def _spread(rows: int) -> slice:
    """About ``ROWS`` of so many rows, evenly spread."""
    return slice(0, None, -(-rows // ROWS) or 1)
