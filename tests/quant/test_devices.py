"""The quantiser's bytes do not depend on the device."""

import pytest
import torch

from mxdist.quant.checksum import checksum
from mxdist.quant.recipe import PRESETS, Operand
from mxdist.quant.reference import fake_quantise, quantise
from tests.quant.strategies import bits

OPERANDS = {
    **{f"{name} w": recipe.w for name, recipe in PRESETS.items() if recipe.w and not recipe.needs_seed},
    **{f"{name} x": recipe.x_fwd for name, recipe in PRESETS.items() if recipe.x_fwd and not recipe.needs_seed},
    "floor": Operand(scale_rule="floor"),
    "best": Operand(scale_rule="best"),
    "square": Operand(square=True),
    "g4": PRESETS["mxfp4_g4"].dy_wgrad,
    "signed": Operand(hadamard="signed"),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
@pytest.mark.parametrize("name", OPERANDS)
def test_the_bytes_and_values_on_a_gpu_are_those_of_the_cpu(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1000, generator=generator) * 2.0 ** torch.randint(-20, 20, (200, 1000), generator=generator)
    on_cpu = quantise(x, OPERANDS[name], seed=1).parts()
    on_gpu = quantise(x.cuda(), OPERANDS[name], seed=1).parts()
    assert all(torch.equal(part, on_gpu[key].cpu()) for key, part in on_cpu.items())
    assert all(checksum(part) == checksum(on_gpu[key]) for key, part in on_cpu.items())
    values = fake_quantise(x.cuda(), OPERANDS[name], seed=1).cpu()
    assert torch.equal(bits(values), bits(fake_quantise(x, OPERANDS[name], seed=1)))
