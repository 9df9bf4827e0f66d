"""Waits until every named node has joined a Ray cluster, and names those that have not: slurm.sbatch starts it.

python3 launch/wait_for_nodes.py HEAD:PORT NODE...        JOIN_SECONDS (120) is how long it waits
"""

import logging
import os
import socket
import sys
import time

import ray


def main(address: str, wanted: list[str]) -> str | None:
    """Returns what to complain of."""
    expiry = time.monotonic() + float(os.environ.get("JOIN_SECONDS", "120"))
    while not _joined(address):
        if time.monotonic() > expiry:
            return f"no Ray head came up at {address} on node {wanted[0]}; the job's log has its reason"
        time.sleep(1)
    missing = wanted
    while time.monotonic() < expiry:
        joined = {node["NodeManagerHostname"].split(".")[0] for node in ray.nodes() if node["Alive"]}
        missing = [node for node in wanted if node.split(".")[0] not in joined]
        if not missing:
            return None
        time.sleep(1)
    return f"node {', node '.join(missing)} did not join the Ray head at {address}; the job's log has its reason"


def _joined(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=3).close()  # Ray itself would wait for minutes
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except OSError:  # Ray's ConnectionError too: the head answers before its own node has joined it
        return False
    return True


if __name__ == "__main__":
    if complaint := main(sys.argv[1], sys.argv[2:]):
        sys.exit(f"mxdist: {complaint}")
