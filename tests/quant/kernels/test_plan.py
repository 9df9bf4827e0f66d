"""The dispatcher's choices, in words; they need neither Triton nor a GPU."""

import pytest
import torch

from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.plan import Gemm, backend, device_lacks, plan
from mxdist.quant.recipe import Fallback, Macro, Operand, Recipe, get_recipe

FOLDED = Operand(macro=Macro(method="folded"))


def gemms(name: str, outputs: int = 2048, inputs: int = 2048) -> tuple[Gemm, Gemm, Gemm]:
    chosen = plan(get_recipe(name), outputs, inputs)
    return chosen.forward.gemm, chosen.dgrad.gemm, chosen.wgrad.gemm


def test_presets_run_where_their_scales_fit() -> None:
    assert gemms("mxfp4") == (Gemm.BLOCK, Gemm.BF16, Gemm.BF16)
    assert gemms("mxfp4_g4") == (Gemm.BLOCK, Gemm.BLOCK, Gemm.BLOCK)
    assert gemms("mxfp4_mbs") == (Gemm.TILE, Gemm.BF16, Gemm.BF16)
    assert gemms("mxfp4_mbs_g4") == (Gemm.TILE, Gemm.BF16, Gemm.BLOCK)
    assert gemms("mxfp4_of") == gemms("mxfp4_mbs_of") == (Gemm.BF16,) * 3
    assert gemms("mxfp4_mbs_of_g4") == (Gemm.BF16, Gemm.BF16, Gemm.BLOCK)
    assert gemms("bf16") == (Gemm.REFERENCE,) * 3


def test_a_fallback_of_listed_tiles_runs_in_fp8_and_one_by_threshold_in_bf16() -> None:
    operand = Operand(macro=Macro(), fallback=Fallback(fraction=0.05))
    for w, gemm in ((Operand(), Gemm.BLOCK), (FOLDED, Gemm.BLOCK), (Operand(macro=Macro()), Gemm.TILE)):
        recipe = Recipe("x", x_fwd=operand, w=w)
        assert plan(recipe, 2048, 2048, listed=True).forward.gemm is gemm
        assert plan(recipe, 2048, 2048).forward.gemm is Gemm.BF16
        assert plan(recipe, 2050, 2048, listed=True).forward.gemm is Gemm.BF16
    assert "Frozen.tiles" in plan(recipe, 2048, 2048).why()


def test_macro_factors_in_the_bytes_of_weights_keep_dgrad_in_fp8() -> None:
    recipe = Recipe("x", x_fwd=Operand(macro=Macro()), w=FOLDED, dy_dgrad=Operand(macro=Macro()))
    chosen = plan(recipe, 2048, 2048)
    assert (chosen.forward.gemm, chosen.dgrad.gemm, chosen.weight_form) == (Gemm.BLOCK, Gemm.BLOCK, Form.SQUARE)
    assert plan(recipe, 2064, 2048).forward.gemm is Gemm.REFERENCE


def test_macro_factors_on_activations_alone_keep_square_weights() -> None:
    recipe = Recipe("x", x_fwd=Operand(macro=Macro()), w=Operand(), dy_dgrad=Operand(macro=Macro()))
    chosen = plan(recipe, 2048, 2048)
    assert (chosen.forward.gemm, chosen.dgrad.gemm, chosen.weight_form) == (Gemm.BLOCK, Gemm.BLOCK, Form.SQUARE)


@pytest.mark.parametrize(("recipe", "reason"), [("mxfp4_of", "both terms"), ("bf16", "high precision")])
def test_the_plan_says_why(recipe: str, reason: str) -> None:
    assert reason in plan(get_recipe(recipe), 2048, 2048).why()


def test_sizes_that_no_fp8_gemm_takes_go_to_the_reference() -> None:
    assert gemms("mxfp4", outputs=2050) == (Gemm.REFERENCE,) * 3
    assert gemms("mxfp4_g4", inputs=2064)[2] is Gemm.REFERENCE
    assert gemms("mxfp4", inputs=2050)[0] is Gemm.ROW  # the contraction axis is padded
    assert gemms("mxfp4", outputs=2064)[0] is Gemm.ROW


def test_a_cpu_is_named_as_lacking_fp8_tensor_cores() -> None:
    assert device_lacks(torch.device("cpu")) == "a cpu device has no FP8 tensor cores"


def test_a_device_without_them_runs_the_reference_and_says_so() -> None:
    chosen = backend(get_recipe("mxfp4"), 2048, 2048, torch.device("cpu"))
    assert {part.gemm for part in (chosen.forward, chosen.dgrad, chosen.wgrad)} == {Gemm.REFERENCE}
    assert "no FP8 tensor cores" in chosen.why()
