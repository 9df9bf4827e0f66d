"""The fallback of the Hopper linear: where the kernels cannot run, the reference does, and says so once."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant import linear as reference
from mxdist.quant.kernels.linear import mx_linear, prepare_weight
from mxdist.quant.recipe import get_recipe


def test_without_fp8_tensor_cores_the_reference_runs_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    x, w, recipe = torch.randn(4, 64), torch.randn(32, 64), get_recipe("mxfp4")
    w_q = prepare_weight(w, recipe)
    assert isinstance(w_q, torch.Tensor)
    with caplog.at_level(logging.WARNING):
        results = [mx_linear(x, w, w_q, recipe, name="layers.0.mlp") for _ in range(2)]
    assert torch.equal(results[0], reference.mx_linear(x, w, w_q, recipe))
    assert [record.message for record in caplog.records] == [
        "layers.0.mlp runs on the reference backend: a cpu device has no FP8 tensor cores"
    ]


def test_a_recipe_that_quantises_nothing_is_a_plain_linear() -> None:
    x, w = torch.randn(4, 64), torch.randn(32, 64)
    assert torch.equal(mx_linear(x, w, None, get_recipe("bf16")), torch.nn.functional.linear(x, w))
