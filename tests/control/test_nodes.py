"""Several Ray nodes on this machine: are they compared, and do the learner's ranks follow them?"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import mxdist
from mxdist.config import Config
from mxdist.control.nodes import Facts, require_same, require_same_nodes
from mxdist.control.placement import LearnerPlacement, in_words, ranks_together
from mxdist.errors import RunStopped, UserError

CHECKOUT = str(Path(mxdist.__file__).parents[1])
RUN = Path("/shared/run")


def facts(name: str, sees_run: bool = True, **versions: str) -> Facts:
    return {"name": name, "address": f"10.0.0.{name[-1]}", "sees_run": sees_run, "versions": versions}


def test_nodes_that_are_alike_pass() -> None:
    require_same([facts("gpu1", torch="2.13"), facts("gpu2", torch="2.13")], RUN)


def test_every_node_that_differs_is_named_with_what_it_has() -> None:
    nodes = [facts("gpu1", torch="2.13", ray="2.60"), facts("gpu2", torch="2.12"), facts("gpu3", torch="2.13", ray="1")]
    with pytest.raises(UserError) as refused:
        require_same(nodes, RUN)
    assert "node gpu2 (10.0.0.2) has torch 2.12 instead of 2.13, ray missing instead of 2.60" in str(refused.value)
    assert "node gpu3 (10.0.0.3) has ray 1 instead of 2.60" in str(refused.value)


def test_drivers_are_compared_among_the_nodes_that_have_one() -> None:
    nodes = [facts("head1"), facts("gpu2", **{"GPU driver": "570.1"}), facts("gpu3", **{"GPU driver": "580.2"})]
    require_same(nodes[:2], RUN)
    require_same(nodes[1::-1], RUN)
    with pytest.raises(UserError, match=r"gpu3 .* GPU driver 580\.2 instead of 570\.1"):
        require_same(nodes, RUN)


def test_a_node_without_the_shared_file_system_is_named() -> None:
    with pytest.raises(UserError, match=r"node gpu2 \(10\.0\.0\.2\) cannot see the run directory /shared/run"):
        require_same([facts("gpu1"), facts("gpu2", sees_run=False)], RUN)


def test_ranks_of_one_node_are_shown_together() -> None:
    assert in_words(["a", "a", "b", "b", "b", "c"]) == "ranks 0-1 on a, ranks 2-4 on b, rank 5 on c"


@pytest.mark.parametrize(
    ("tensor", "expert", "together"), [(1, 1, 1), (1, 8, 8), (4, 1, 4), (2, 8, 8), (8, 2, 8), (2, 3, 6)]
)
def test_whole_tensor_and_expert_groups_stay_together(tensor: int, expert: int, together: int) -> None:
    learner = Config().learner.model_copy(update={"tensor_parallel": tensor, "expert_parallel": expert})
    assert ranks_together(learner) == together


@pytest.fixture(scope="module")
def other_code(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkout that differs in one comment."""
    root = tmp_path_factory.mktemp("other")
    shutil.copytree(Path(CHECKOUT) / "mxdist", root / "mxdist", ignore=shutil.ignore_patterns("__pycache__"))
    with open(root / "mxdist" / "seeds.py", "a") as stream:
        stream.write("# edited on one node only\n")
    return str(root)


@pytest.fixture(scope="module")
def cluster(other_code: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without room, a node of 4 CPUs and one of 2; the latter runs other code."""
    directory = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))  # Ray would let every process import from the driver's directory
    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([CHECKOUT, before])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    made.add_node(num_cpus=4, **small)
    made.add_node(num_cpus=2, env_vars={"PYTHONPATH": other_code}, **small)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
    os.environ["PYTHONPATH"] = before
    os.chdir(directory)


def learner(ranks: int, expert_parallel: int) -> Config:
    section = {"ranks": ranks, "expert_parallel": expert_parallel, "cpus_per_rank": 1}
    return Config.model_validate(
        {"learner": section, "model": {"num_experts": 24}, "algorithm": {"name": "grpo", "prompts_per_step": ranks * 4}}
    )


def test_a_node_with_other_code_stops_the_start(cluster: Cluster, tmp_path: Path) -> None:
    assert len(cluster.list_all_nodes()) == 3
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=r"^node \S+ \(\S+\) has code \S+ instead of [^,;]*: install the same"):
        require_same_nodes(Config(), tmp_path)


def test_groups_fill_nodes_and_those_without_room_wait_for_a_node_to_join(cluster: Cluster) -> None:
    notes: list[str] = []
    placement = LearnerPlacement(learner(6, 2), notes.append)
    placement.reserve()
    nodes = [_node_of(place) for place in placement.places]
    assert nodes[0:2] + nodes[2:4] + nodes[4:6] == sorted(nodes, key=nodes.index)
    assert sorted(nodes.count(node) for node in set(nodes)) == [2, 4]
    assert len(notes) == 1
    placement.reserve()  # possible only because the first reservation is given back
    with pytest.raises(RunStopped, match="find no room"):
        LearnerPlacement(learner(6, 2), notes.append, patience=1, places=placement.places).reserve()
    later = LearnerPlacement(learner(4, 2), notes.append, patience=60)
    with ThreadPoolExecutor(1) as thread:
        reserved = thread.submit(later.reserve)
        fresh = cluster.add_node(num_cpus=4, object_store_memory=80 << 20)
        reserved.result()
    assert {_node_of(place) for place in later.places} == {fresh.node_id}


def test_a_group_larger_than_any_node_is_refused_with_what_there_is(cluster: Cluster) -> None:
    assert cluster
    with pytest.raises(UserError, match=r"keep 8 ranks on one node, which takes 8 CPUs; no node has them: .*4 CPUs"):
        LearnerPlacement(learner(8, 8), print).reserve()


def _node_of(place: object) -> str:
    return next(iter(ray.util.placement_group_table(place.placement_group)["bundles_to_node_id"].values()))  # type: ignore[attr-defined]
