"""These tests need a Hopper GPU; elsewhere each is skipped with the reason."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mxdist.quant.kernels.plan import device_lacks

if importlib.util.find_spec("triton") is None:
    lacking: str | None = "the kernels need Triton"
else:
    lacking = device_lacks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    if lacking is not None:
        pytest.skip(f"needs a Hopper GPU: {lacking}")
