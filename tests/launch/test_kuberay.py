"""launch/kuberay.yaml as Ray's own reader of such files understands it, and against the keys that a RayJob may have.

The keys are those of the custom resource definition of ray.io/v1 (KubeRay 1.4 and newer). The file was also validated
against that whole definition, which is 1.4 MB and not kept here.
"""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

ROOT = Path(__file__).parents[2]

JOB_KEYS = {
    *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint"),
    *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata"),
    *("preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode"),
    *("submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished"),
}
CLUSTER_KEYS = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec"),
    *("headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs"),
}
WORKER_KEYS = {
    *("groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams"),
    *("replicas", "resources", "scaleStrategy", "suspend", "template"),
}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((ROOT / "launch" / "kuberay.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", "RayJob"]
    assert documents[1]["apiVersion"] == "ray.io/v1"
    return documents[1]["spec"]


def test_every_key_is_one_that_kuberay_knows(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    assert set(job) <= JOB_KEYS
    assert set(cluster) <= CLUSTER_KEYS
    assert all(set(group) <= WORKER_KEYS for group in cluster["workerGroupSpecs"])


def test_ray_reads_a_head_without_gpus_and_workers_that_hold_the_layout(job: dict[str, Any]) -> None:
    resource = {"metadata": {"name": "mxdist", "namespace": "default"}, "spec": job["rayClusterSpec"]}
    nodes = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    assert nodes["headgroup"]["resources"]["GPU"] == 0
    worker = nodes["gpu"]
    settings = dict(word.split("=") for word in shlex.split(job["entrypoint"]) if "=" in word)
    wanted = sum(
        int(settings[count]) * float(settings[each])
        for count, each in (
            ("learner.ranks", "learner.gpus_per_rank"),
            ("rollout.workers", "rollout.gpus_per_worker"),
        )
    )
    assert worker["min_workers"] * worker["resources"]["GPU"] == wanted


def test_the_entrypoint_and_the_probes_name_files_of_the_image(job: dict[str, Any]) -> None:
    words = shlex.split(job["entrypoint"])
    for group in (job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        words += container["livenessProbe"]["exec"]["command"]
    named = [word for word in words if word.startswith("/opt/mxdist/")]
    assert len(named) == 4
    assert all((ROOT / word.removeprefix("/opt/mxdist/")).is_file() for word in named)


def test_head_and_workers_share_the_volume_and_have_shared_memory(job: dict[str, Any]) -> None:
    groups = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    for group in groups:
        spec = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]} == {
            "shared": "/shared",
            "shm": "/dev/shm",
        }
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == "mxdist-shared"
        assert spec["securityContext"]["runAsNonRoot"]


def test_the_version_of_ray_is_the_locked_one(job: dict[str, Any]) -> None:
    lock = (ROOT / "launch" / "locks" / "cpu.txt").read_text().splitlines()
    assert f"ray=={job['rayClusterSpec']['rayVersion']}" in lock
