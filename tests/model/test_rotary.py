"""Rotary positions: against their definition in complex numbers, and the kernel against torch's operations."""

import pytest
import torch

import tests.interpreted  # noqa: F401
from mxdist.model.rotary import Rotate, rotate, rotation
from tests.quant.kernels.data import DEVICE

POSITIONS = torch.tensor([0, 1, 2, 0, 1, 900], device=DEVICE)


def test_halves_turn_as_complex_numbers_do() -> None:
    x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = rotate(x.float(), rotation(POSITIONS.cpu(), 8, 10_000.0, torch.float32))
    angles = POSITIONS.cpu()[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)[:, None]
    torch.testing.assert_close(turned.double(), torch.cat((expected.real, expected.imag), -1), rtol=0, atol=2e-4)


@pytest.mark.parametrize("heads", [1, 3, 16])
def test_the_kernel_turns_and_turns_gradients_back(heads: int) -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton")
    generator = torch.Generator().manual_seed(0)
    # Every other head of a wider tensor, as queries lie beside keys and values.
    wide = torch.randn(6, 2 * heads, 24, generator=generator).to(DEVICE)
    by = rotation(POSITIONS, 24, 10_000.0, torch.float32)
    found, expected = (wide.clone().requires_grad_() for _ in range(2))
    outputs = Rotate.apply(found[:, ::2], *by), rotate(expected[:, ::2].cpu(), tuple(part.cpu() for part in by))
    torch.testing.assert_close(outputs[0].cpu(), outputs[1], rtol=0, atol=1e-5)
    dy = torch.randn(6, heads, 24, generator=generator)
    for output in outputs:
        output.backward(dy.to(output.device))
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-5)


def test_bfloat16_is_rounded_once() -> None:
    x = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    by = rotation(POSITIONS.cpu(), 8, 10_000.0, torch.bfloat16)
    exact = rotate(x.float(), tuple(part.float() for part in by))
    assert torch.equal(rotate(x, by), exact.bfloat16())
