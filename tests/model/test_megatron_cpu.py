"""What stands in for CUDA and for the GPU optimizer, and where it stays out."""

import copy
import subprocess
import sys

import pytest
import torch

from mxdist.model.megatron_cpu import GroupStepAdam, HostTorch, NoStream


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_worker_imports_no_megatron_and_patches_nothing() -> None:
    code = """
import sys, mxdist.learner.worker, mxdist.model.megatron_cpu, torch
print("megatron" in sys.modules, torch.cuda.current_device.__module__, torch.cuda.Stream.__module__)
"""
    assert run_python(code) == "False torch.cuda torch.cuda.streams"


INSTALL_AS_ON_A_GPU = """
import warnings; warnings.simplefilter("ignore")
import torch
torch.cuda.is_available = lambda: True
import megatron.core.optimizer
from megatron.core.transformer.moe import moe_utils
from mxdist.model import megatron_cpu
megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = {torch_optimizer}
megatron_cpu.install()
optimizer = megatron.core.optimizer.Adam.__name__
print(torch.cuda.current_device.__module__, hasattr(moe_utils, "te_general_gemm"), optimizer)
"""


def test_on_a_machine_with_a_gpu_install_leaves_cuda_alone_and_replaces_torchs_optimizer() -> None:
    assert run_python(INSTALL_AS_ON_A_GPU.format(torch_optimizer=True)) == "torch.cuda True GroupStepAdam"


def test_the_optimizer_of_transformer_engine_or_apex_is_left_alone() -> None:
    assert run_python(INSTALL_AS_ON_A_GPU.format(torch_optimizer=False)) == "torch.cuda True AdamW"


def test_host_torch_creates_on_the_cpu_what_is_asked_for_on_a_gpu() -> None:
    host = HostTorch()
    assert host.zeros(2, device="cuda").device.type == "cpu"
    assert host.tensor([1.0], dtype=torch.float64, device="cuda:0").dtype == torch.float64
    assert host.empty_like(torch.ones(3), device="cuda").shape == (3,)
    assert host.ones(2, device="meta").device.type == "meta"


def test_host_torch_is_torch_in_everything_else() -> None:
    host = HostTorch()
    assert host.Tensor is torch.Tensor
    assert host.distributed is torch.distributed
    with pytest.raises(AttributeError):
        _ = host.no_such_name


def test_a_stream_can_be_entered_waited_for_and_compared() -> None:
    with NoStream(device="cuda") as stream:
        stream.wait_stream(NoStream()).synchronize()
    assert stream == NoStream()


def test_the_optimizer_is_adamw_with_the_step_kept_in_the_group() -> None:
    ours, theirs = (torch.nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    optimizer = GroupStepAdam(ours.parameters(), **settings)
    reference = torch.optim.AdamW(theirs.parameters(), **settings)
    for _ in range(4):
        x = torch.randn(7, 5)
        for model, steps in ((ours, optimizer), (theirs, reference)):
            steps.zero_grad()
            model(x).square().sum().backward()
            steps.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert optimizer.param_groups[0]["step"] == 4
    assert set(optimizer.state[ours.weight]) == {"exp_avg", "exp_avg_sq"}


def test_the_optimizer_continues_from_its_state() -> None:
    start, gradient = torch.randn(4), torch.randn(4)
    parameters = [start.clone().requires_grad_() for _ in range(2)]
    first, second = (GroupStepAdam([parameter]) for parameter in parameters)
    for parameter in parameters:
        parameter.grad = gradient
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        parameters[1].copy_(parameters[0])
    first.step()
    second.step()
    assert torch.equal(*parameters)


def test_coupled_weight_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="adam_w_mode"):
        GroupStepAdam([torch.zeros(1, requires_grad=True)], adam_w_mode=False)
