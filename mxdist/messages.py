"""What crosses a process boundary between controller, rollout workers, reward workers and learner ranks.

Frozen dataclasses of plain Python values and numpy arrays: cheap to send, importable without torch.
"""

import pickle
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Literal

import numpy as np

TensorKind = Literal["mx", "dense"]
BucketKind = Literal["codes", "scales", "bytes", "float32", "bfloat16"]
BUCKET_DTYPES: dict[BucketKind, np.dtype[Any]] = {
    "codes": np.dtype(np.uint8),
    "scales": np.dtype(np.uint8),
    "bytes": np.dtype(np.uint8),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),  # the bit patterns: numpy has no bfloat16
}


@dataclass(frozen=True)
class Prompt:
    """One problem. ``key`` is stable over the whole data set (it seeds the sampling of its answers)."""

    key: str
    tokens: tuple[int, ...]
    reference: str  # the task's gold answer, for the reward


@dataclass(frozen=True)
class Noise:
    """Adaptive quantisation noise for one rollout batch: every rank of every engine draws the same from it."""

    sigma: float  # absolute standard deviation added to norm weights; 0 means clean weights
    seed: int


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample. ``temperature`` 0 is greedy."""

    samples_per_prompt: int
    temperature: float
    max_new_tokens: int
    seed: int  # each sample's own seed is derived from this, the prompt's key and the sample's index


@dataclass(frozen=True)
class RolloutRequest:
    step: int
    prompts: tuple[Prompt, ...]
    sampling: SamplingSettings
    noise: Noise


VersionRuns = tuple[tuple[int, int], ...]
"""(version of the weights, how many tokens it drew), in the order of the tokens."""


@dataclass(frozen=True)
class Sample:
    """One sampled answer."""

    tokens: np.ndarray  # int64 [response]
    logprobs: np.ndarray  # float32 [response], of the sampled tokens under the distribution each was drawn from
    finished: bool  # False when the answer was cut off at max_new_tokens
    drawn_by: VersionRuns = ()  # empty: all by the version of its group


@dataclass(frozen=True)
class Group:
    """All answers to one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    policy_version: int  # of the weights: the oldest that drew a token of it
    sigma: float

    def token_versions(self) -> np.ndarray:
        """int64 [tokens of all samples]: the version that drew each token."""
        runs = [run for s in self.samples for run in s.drawn_by or ((self.policy_version, len(s.tokens)),)]
        versions, counts = zip(*runs, strict=True)
        return np.repeat(np.array(versions, dtype=np.int64), counts)


