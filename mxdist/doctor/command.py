"""``mxdist doctor [CONFIG]``: ask everything, show it, and say by the exit code whether it would start."""

import os
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from mxdist.config import Config, load_config
from mxdist.doctor import devices, inputs, machine, versions
from mxdist.doctor.collective import check_all_reduce
from mxdist.doctor.findings import Finding, failure, ok, warning
from mxdist.doctor.fit import Device, Fit, counted, fit, named_gpu
from mxdist.doctor.memory import engine_memory, kv_bytes_per_token, learner_memory
from mxdist.doctor.report import Estimate, as_json, show
from mxdist.errors import UserError
from mxdist.model.recipes import model_recipes

READY, NOT_READY = 0, 1
MOST_RANKS = 8  # of the trial all-reduce


def doctor(path: Path | None, settings: Sequence[str], gpu: str | None, json_wanted: bool) -> int:
    """Look at this machine and, if given, at a configuration; print what was found.

    Args:
        gpu: a name of ``fit.GPUS``, to ask about a machine that is not this one: then only what does not depend on this
            machine is looked at.
    Returns:
        0 when nothing would fail, else 1.
    """
    if gpu is not None and path is None:
        raise UserError(f"--gpu={gpu} asks about the memory of a configuration; name the CONFIG before it")
    config, findings = _load(path, settings)
    gpus = devices.local_gpus()
    estimate = None
    if config is not None:
        estimate = _estimate(config, gpu, gpus)
        findings += [_memory_finding(estimate.fit), *_kv_finding(config, estimate.kv_tokens)]
    if gpu is None:
        findings += _machine(config, gpus)
    if json_wanted:
        print(as_json(findings, estimate))
    else:
        show(findings, estimate, sys.stdout, shutil.get_terminal_size((100, 24)).columns, here=gpu is None)
    return NOT_READY if any(finding.status == "would fail" for finding in findings) else READY


def _load(path: Path | None, settings: Sequence[str]) -> tuple[Config | None, list[Finding]]:
    if path is None:
        return None, []
    try:
        config = load_config(path, settings)
        model_recipes(config)
    except UserError as error:
        return None, [failure("configuration", str(error), "mend it; what depends on it was not looked at")]
    learner = config.learner
    layout = (
        f"{counted(learner.ranks, 'learner rank')}: tensor {learner.tensor_parallel} x "
        f"pipeline {learner.pipeline_parallel} x data {config.data_parallel}, expert {learner.expert_parallel}; "
        f"{counted(config.rollout.workers, 'rollout engine')}"
    )
    found = [ok("configuration", f"{path}, recipe {config.recipe}"), ok("layout", layout)]
    if config.sync.update == "in_flight":
        timing = "sync.update=in_flight: which version of the weights draws a token depends on timing"
        found.append(warning("repeatability", timing, "set sync.update=drained where a run has to be repeated exactly"))
    return config, found


def _estimate(config: Config, gpu: str | None, gpus: Sequence[devices.Gpu]) -> Estimate:
    device = _device(config, gpu, gpus)
    processes = [*learner_memory(config, device.on_gpu), engine_memory(config, device.on_gpu)]
    return Estimate.of(config, processes, fit(config, device))


def _device(config: Config, gpu: str | None, gpus: Sequence[devices.Gpu]) -> Device:
    """The named GPU, a GPU of this machine, or its host memory when the run asks for no GPU."""
    if gpu is not None:
        return named_gpu(gpu)
    if gpus and config.learner.gpus_per_rank:
        return Device(gpus[0].name, gpus[0].mib * 2**20)
    return Device("this machine's memory", psutil.virtual_memory().available, on_gpu=False)


def _memory_finding(found: Fit) -> Finding:
    need, have = found.load.total / 2**30, found.device.bytes / 2**30
    text = f"{found.load.in_words}: about {need:.1f} of {have:.1f} GiB ({found.device.name})"
    return ok("memory", text) if found.fits else failure("memory", text, found.lever or "")


def _kv_finding(config: Config, tokens: int) -> list[Finding]:
    if tokens >= config.context:
        return []
    need = -(-config.context * kv_bytes_per_token(config) // 2**20)
    return [
        failure(
            "rollout.kv_cache_mib",
            f"{config.rollout.kv_cache_mib} has room for {tokens} tokens, less than one sequence of {config.context}",
            f"set it to at least {need}",
        )
    ]


def _machine(config: Config | None, gpus: Sequence[devices.Gpu]) -> list[Finding]:
    on_gpu = bool(gpus)
    found = [*_versions(config, gpus), *_devices(config, gpus), *_limits(config, on_gpu)]
    if config is not None:
        found += [finding for finding in _inputs(config) if finding]
    # Last, because it takes seconds.
    if on_gpu and len(gpus) > 1:
        found.append(check_all_reduce(min(len(gpus), MOST_RANKS), "nccl"))
    found.append(check_all_reduce(2, "gloo"))
    return found


def _versions(config: Config | None, gpus: Sequence[devices.Gpu]) -> Iterator[Finding]:
    there = versions.installed()
    yield versions.check_python(sys.version_info[:2])
    yield from versions.check_packages(there, config.learner.backend if config else "megatron")
    yield from versions.check_pairs(there, versions.torch_wanted_by_vllm(), bool(gpus))
    cuda = versions.cuda_of_torch()
    if gpus and cuda:
        yield versions.check_driver(gpus[0].driver, cuda)


def _devices(config: Config | None, gpus: Sequence[devices.Gpu]) -> Iterator[Finding]:
    if not gpus:
        flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
        yield devices.check_cpu(flags)
        if config is not None and not config.rollout.gpus_per_worker:
            yield devices.check_head_size(config.model.head_dim)
    yield devices.check_gpus(gpus, config)
    for finding in (devices.check_rank_shares(config) if config else None, devices.check_links(devices.local_links())):
        if finding:
            yield finding


def _limits(config: Config | None, on_gpu: bool) -> Iterator[Finding]:
    yield machine.check_shared_memory(shutil.disk_usage("/dev/shm").free, config, on_gpu)
    yield machine.check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    folder = machine.existing_parent((config.run.dir if config else None) or Path("runs"))
    yield machine.check_disk(shutil.disk_usage(folder).free, os.access(folder, os.W_OK), folder, config)
    if config is not None and on_gpu:
        yield machine.check_host_memory(psutil.virtual_memory().available, config)


def _inputs(config: Config) -> Iterator[Finding | None]:
    yield inputs.check_checkpoint(config)
    yield inputs.check_data(config)
    yield inputs.check_run_directory(config)
    yield inputs.check_port(config.learner.port)
    yield inputs.check_cluster(config.cluster.address)
