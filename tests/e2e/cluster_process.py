"""A Ray cluster of simulated nodes in a process of its own: Ray reads its token when it is imported.

Prints the cluster's address; for each line it is sent, the node with the rollout worker is lost and another comes.
"""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    node = cluster.add_node(num_cpus=8)
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.remove_node(node, allow_graceful=False)  # first: a run must not end while a node is being started
        node = cluster.add_node(num_cpus=8)
    cluster.shutdown()


if __name__ == "__main__":
    main()
