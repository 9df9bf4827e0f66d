"""How the processes of a learner find each other, whatever they compute with."""

import os
import socket
from datetime import timedelta

import torch


def join(rank: int, world_size: int, rendezvous: str, timeout: float) -> None:
    """Make torch's process group of all ranks, and take this rank's GPU where there are any.

    Args:
        rendezvous: "tcp://host:port" of rank 0, the same on every rank.
        timeout: seconds that one collective may take.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=_store(rendezvous, rank, world_size, timedelta(seconds=timeout)),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )


def _store(rendezvous: str, rank: int, world_size: int, timeout: timedelta) -> torch.distributed.TCPStore:
    """Where the ranks find each other. Rank 0 listens on the address of the rendezvous alone; torch would on all."""
    host, _, port = rendezvous.removeprefix("tcp://").rpartition(":")
    listener = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, int(port)), family=family).detach()
    return torch.distributed.TCPStore(host, int(port), world_size, rank == 0, timeout, master_listen_fd=listener)
