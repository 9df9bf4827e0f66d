"""Adds adaptive quantisation noise to the norm weights of a live model, and takes it away bit-exactly.

Noise on the weight of an RMSNorm is multiplicative noise on the rows of the linears it feeds, without touching their
quantised bytes (QeRL, arXiv 2510.11696, section 3.3). Which norms:

    dense                  input_layernorm and post_attention_layernorm of every layer
    mixture of experts     input_layernorm only: post_attention_layernorm feeds the router
    never                  q_norm, k_norm, the final norm

This file knows torch, not the engine: it is handed named parameters and may write to those only.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from mxdist.errors import RunStopped
from mxdist.messages import Noise
from mxdist.seeds import derive_seed

INPUT_NORM = "input_layernorm"
POST_ATTENTION_NORM = "post_attention_layernorm"
LAYER_NORM_PATH = re.compile(rf"(?:^|\.)layers\.(\d+)\.({INPUT_NORM}|{POST_ATTENTION_NORM})$")


class NoisyNorm(NamedTuple):
    """A norm that may carry noise."""

    layer: int
    name: str  # module path, such as model.layers.0.input_layernorm
    weight: torch.Tensor  # [hidden], the live parameter


def select_norms(weights: Iterable[tuple[str, torch.Tensor]], routed_layers: frozenset[int]) -> list[NoisyNorm]:
    """Pick the norms that carry noise, by module path, sorted by layer and name.

    Args:
        weights: (module path, weight) of every norm of the model.
        routed_layers: layers whose feed-forward part is a mixture of experts, read off the live model.
    """
    chosen = []
    for name, weight in weights:
        match = LAYER_NORM_PATH.search(name)
        if not match:
            continue
        layer, kind = int(match[1]), match[2]
        if layer in routed_layers and kind == POST_ATTENTION_NORM:
            continue
        chosen.append(NoisyNorm(layer, name, weight))
    return sorted(chosen, key=lambda norm: (norm.layer, norm.name))


class Applied(NamedTuple):
    """What noise did to the live weights, in their own dtype: bfloat16 rounds small noise away."""

    norms: int  # that changed
    sigma: float  # root mean square of the change, over the channels of all norms


class NoiseInjector:
    """Perturbs norm weights for the length of a ``with`` block.

    Args:
        norms: (layer, module path, weight) of the norms that carry noise, as ``select_norms`` gives them.
        routed_layers: layers with a router; a norm that feeds one is refused whoever chose it.

    Raises:
        ValueError: a norm feeds a router, is no layer norm by its path, or is listed twice.
    """

    def __init__(self, norms: Sequence[tuple[int, str, torch.Tensor]], routed_layers: frozenset[int]) -> None:
        self._norms = [NoisyNorm(*norm) for norm in norms]
        self._active = False
        names = [norm.name for norm in self._norms]
        for norm in self._norms:
            match = LAYER_NORM_PATH.search(norm.name)
            if not match or int(match[1]) != norm.layer:
                raise ValueError(f"{norm.name} is not a layer norm of layer {norm.layer}; it must stay clean")
            if norm.layer in routed_layers and match[2] == POST_ATTENTION_NORM:
                raise ValueError(f"{norm.name} feeds the router of layer {norm.layer}; it must stay clean")
            if names.count(norm.name) > 1:
                raise ValueError(f"{norm.name} is listed twice")

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths of the norms that carry noise when sigma > 0, sorted."""
        return tuple(sorted(norm.name for norm in self._norms))

    @contextmanager
    def perturbed(self, noise: Noise) -> Iterator[Applied]:
        """Add N(0, sigma^2), absolute and per channel, inside the block; yield what changed.

        Two norms of one layer draw different noise; the draw depends on noise.seed, layer and kind of norm only, so
        every rank of every engine draws the same. On leaving, also by an exception, every weight has its old bits.

        Raises:
            RuntimeError: sigma > 0 but there is no norm to perturb, or blocks are nested.
            RunStopped: sigma > 0 is so small that no weight changed in the model's dtype.
        """
        if noise.sigma == 0:
            yield Applied(0, 0.0)
            return
        if not self._norms:
            raise RuntimeError(f"noise of sigma={noise.sigma} was asked for, but no norm of the model can carry it")
        if self._active:
            raise RuntimeError("noise is already on: a second draw on top of it would not be the one asked for")
        clean = [norm.weight.detach().clone() for norm in self._norms]
        self._active = True
        try:
            for norm in self._norms:
                _add_noise(norm, noise)
            yield self._applied(noise, clean)
        finally:
            # Copied back, not subtracted: (w + z) - z is not w in floating point.
            for norm, weight in zip(self._norms, clean, strict=True):
                norm.weight.detach().copy_(weight)
            self._active = False

    def _applied(self, noise: Noise, clean: Sequence[torch.Tensor]) -> Applied:
        changes = [norm.weight.detach().float() - old.float() for norm, old in zip(self._norms, clean, strict=True)]
        sums = torch.stack([change.square().sum() for change in changes]).tolist()
        norms = sum(total > 0 for total in sums)
        if not norms:
            raise RunStopped(
                f"noise of sigma={noise.sigma:g} changes no norm weight in {self._norms[0].weight.dtype}, whose steps "
                f"are larger; raise aqn.sigma_end, or set aqn.mode=disabled"
            )
        return Applied(norms, math.sqrt(sum(sums) / sum(change.numel() for change in changes)))


def _add_noise(norm: NoisyNorm, noise: Noise) -> None:
    kind = norm.name.rsplit(".", 1)[1]
    # On the CPU and in float32 whatever the model is: every device and dtype sees the same draw.
    generator = torch.Generator().manual_seed(derive_seed(noise.seed, "aqn", norm.layer, kind))
    draw = torch.randn(norm.weight.shape, generator=generator, dtype=torch.float32) * noise.sigma
    weight = norm.weight.detach()
    weight.copy_(weight.float() + draw.to(weight.device))
