"""The estimate held against a device: what shares one, whether it fits, and the one setting that helps most."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from mxdist.config.schema import Config
from mxdist.doctor.memory import ProcessMemory, engine_memory, learner_memory

GIB = 2**30

GPUS = {
    "A100-80": 79.15,
    "H100": 79.11,
    "H200": 139.8,
    "B200": 178.4,
}
"""GiB that the driver reports of each; vendors name the powers of ten (80, 80, 141 and 192 GB)."""

USABLE = 0.95
"""Of a device: the rest goes to fragmentation."""

PYTHON = {"learner rank": 512 * 2**20, "rollout engine": 768 * 2**20}
"""On a machine without GPUs: a process before it holds any tensor, measured."""


def counted(count: int, name: str) -> str:
    """As "2 learner ranks, stage 1"."""
    kind, comma, which = name.partition(",")
    return f"{count} {kind}{'s' if count > 1 else ''}{comma}{which}"


@dataclass(frozen=True)
class Device:
    """Something with memory that processes share."""

    name: str
    bytes: int
    on_gpu: bool = True

    @property
    def usable(self) -> int:
        return int(self.bytes * USABLE)


@dataclass(frozen=True)
class Load:
    """What meets on one device."""

    processes: tuple[ProcessMemory, ...]  # with the number of each that meet there as ``count``

    @property
    def total(self) -> int:
        return sum(process.count * process.total for process in self.processes)

    @property
    def in_words(self) -> str:
        return " + ".join(counted(process.count, process.name) for process in self.processes)


@dataclass(frozen=True)
class Fit:
    """The fullest device, and what to do about it when it does not fit."""

    device: Device
    load: Load
    lever: str | None  # one sentence; None when it fits

    @property
    def fits(self) -> bool:
        return self.load.total <= self.device.usable


def named_gpu(name: str) -> Device:
    return Device(name, int(GPUS[name] * GIB))


def fit(config: Config, device: Device) -> Fit:
    """Hold the fullest load of ``config`` against ``device``."""
    load = fullest(config, device.on_gpu)
    fits = load.total <= device.usable
    return Fit(device, load, None if fits else _lever(config, device, load))


def fullest(config: Config, on_gpu: bool) -> Load:
    """The processes that together need the most of one device. Ray packs whatever fractions fit onto one GPU."""
    engine = engine_memory(config, on_gpu)
    stages = learner_memory(config, on_gpu)
    worst = max(stages, key=lambda stage: stage.total)
    if not on_gpu:
        return Load((*(_with_python(stage) for stage in stages), _with_python(engine)))
    rank_share, engine_share = config.learner.gpus_per_rank, config.rollout.gpus_per_worker
    ranks = min(worst.count, int(1 / rank_share + 1e-6)) if 0 < rank_share <= 1 else 1
    beside = _engines(1 - ranks * rank_share, engine_share, config)
    alone = _engines(1, engine_share, config)
    learner, engines = _times(worst, ranks), _times(engine, beside)
    loads = [Load((_times(engine, max(alone, 1)),))]
    if not beside:
        loads.append(Load((learner,)))
    elif config.rollout.sleep:
        loads += [Load((learner, engines.resting)), Load((learner.resting, engines))]
    else:
        loads.append(Load((learner, engines)))
    return max(loads, key=lambda load: load.total)


def _engines(room: float, share: float, config: Config) -> int:
    return min(config.rollout.workers, int(room / share + 1e-6)) if 0 < share <= 1 else 0


def _times(process: ProcessMemory, count: int) -> ProcessMemory:
    return replace(process, count=count)


def _with_python(process: ProcessMemory) -> ProcessMemory:
    kind = "rollout engine" if process.name == "rollout engine" else "learner rank"
    return replace(process, items=process.items | {"Python and libraries": PYTHON[kind]})


def _lever(config: Config, device: Device, load: Load) -> str:
    """Of the changes that a user can make, the first that makes it fit, else the one that saves most."""
    tried: list[tuple[int, str]] = []
    for settings, words in _changes(config):
        changed = _with(config, settings)
        if changed is None:
            continue
        need = fullest(changed, device.on_gpu).total
        if need <= device.usable:
            return f"{words}: then {need / GIB:.1f} GiB, which fits"
        tried.append((need, words))
    need, words = min(tried, default=(load.total, ""))
    biggest = max(load.processes, key=lambda process: process.count * process.total)
    if need > 0.98 * load.total:
        return f"no single setting makes it fit; the most goes to {biggest.largest} of the {biggest.name}"
    return f"{words}: the largest saving of one setting, to {need / GIB:.1f} GiB, and still too much"


def _changes(config: Config) -> Iterator[tuple[dict[str, dict[str, Any]], str]]:
    """Sections with new values, and the same in words; what costs least speed comes first."""
    learner, rollout = config.learner, config.rollout
    budget = learner.micro_batch_tokens
    for size in dict.fromkeys((budget // 2, budget // 4, config.context)):
        if config.context <= size < budget:
            words = f"lower learner.micro_batch_tokens from {budget} to {size}"
            yield {"learner": {"micro_batch_tokens": size}}, words
    if not learner.recompute:
        yield {"learner": {"recompute": True}}, "set learner.recompute=true"
    if 0 < rollout.gpus_per_worker < 1 and 0 < learner.gpus_per_rank < 1 and not rollout.sleep:
        yield {"rollout": {"sleep": True}}, "set rollout.sleep=true"
    half = rollout.kv_cache_mib // 2
    yield {"rollout": {"kv_cache_mib": half}}, f"lower rollout.kv_cache_mib from {rollout.kv_cache_mib} to {half}"
    if 0 < rollout.gpus_per_worker < 1:
        yield (
            {"rollout": {"gpus_per_worker": 1.0}, "learner": {"gpus_per_rank": 1.0}},
            "give every engine a GPU of its own (rollout.gpus_per_worker=1 learner.gpus_per_rank=1)",
        )
    for factor in (2, 4):
        ranks = learner.ranks * factor
        yield {"learner": {"ranks": ranks}}, f"raise learner.ranks to {ranks}"
        if config.model.num_experts:
            expert = learner.expert_parallel * factor
            yield (
                {"learner": {"ranks": max(learner.ranks, expert), "expert_parallel": expert}},
                f"raise learner.expert_parallel to {expert}"
                + (f" and learner.ranks to {expert}" if expert > learner.ranks else ""),
            )
        for key in ("tensor_parallel", "pipeline_parallel"):
            value = getattr(learner, key) * factor
            yield (
                {"learner": {"ranks": ranks, key: value}},
                f"raise learner.{key} to {value} and learner.ranks to {ranks}",
            )


def _with(config: Config, settings: dict[str, dict[str, Any]]) -> Config | None:
    """``config`` with some keys changed; None when the configuration would be refused."""
    values = config.model_dump()
    for section, keys in settings.items():
        values[section] |= keys
    try:
        return Config.model_validate(values)
    except ValidationError:
        return None