@dataclass(frozen=True)
class EntropyStatistics:
    """A sum over tokens and their number; statistics of several workers add up to the global mean."""

    total: float = 0.0  # nats
    tokens: int = 0

    def __add__(self, other: "EntropyStatistics") -> "EntropyStatistics":
        return EntropyStatistics(self.total + other.total, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Nats per token; NaN when nothing was counted."""
        return self.total / self.tokens if self.tokens else float("nan")


@dataclass(frozen=True)
class ProcessUsage:
    """The most memory that one process has held so far."""

    device: str  # "cpu", or the name of its GPU
    resident_mib: float  # on the host
    gpu_mib: float | None  # allocated through torch on its GPU; None without one


@dataclass(frozen=True)
class RolloutResult:
    groups: tuple[Group, ...]
    entropy: EntropyStatistics  # estimated from the sampled tokens' log-probabilities
    seconds: float
    perturbed_modules: int  # norms whose weights noise changed while these were sampled
    applied_sigma: float  # root mean square of that change; below sigma where the dtype rounds it away
    usage: tuple[ProcessUsage, ...] = ()  # of the workers that took part
    preemptions: int = 0  # times that an answer lost its keys and values for want of room, and they were computed again


@dataclass(frozen=True)
class DevicePlace:
    """Where a process computes."""

    host: str  # a machine, or a container of it
    on_gpu: bool
    cannot_share: str | None  # why no other process can read its GPU's memory, as the end of "it ..."


@dataclass(frozen=True)
class EngineReport:
    """What a rollout engine says of itself once it is up."""

    quantised_modules: tuple[str, ...]  # Hugging Face names of the quantised linears, sorted
    noise_modules: tuple[str, ...]  # norms that adaptive quantisation noise will touch
    bytes_per_quantised_weight: float  # held for an element of the quantised linears, on average; 0 without any
    resident_mib: float
    device: DevicePlace


@dataclass(frozen=True)
class LearnerReport:
    """What one learner rank says of itself once it is built."""

    rank: int
    quantised_modules: tuple[str, ...]  # Hugging Face names of the quantised linears this rank holds, sorted
    parameters: int  # this rank's own
    resident_mib: float
    device: DevicePlace


@dataclass(frozen=True)
class TrainBatch:
    """Sequences to learn from, right-padded. Index t of every [sequences, length] array belongs to token t."""

    tokens: np.ndarray  # int64 [sequences, length]
    response_mask: np.ndarray  # bool [sequences, length], True on tokens the policy produced
    rollout_logprobs: np.ndarray  # float32 [sequences, length], 0 outside the mask
    advantages: np.ndarray  # float32 [sequences]
    weights: np.ndarray  # float32 [sequences], weight of each response token in the objective
    temperature: float = 1.0  # log-probabilities are taken of logits / temperature

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: np.ndarray | slice) -> "TrainBatch":
        return TrainBatch(
            self.tokens[index],
            self.response_mask[index],
            self.rollout_logprobs[index],
            self.advantages[index],
            self.weights[index],
            self.temperature,
        )


@dataclass(frozen=True)
class Mean:
    """A weighted sum and its weight; partial means of ranks and micro-batches add up."""

    total: float
    weight: float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else float("nan")


@dataclass(frozen=True)
class UpdateReport:
    """One learner rank's account of an update: partial means to be added over ranks, then rank-independent values."""

    means: dict[str, Mean]
    entropy: EntropyStatistics
    grad_norm: float
    learning_rate: float
    seconds: dict[str, float]  # by phase
    usage: ProcessUsage


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a weight payload, under its Hugging Face name.

    ``kind`` "mx": parts are the packed MXFP4 arrays (codes, scales, ...), all uint8.
    ``kind`` "dense": one part, "values".
    """

    name: str
    kind: TensorKind
    shape: tuple[int, ...]
    parts: dict[str, np.ndarray]
    checksums: dict[str, int]  # by part, of what the learner computes with


@dataclass(frozen=True)
class PartPlace:
    """Where a part of a tensor lies: contiguous, in row-major order."""

    bucket: int
    offset: int  # bytes, a multiple of 16
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's parts lie, and which of its checksums are sent."""

    name: str
    kind: TensorKind
    shape: tuple[int, ...]
    parts: dict[str, PartPlace]
    checked: tuple[str, ...]  # the parts, and "values" beside them where the learner keeps values of a packed tensor


@dataclass(frozen=True)
class Bucket:
    """A buffer that holds one part of many tensors, one after the other."""

    kind: BucketKind
    nbytes: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """What a learner rank's buckets hold. It stays the same from version to version, so it is pickled once and, where
    it arrives, the same object every time."""

    tensors: tuple[TensorPlace, ...]
    buckets: tuple[Bucket, ...]

    @cached_property
    def pickled(self) -> bytes:
        return pickle.dumps((self.tensors, self.buckets))

    @cached_property
    def checked(self) -> tuple[tuple[str, str], ...]:
        """Tensor and part of each checksum, in the order of a payload's."""
        return tuple((tensor.name, part) for tensor in self.tensors for part in tensor.checked)

    @cached_property
    def nbytes(self) -> int:
        """Of all parts, without what lies between them."""
        widths = [BUCKET_DTYPES[bucket.kind].itemsize for bucket in self.buckets]
        parts = (place for tensor in self.tensors for place in tensor.parts.values())
        return sum(prod(place.shape) * widths[place.bucket] for place in parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _manifest, (self.pickled,)


@lru_cache(maxsize=256)  # ranks of a run
def _manifest(pickled: bytes) -> Manifest:
    found = Manifest(*pickle.loads(pickled))
    found.__dict__["pickled"] = pickled  # as it came, so that it is the same object wherever it goes on to
    return found


@dataclass(frozen=True)
class SharedBuckets:
    """Buckets that stay on the learner's GPU. Other processes of its host may read them there for a while."""

    owner: str  # such as "learner rank 0"
    process: str  # no other process of the run, also none that takes its place, has the same
    handles: tuple[bytes, ...]  # one a bucket, as ``sync.shared`` makes and opens them
    stamp: bytes  # handle of one int64: the version that the buckets hold at present


@dataclass(frozen=True)
class Meeting:
    """Where and when one version of the weights is broadcast; see ``sync.broadcast``."""

    address: str  # "host:port" of the controller's store
    generation: int
    number: int  # no two meetings of a run have the same
    receivers: int  # processes of all engines
    arrival: float  # seconds within which all must have come
    transfer: float  # seconds that a bucket may take then


Transport = Literal["host", "delta", "ipc"] | Meeting
"""How the payloads of one version travel; a meeting: they are broadcast there."""


@dataclass(frozen=True)
class BroadcastBuckets:
    """Buckets that a learner rank broadcasts."""

    owner: str  # such as "learner rank 0"
    meeting: Meeting


@dataclass(frozen=True)
class ChangedBlocks:
    """What differs in a rank's buckets from an earlier version of them; see ``sync.changes``."""

    base: str  # ``WeightPayload.key`` of that version
    places: tuple[np.ndarray | None, ...]  # of each bucket, int32 [changed]: the numbers of its blocks; None: all
    blocks: tuple[np.ndarray, ...]  # uint8 [changed, 16]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.places, *self.blocks) if array is not None)


@dataclass(frozen=True)
class WeightPayload:
    """The tensors one learner rank owns; the payloads of all ranks together are the whole model."""

    version: int
    recipes: dict[str, object]  # ModelRecipes.to_dict(); an engine with others refuses the payload
    manifest: Manifest = field(repr=False)
    checksums: np.ndarray = field(repr=False)  # uint64 [len(manifest.checked)], of what the learner computes with
    # Arrays are uint8 [nbytes] each.
    buckets: tuple[np.ndarray, ...] | ChangedBlocks | SharedBuckets | BroadcastBuckets = field(repr=False)
    seconds: float = 0.0  # that the rank took to make it
    key: str = ""  # names these bytes, in the whole run, where later payloads may say what changed since; else empty

    @property
    def nbytes(self) -> int:
        """That have to travel."""
        return self.buckets.nbytes if isinstance(self.buckets, ChangedBlocks) else self.manifest.nbytes

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Tensor by tensor, on the memory of the buckets. ValueError when those are not all here."""
        if not isinstance(self.buckets, tuple):
            raise ValueError(f"the buckets are not in the payload, but only {type(self.buckets).__name__}")
        sums = iter(self.checksums.tolist())
        dtypes = [BUCKET_DTYPES[bucket.kind] for bucket in self.manifest.buckets]
        entries = []
        for tensor in self.manifest.tensors:
            parts = {
                part: np.ndarray(place.shape, dtypes[place.bucket], self.buckets[place.bucket], place.offset)
                for part, place in tensor.parts.items()
            }
            checksums = {part: next(sums) for part in tensor.checked}
            entries.append(TensorEntry(tensor.name, tensor.kind, tensor.shape, parts, checksums))
        return tuple(entries)
