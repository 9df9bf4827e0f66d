"""Samples of the distributions that the published tables are given for, and the error measure they use."""

from functools import lru_cache

import torch
from torch import Tensor

from mxdist.quant.recipe import Operand
from mxdist.quant.reference import fake_quantise

SHAPE = (768, 2048)


@lru_cache
def sample(name: str, seed: int = 0) -> Tensor:
    """1.6 million independent values, float32, of "gaussian", "laplace" (scale 1) or "student-t5"."""
    generator = torch.Generator().manual_seed(seed)
    if name == "gaussian":
        return torch.randn(SHAPE, generator=generator)
    if name == "laplace":
        uniform = torch.rand(SHAPE, generator=generator, dtype=torch.float64) - 0.5
        return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    normal = torch.randn((6, *SHAPE), generator=generator)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def nmse(x: Tensor, operand: Operand) -> float:
    """||Q(x) - x||^2 / ||x||^2, summed in float64."""
    error = (fake_quantise(x, operand, seed=0) - x).double()
    return (error.square().sum() / x.double().square().sum()).item()


@lru_cache
def nmse_of_ceil(name: str) -> float:
    """The denominator of every relative figure: plain MXFP4 with the ceil rule."""
    return nmse(sample(name), Operand())
