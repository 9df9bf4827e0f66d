"""A Ray cluster of simulated nodes in a process of its own: Ray reads its token when it is imported.

Prints the cluster's address. It reads "lose" or "stop": then the node with the rollout worker is lost, or stands still
with all its processes as a host does that hangs, and another comes.
"""

import contextlib
import sys

import psutil
from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    node, stopped = cluster.add_node(num_cpus=8), []
    print(cluster.address, flush=True)
    for fault in sys.stdin:  # the fault first: a run must not end while a node is being started
        if fault.strip() == "lose":
            cluster.remove_node(node, allow_graceful=False)
        else:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            stopped += [raylet, *raylet.children(recursive=True)]
            for process in stopped:
                process.suspend()
        node = cluster.add_node(num_cpus=8)
    for process in stopped:  # else they would never end
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    cluster.shutdown()


if __name__ == "__main__":
    main()
