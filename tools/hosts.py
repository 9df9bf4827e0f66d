"""Several hosts on one Linux machine, made of kernel namespaces, to try a cluster for real. Needs root.

    python -m tools.hosts                 # three hosts, Ray across them, three training steps
    python -m tools.hosts --cut           # the same, but the cable of a learner's node is pulled: it stops and says why
    python -m tools.hosts --cut --spare   # the same, but the other nodes have room for its ranks: it recovers

Each host has its own network (one address on a switch), host name, processes, /dev/shm and Ray session folder; they
share the file system, as nodes do that mount the same volume. Nothing exists in the machine's own network, and the
kernel removes hosts and cables when the processes that hold them end, however they end.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
NETWORK = "10.77.0"
SWITCH = "bridge0"
RAY_PORT = 6379

UNSHARE = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork")

# What runs first in a host, and as long as it lives. $1 name, $2 folder of its own.
INIT = """
set -e
hostname "$1"
mkdir -p "$2/ray" /tmp/ray
mount --bind "$2/ray" /tmp/ray
mount -t tmpfs -o size=400m shm /dev/shm
printf '127.0.0.1 localhost\\n' > "$2/hosts"
cat "$2/peers" >> "$2/hosts"
mount --bind "$2/hosts" /etc/hosts
ip link set lo up
touch "$2/up"
exec sleep infinity
"""


@dataclass(frozen=True)
class Host:
    """One of the hosts. Commands in it see only its network, its processes and the shared files."""

    name: str
    address: str
    pid: int  # of its first process, seen from outside
    folder: Path

    @property
    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--net", "--pid"]

    def popen(
        self, command: Sequence[str], log: Path | None = None, environment: dict[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """Start a command; output goes to ``log``, or to a pipe."""
        stream = open(log, "w") if log else subprocess.PIPE  # noqa: SIM115
        return subprocess.Popen(
            [*self._enter, "env", f"--chdir={ROOT}", *command],
            env=_environment() | (environment or {}),
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, command: Sequence[str], timeout: float = 120, environment: dict[str, str] | None = None
    ) -> tuple[int, str]:
        """Run a command to its end. Returns exit code and output."""
        process = self.popen(command, environment=environment)
        try:
            out, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, out


@dataclass
class Network:
    """All hosts, and the switch they are plugged into."""

    hosts: list[Host]
    _switch: int  # process that holds its network

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    def cut(self, name: str) -> None:
        """Pull the cable of one host. Its processes go on, and reach nobody."""
        _ip(self._switch, "link", "set", f"to-{name}", "down")


def why_not() -> str | None:
    """Why this machine cannot hold such hosts, or None."""
    missing = [program for program in ("ip", "nsenter", "unshare", "setpriv") if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(
        [*UNSHARE, "ip", "link", "add", SWITCH, "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"the kernel refuses namespaces: {tried.stderr.strip()}"


@contextmanager
def network(names: Sequence[str], folder: Path) -> Iterator[Network]:
    """Hosts of these names, with addresses 10.77.0.1, .2, ...; gone at the end with everything that runs in them."""
    addresses = {name: f"{NETWORK}.{index}" for index, name in enumerate(names, start=1)}
    with ExitStack() as stack:
        switch = _hold(stack, ["unshare", "--net", "sleep", "infinity"])
        _wait_until(lambda: os.readlink(f"/proc/{switch}/ns/net") != os.readlink("/proc/self/ns/net"))
        _ip(switch, "link", "add", SWITCH, "type", "bridge")
        _ip(switch, "link", "set", SWITCH, "up")
        hosts = []
        for name, address in addresses.items():
            own = folder / name
            own.mkdir(parents=True)
            (own / "peers").write_text("".join(f"{peer} {other}\n" for other, peer in addresses.items()))
            outer = _hold(
                stack,
                [*UNSHARE, "--kill-child", "--mount-proc", "bash", "-c", INIT, "host", name, str(own)],
            )
            _wait_until((own / "up").exists)
            pid = int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])
            _ip(switch, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
            _ip(switch, "link", "set", f"to-{name}", "master", SWITCH, "up")
            _ip(pid, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip(pid, "link", "set", "eth0", "up")
            hosts.append(Host(name, address, pid, own))
        yield Network(hosts, switch)


def start_ray(net: Network, cpus: dict[str, int], environment: dict[str, str] | None = None) -> None:
    """Ray across the hosts by launch/ray_head.sh on the first and launch/ray_worker.sh on the others."""
    head, *workers = net.hosts
    small = ["--object-store-memory=100000000", "--num-gpus=0"]
    # With eth0 alone there is no default route to take the head's address from.
    own = {"NODE_ADDRESS": head.address} | (environment or {})
    commands = {head.name: ["bash", "launch/ray_head.sh", f"--num-cpus={cpus[head.name]}", *small]}
    for host in workers:  # which wait for the head
        join = ["bash", "launch/ray_worker.sh", f"{head.address}:{RAY_PORT}", f"--num-cpus={cpus[host.name]}"]
        commands[host.name] = [*join, *small]
    starting = [
        (host, host.popen(commands[host.name], None, own if host is head else environment)) for host in net.hosts
    ]
    for host, process in starting:
        code, (out, _) = 0, process.communicate(timeout=180)
        if process.returncode:  # Ray gives itself 30 seconds, which a busy machine can take
            host.run(["ray", "stop", "--force"])
            code, out = host.run(commands[host.name], 180, own if host is head else environment)
        if code:
            raise RuntimeError(f"{host.name}: {out}")


def _hold(stack: ExitStack, command: list[str]) -> int:
    """Start a process that ends with this one at the latest. Returns its id."""
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], start_new_session=True)

    def end() -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()

    stack.callback(end)
    return process.pid


def _ip(pid: int, *arguments: str) -> None:
    subprocess.run(["nsenter", "--target", str(pid), "--net", "ip", *arguments], check=True)


def _wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    expiry = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > expiry:
            raise TimeoutError("a host did not come up")
        time.sleep(0.02)


def _environment() -> dict[str, str]:
    """That of this process, with the interpreter and the checkout in use."""
    python = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": f"{python}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }


# The quickstart's model with little work. Two expert-parallel ranks fill a node; node1 has the engine.
CPUS = {"node1": 1, "node2": 2, "node3": 2}
SETTINGS = (
    *("cluster.address=auto", "learner.ranks=4", "learner.expert_parallel=2", "learner.cpus_per_rank=1"),
    *("warm_start.steps=2", "algorithm.prompts_per_step=16", "algorithm.samples_per_prompt=4"),
    *("run.steps=3", "run.checkpoint_every=1", "data.eval_problems=32"),
)
# Ray notices within half a minute, instead of a whole one, that a node is gone.
PATIENCE = {
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "2",
}


def train(net: Network, run_dir: Path, cut: bool = False) -> Iterator[str]:
    """launch/train_or_resume.sh on the first host, line by line; at last its exit code.

    ``cut``: when the first step is done, pull the cable of the node of the learner's last ranks.
    """
    last = ""
    command = ["bash", "launch/train_or_resume.sh", "configs/quickstart.yaml", str(run_dir), *SETTINGS]
    process = net.hosts[0].popen(command)
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip()
        if line.startswith("learner rank"):
            last = line.split(" on ")[-1].split()[0]
        if cut and line.startswith("step 1/"):
            yield f"--- pulling the cable of {last}"
            net.cut(last)
            cut = False
    yield f"exit code {process.wait()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut", action="store_true", help="pull the cable of a learner's node after a step")
    parser.add_argument("--spare", action="store_true", help="any two nodes have room for the whole run")
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"hosts: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder, network(list(CPUS), Path(folder)) as net:
        start_ray(net, dict.fromkeys(CPUS, 3) if arguments.spare else CPUS, PATIENCE)
        for line in train(net, Path(folder) / "run", arguments.cut):
            print(line, flush=True)
    return int(line.removeprefix("exit code "))


if __name__ == "__main__":
    sys.exit(main())
