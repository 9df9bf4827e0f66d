"""Which code quantises on a device: on a CPU the reference, without importing Triton."""

import subprocess
import sys

import torch

from mxdist.quant import backend, reference
from mxdist.quant.recipe import get_recipe


def test_quantising_on_a_cpu_does_not_import_triton() -> None:
    program = (
        "import sys, torch, mxdist.quant.linear, mxdist.quant.backend as b\n"
        "from mxdist.quant.recipe import Operand\n"
        "b.quantise(torch.ones(4, 64), Operand()), b.fake_quantise(torch.ones(4, 64), Operand())\n"
        "assert 'mxdist.quant.kernels.quant_terms' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('mxdist.quant.kernels.quant')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_cpu_gets_the_references_values_and_bytes_in_the_dtype_asked_for() -> None:
    x, operand = torch.randn(8, 300), get_recipe("mxfp4_mbs_of").x_fwd
    assert operand is not None
    wanted = reference.fake_quantise(x, operand)
    assert torch.equal(backend.fake_quantise(x, operand), wanted)
    assert torch.equal(backend.fake_quantise(x, operand, dtype=torch.bfloat16), wanted.bfloat16())
    assert torch.equal(backend.quantise(x, operand).codes, reference.quantise(x, operand).codes)
    assert "cpu" in str(backend.quantisers_lack(x.device))
