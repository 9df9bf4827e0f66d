"""Makes Megatron-core 0.16.1 run on a machine with no GPU, over gloo. The one module that patches Megatron and torch.

``install()`` must run in a learner process before anything else imports Megatron, and never in a process that hosts
vLLM: what it replaces is global to the process. On a machine with a GPU it does nothing but the last four items, of
which the optimizer is left alone where Transformer Engine or Apex brings one.

What it replaces, and why (files relative to megatron/core):

    torch.cuda.current_device, device_count   the device of every new buffer is asked for (layers.py, router.py,
                                              param_and_grad_buffer.py, distrib_optimizer.py, ...)
    torch.cuda.synchronize, empty_cache,      called unconditionally around checkpoints and pipeline transfers
      set_device
    torch.cuda.Stream, Event, stream, ...     token_dispatcher.py opens a side stream for the all-to-all dispatcher
    torch.cuda.*_rng_state, manual_seed       tensor_parallel/random.py forks the CUDA generator around dropout
    torch.Tensor.cuda                         exchange_utils.py, distrib_optimizer.py move counters to the GPU
    torch.Tensor.type                         optimizers ask for 'torch.cuda.FloatTensor' by name
    the name torch in the modules of          they create scalars and masks with device="cuda". (torch's extension point
      ``_with_cuda_literals``                 for this, a TorchFunctionMode, costs 10 % of every forward and backward
                                              pass and holds for one thread only.)
    random._get/_set_cuda_rng_state           the same generator, reached through torch._C
    token_dispatcher.maybe_move_tensor_to_cpu the split sizes of an all-to-all must be numbers, and a tensor that is on
                                              the CPU already is passed on as it is
    optimizer.Adam                            see ``GroupStepAdam``; wherever torch's would be used, on a GPU as well
    torch.compile, while Megatron is imported small functions are compiled with a C++ compiler at their first call, and
                                              importing the compiler doubles the start-up time; on a GPU as well,
                                              where the compiled functions are none that this project's layers call
    moe_utils.te_general_gemm                 an upstream defect: without Transformer Engine the router uses a name
                                              that is not defined (a NameError), on a GPU as well
    filesystem_async._results_queue           to hand one result from a forked writer to its parent, every rank would
                                              start a manager process: 300 MiB and 3 seconds, and it outlives a learner
                                              that is killed
"""

import contextlib
import os
import pickle
import queue
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.adamw import adamw

_installed = False


def install() -> None:
    """Import Megatron-core and make it usable here. Safe to call again."""
    global _installed
    if _installed:
        return
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        _replace_cuda_runtime()
    with _without_compile():
        _import_megatron()
        if not on_gpu:
            _replace_in_megatron()
    _replace_torch_optimizer()
    _define_missing_name()
    _keep_results_of_writing_here()
    _installed = True


class NoStream:
    """Stands for a CUDA stream, event or stream context: every method does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., "NoStream"]:
        return lambda *args, **kwargs: self  # noqa: ARG005

    def __enter__(self) -> "NoStream":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoStream)

    __hash__ = object.__hash__


class HostTorch(types.ModuleType):
    """The module torch, except that what is created on "cuda" is created on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("empty_like", "ones", "tensor", "zeros"):
            setattr(self, name, _on_host(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


class ForkedResult:
    """A queue of at most one item, through memory that a process shares with those it forks later.

    Unlike a pipe it takes an item of any size before anyone reads it.
    """

    def __init__(self) -> None:
        self._memory = open(os.memfd_create("mxdist_result"), "w+b")  # noqa: SIM115  (as long as the process)

    def put(self, item: object) -> None:
        self._memory.seek(0)
        self._memory.truncate()
        pickle.dump(item, self._memory)
        self._memory.flush()

    def get_nowait(self) -> Any:
        self._memory.seek(0)
        try:
            return pickle.load(self._memory)  # from a process of our own
        except EOFError:
            raise queue.Empty from None
        finally:
            self._memory.seek(0)
            self._memory.truncate()


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW that keeps its step count in the parameter group, as the GPU optimizers that Megatron expects do.

    With torch's own AdamW, whose step is a tensor of every parameter, Megatron's distributed optimizer cannot save a
    fresh state, cannot load a fully reshardable one, and gives all parameters one shared step tensor on loading, which
    each of them then increments.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay is implemented; set adam_w_mode=True")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param].update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
            states = [self.state[param] for param in params]
            done = int(group.get("step", 0))
            steps = torch.full((len(params),), float(done), device=params[0].device)  # where the fused kernel wants it
            adamw(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                list(steps.unbind()),
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
            group["step"] = done + 1


def _returning(value: object) -> Callable[..., Any]:
    """A new function each time: torch._dynamo refuses one function under two names of torch.cuda."""
    return lambda *args, **kwargs: value  # noqa: ARG005


def _replace_cuda_runtime() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = _returning("cpu")
    cuda.device_count = _returning(1)
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, _returning(None))
    cuda.Stream = cuda.Event = NoStream
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, _returning(NoStream()))
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # noqa: ARG005
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # noqa: ARG005
    cuda.manual_seed = torch.default_generator.manual_seed
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self  # noqa: ARG005
    own_type = tensor.type

    def type_as_on_a_gpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = own_type(self, *args, **kwargs)
        if isinstance(name, str) and not name.startswith("torch.cuda."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    tensor.type = type_as_on_a_gpu


@contextlib.contextmanager
def _without_compile() -> Iterator[None]:
    compiler = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else lambda inner: inner  # type: ignore  # noqa: ARG005
    try:
        yield
    finally:
        torch.compile = compiler


def _import_megatron() -> None:
    """All that the learner needs, with nothing compiled."""
    from megatron.core import jit
    from megatron.core.models.gpt import gpt_model  # noqa: F401

    jit.disable_jit_fuser()  # for modules imported later


def _replace_in_megatron() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    for module in _with_cuda_literals():
        module.torch = HostTorch()
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # noqa: ARG005
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # noqa: ARG005

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: ARG001
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _replace_torch_optimizer() -> None:
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        megatron_optimizer.Adam = distrib_optimizer.Adam = GroupStepAdam
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _with_cuda_literals() -> list[Any]:
    from megatron.core import utils
    from megatron.core.dist_checkpointing.strategies import state_dict_saver
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer import utils as transformer_utils

    return [clip_grads, optimizer, schedules, state_dict_saver, transformer_utils, utils]


def _define_missing_name() -> None:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _keep_results_of_writing_here() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = ForkedResult()
