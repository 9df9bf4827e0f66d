"""The one place that decides how the processes of a run reach each other: address, network interface, ports.

    address     of a process: that of its Ray node (ray start --node-ip-address), or of cluster.interface if set
    interface   the one that carries this address; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name it to the libraries
    ports       the learner's rendezvous: learner.port on the node of rank 0. Ray's own are those of ray start
                (launch/ray_head.sh lists them); gloo, NCCL and the engines take free ones.

What is set in the environment of ``ray start`` on a node goes before what is found here.
"""

import os
import random
import socket
from collections.abc import Mapping

import psutil
import ray

from mxdist.config import Config
from mxdist.errors import UserError

# Out of the range from which Linux gives ports away: until torch listens, nobody else should get the one found free.
FREE_PORTS = range(21_000, 30_000)
LOOPBACK = "127.0.0.1"
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def worker_variables(config: Config) -> dict[str, str]:
    """Environment variables that every process of the run is started with."""
    if config.cluster.address is None:
        return {VARIABLES[0]: "lo"}
    return dict.fromkeys(VARIABLES, config.cluster.interface) if config.cluster.interface else {}


def address(config: Config) -> str:
    """Of the controller, for what other processes ask of it."""
    return LOOPBACK if config.cluster.address is None else ray.util.get_node_ip_address()


def settle_interface() -> None:
    """Name the interface of this process to gloo, NCCL and vLLM, before any of them starts.

    Raises:
        UserError: this node has no such interface, or none with the address that Ray knows it by.
    """
    address = ray.util.get_node_ip_address()
    given = os.environ.get(VARIABLES[0])
    if given and given != "lo":
        address = address_of(given, _addresses())
    for variable in VARIABLES:
        os.environ.setdefault(variable, interface_of(address, _addresses()))
    os.environ.setdefault("VLLM_HOST_IP", address)  # else it asks for the route to an address of the internet


def rendezvous(wanted_port: int) -> str | None:
    """tcp://host:port on this node, with a free port for 0; None when the wanted port is taken."""
    interface = os.environ[VARIABLES[0]]
    # On one machine gloo talks over lo, and the ranks find each other under any of its addresses.
    host = ray.util.get_node_ip_address() if interface == "lo" else address_of(interface, _addresses())
    for port in [wanted_port] if wanted_port else random.SystemRandom().sample(FREE_PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))  # as torch will, on every interface
                return f"tcp://{host}:{port}"
            except OSError:
                continue
    return None


def interface_of(address: str, addresses: Mapping[str, str]) -> str:
    """The interface that has this IPv4 address."""
    for interface, theirs in addresses.items():
        if theirs == address:
            return interface
    raise UserError(
        f"node {socket.gethostname()} is {address} to Ray, but none of its interfaces has that address "
        f"({_listed(addresses)}); start Ray there with --node-ip-address, or set cluster.interface"
    )


def address_of(interface: str, addresses: Mapping[str, str]) -> str:
    """The IPv4 address of an interface; of a list such as NCCL takes ("eth0,eth1") that of the first."""
    name = interface.split(",")[0].lstrip("=")
    if name not in addresses:
        raise UserError(
            f"node {socket.gethostname()} has no network interface {name} with an IPv4 address "
            f"({_listed(addresses)}); change cluster.interface, or GLOO_SOCKET_IFNAME where Ray is started"
        )
    return addresses[name]


def _addresses() -> dict[str, str]:
    """The first IPv4 address of each interface."""
    found: dict[str, str] = {}
    for interface, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                found.setdefault(interface, entry.address)
    return found


def _listed(addresses: Mapping[str, str]) -> str:
    return "it has " + ", ".join(f"{name} {address}" for name, address in addresses.items())
