"""Buckets that stay on the learner's GPU, read there by engines of the same host through CUDA IPC.

A handle is torch's own (``torch.multiprocessing.reductions``), made once for a buffer that lives as long as its
process. The learner has waited for its GPU before it sends handles, so the event that torch would share beside them is
not opened: opening it may fail where the learner's GPU is not visible to the engine, which does not hinder the memory.
"""

import inspect
import os
import pickle
import socket
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mxdist.errors import ProcessDied, RunStopped, UserError
from mxdist.messages import DevicePlace, SharedBuckets

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def device_place() -> DevicePlace:
    """Where this process computes, and whether it can share a GPU's memory."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    host = f"{socket.gethostname()} {boot}"
    if not torch.cuda.is_available():
        return DevicePlace(host, False, "has no GPU")
    for variable in _ALLOCATOR_VARIABLES:
        if "expandable_segments:True" in os.environ.get(variable, ""):
            return DevicePlace(host, True, f"allocates with {variable}=expandable_segments:True")
    return DevicePlace(host, True, None)


def choose_transport(
    wanted: str, places: Mapping[str, DevicePlace], nodes: int, broadcasts: bool
) -> Literal["host", "delta", "ipc", "broadcast"]:
    """How a run's payloads travel.

    Args:
        wanted: ``sync.transport``.
        places: of all learner ranks and engines, by their names.
        nodes: of the cluster.
        broadcasts: whether the settings allow that, see ``broadcast_lacks``.
    Raises:
        UserError: "ipc" or "broadcast" is wanted, and cannot be.
    """
    if wanted == "host":
        return "host"
    if wanted == "delta":
        return "delta"
    on_gpu = {place.on_gpu for place in places.values()}
    if wanted == "broadcast":
        if len(on_gpu) > 1:
            without = next(name for name, place in places.items() if not place.on_gpu)
            raise UserError(
                f"sync.transport=broadcast needs GPUs everywhere or nowhere, but {without} has none; use auto or host"
            )
        return "broadcast"
    (first, there), *others = places.items()
    obstacles = [f"{name} {place.cannot_share}" for name, place in places.items() if place.cannot_share]
    obstacles += [f"{name} is not on the host of {first}" for name, place in others if place.host != there.host]
    if obstacles and wanted == "ipc":
        raise UserError(f"sync.transport=ipc needs GPUs of one host, but {obstacles[0]}; use auto or host")
    # On a cluster, a process that takes another's place may come to another node.
    if wanted == "ipc" or (not obstacles and nodes == 1):
        return "ipc"
    return "broadcast" if nodes > 1 and on_gpu == {True} and broadcasts else "host"


def handle_of(buffer: Tensor) -> bytes:
    """What another process opens the buffer with. On a GPU; it must live as long as any process reads it."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(buffer)
    return pickle.dumps(arguments)


def open_handle(handle: bytes, device: int) -> Tensor:
    """The other process's buffer, mapped for GPU ``device`` of this one. RuntimeError when it cannot be."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    names = inspect.signature(rebuild_cuda_tensor).parameters
    arguments = dict(zip(names, pickle.loads(handle), strict=True))
    # It is read from this GPU, whatever its number is to its owner.
    tensor = rebuild_cuda_tensor(**arguments | {"storage_device": device, "event_sync_required": False})
    assert isinstance(tensor, Tensor)
    return tensor


class Probe:
    """A few bytes of a learner's GPU, for engines to try whether they can read it at all."""

    VERSION = 1

    def __init__(self, owner: str) -> None:
        self._stamp = torch.full((1,), self.VERSION, dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        self.shared = SharedBuckets(owner, uuid.uuid4().hex, (), handle_of(self._stamp))


class Mappings:
    """The buffers of other processes that this one has mapped; mapped once, since that takes as long as a copy."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._mapped: dict[tuple[str, bytes], Tensor] = {}  # by process and handle

    def open(self, shared: SharedBuckets, version: int) -> list[Tensor]:
        """The buckets, uint8 each.

        Raises:
            ProcessDied: their owner is gone, or its GPU and this one cannot reach each other.
            RunStopped: their owner has overwritten them since.
        """
        try:
            stamp = int(self._one(shared.process, shared.stamp))
            buckets = [self._one(shared.process, handle) for handle in shared.handles]
        except RuntimeError as error:
            raise ProcessDied(
                f"the weights on the GPU of {shared.owner} cannot be mapped ({str(error).splitlines()[0]}): it is "
                f"gone, or its GPU and the engine's have no peer access, and then set sync.transport=host",
                (shared.owner,),
            ) from error
        if stamp != version:
            raise RunStopped(
                f"an engine came too late for weights version {version} of {shared.owner}, whose buckets now hold "
                f"version {stamp}; set sync.transport=host, which keeps every version until it is loaded"
            )
        return buckets

    def cannot_open(self, probes: Iterable[SharedBuckets]) -> str | None:
        """Why what probes stand for cannot be read here; None when it can."""
        try:
            for shared in probes:
                self.open(shared, Probe.VERSION)
        except (ProcessDied, RunStopped) as error:
            return str(error)
        finally:
            self.keep(())
        return None

    def keep(self, present: Iterable[SharedBuckets]) -> None:
        """Let go of what belongs to processes that are no more."""
        processes = {shared.process for shared in present}
        self._mapped = {key: tensor for key, tensor in self._mapped.items() if key[0] in processes}

    def _one(self, process: str, handle: bytes) -> Tensor:
        key = (process, handle)
        if key not in self._mapped:
            self._mapped[key] = open_handle(handle, self._device)
        return self._mapped[key]
