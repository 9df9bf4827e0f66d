"""Imported ahead of a kernel: it runs on the GPU if there is one, otherwise in Triton's interpreter on the CPU."""

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    # Read when a function is decorated: Triton's own when it is imported, the kernels after that. In this process
    # alone: programs that other tests start, vLLM among them, would inherit a variable.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
