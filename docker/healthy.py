"""The containers' health check: exit code 0 if mxdist is there and, where Ray runs, its agent calls the node healthy.

python3 docker/healthy.py [--ray]        --ray: Ray has to run; RAY_AGENT_HTTP_PORT (52365) is its agent's port
"""

import importlib.util
import os
import socket
import sys
from urllib.request import urlopen


def complaint(ray_wanted: bool) -> str | None:
    """What is wrong, or None."""
    if importlib.util.find_spec("mxdist") is None:
        return "mxdist is not installed"
    port = int(os.environ.get("RAY_AGENT_HTTP_PORT", "52365"))
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            return f"Ray's agent does not listen on port {port}" if ray_wanted else None
    try:
        with urlopen(f"http://127.0.0.1:{port}/api/local_raylet_healthz", timeout=5) as answer:
            said = answer.read().decode()
    except OSError as error:
        return f"Ray's agent on port {port} says {error}"
    return None if "success" in said else f"Ray's agent on port {port} says {said}"


if __name__ == "__main__":
    sys.exit(complaint("--ray" in sys.argv))
