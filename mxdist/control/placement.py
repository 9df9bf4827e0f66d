"""Where the learner's ranks go: tensor- and expert-parallel groups inside a node, data parallelism across nodes.

Ray places. Ranks that share a tensor- or expert-parallel group exchange activations in every layer; they are asked for
as one placement group that must fit on one node (STRICT_PACK). The groups are then numbered by node, so that
consecutive ranks share one. Megatron-core numbers tensor-parallel neighbours first, then expert-parallel ones, then
data-parallel, then pipeline stages (arXiv 2104.04473), so the outer kinds are those that cross the network.

A rollout engine is on one node: one process, with those that vLLM starts where the engine is divided.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mxdist.config import Config
from mxdist.config.schema import LearnerConfig
from mxdist.control.nodes import alive_nodes, known_nodes, node_name
from mxdist.errors import RunStopped, UserError

Where = PlacementGroupSchedulingStrategy | str
"""Where Ray is to start a process; "DEFAULT": anywhere."""


@dataclass
class LearnerPlacement:
    """The reservation of the learner's ranks. ``reserve`` it again after a failure, on the nodes that are left."""

    config: Config
    note: Callable[[str], None]  # shows a line
    patience: float = 30.0  # seconds, for what an earlier process is about to give back
    places: tuple[PlacementGroupSchedulingStrategy, ...] = ()  # one for each rank
    nodes: tuple[str, ...] = ()  # their names, one for each rank
    _groups: list[PlacementGroup] = field(default_factory=list)
    _seen: dict[str, str] = field(default_factory=dict)  # all nodes there have been: id -> name

    def reserve(self) -> None:
        """Find one place for each rank, giving back the old ones, and say which nodes they are on.

        Raises:
            UserError: no node can hold ranks that belong together, or other jobs hold what is needed.
            RunStopped: the same, for a run that was already under way.
        """
        complaint = RunStopped if self.places else UserError
        self._release()
        section = self.config.learner
        size = ranks_together(section)
        one = {"CPU": section.cpus_per_rank} | ({"GPU": section.gpus_per_rank} if section.gpus_per_rank else {})
        nodes = {node["NodeID"]: node for node in alive_nodes()}
        lost = "".join(f"node {name} is lost; " for node, name in self._seen.items() if node not in nodes)
        self._seen |= {node_id: node_name(node) for node_id, node in nodes.items()}
        if not _has_room(size, one, list(nodes.values())):
            raise complaint(
                f"{lost}learner.tensor_parallel={section.tensor_parallel} and learner.expert_parallel="
                f"{section.expert_parallel} keep {size} ranks on one node, which takes {_wanted(one, size)}; no node "
                f"has them: {_offers(list(nodes.values()))}; lower them, or add a larger node"
            )
        groups = [placement_group([one] * size, strategy="STRICT_PACK") for _ in range(section.ranks // size)]
        self._groups = groups
        expiry = time.monotonic() + self.patience
        if not all(group.wait(max(expiry - time.monotonic(), 0.1)) for group in groups):
            self._release()
            raise complaint(
                f"{lost}the learner's {section.ranks} ranks, {size} at a time on one node with {_wanted(one, size)}, "
                f"find no room within {self.patience:g} s on {_offers(list(nodes.values()))}; lower learner.ranks, "
                f"end what else runs there, or add nodes"
            )
        names = {node["NodeID"]: node_name(node) for node in known_nodes()}  # nodes may have come or gone meanwhile
        by_node = sorted(groups, key=lambda group: list(names).index(_node_of(group)))
        self._seen |= {node_id: names[node_id] for node_id in map(_node_of, groups)}
        self.nodes = tuple(names[_node_of(group)] for group in by_node for _ in range(size))
        self.places = tuple(
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            for group in by_node
            for index in range(size)
        )
        self.note(f"{lost}learner {in_words(self.nodes)}")

    def _release(self) -> None:
        """Give the reservation back; its processes end with it."""
        for group in self._groups:
            remove_placement_group(group)
        self._groups = []


def ranks_together(section: LearnerConfig) -> int:
    """Consecutive ranks that have to share a node: whole tensor-parallel and whole expert-parallel groups."""
    return math.lcm(section.tensor_parallel, section.expert_parallel)


def in_words(nodes: Sequence[str]) -> str:
    """Such as "ranks 0-3 on gpu1 (10.0.0.1), ranks 4-7 on gpu2 (10.0.0.2)"."""
    parts, first = [], 0
    for rank in range(1, len(nodes) + 1):
        if rank == len(nodes) or nodes[rank] != nodes[first]:
            span = f"rank {first}" if rank == first + 1 else f"ranks {first}-{rank - 1}"
            parts.append(f"{span} on {nodes[first]}")
            first = rank
    return ", ".join(parts)


def _has_room(size: int, one: dict[str, float], nodes: list[dict[str, Any]]) -> bool:
    return any(
        all(node["Resources"].get(kind, 0) + 1e-6 >= amount * size for kind, amount in one.items()) for node in nodes
    )


def _wanted(one: dict[str, float], size: int) -> str:
    return " and ".join(f"{amount * size:g} {kind}s" for kind, amount in one.items())


def _offers(nodes: Sequence[dict[str, Any]]) -> str:
    """The nodes with all that they have, busy or not."""
    return ", ".join(
        f"{node_name(node)} with {node['Resources'].get('CPU', 0):g} CPUs and {node['Resources'].get('GPU', 0):g} GPUs"
        for node in nodes
    )


def _node_of(group: PlacementGroup) -> str:
    nodes = set(placement_group_table(group)["bundles_to_node_id"].values())
    assert len(nodes) == 1, f"Ray divided a STRICT_PACK group over {nodes}"
    return nodes.pop()
