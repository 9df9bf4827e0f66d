"""How payloads travel: through GPU memory where every process can, and never where one cannot."""

import pytest

from mxdist.errors import UserError
from mxdist.messages import DevicePlace
from mxdist.sync.shared import choose_transport, device_place

ON_GPU, ELSEWHERE = DevicePlace("a", True, None), DevicePlace("b", True, None)
ON_CPU = DevicePlace("a", False, "has no GPU")


def places(engine: DevicePlace) -> dict[str, DevicePlace]:
    return {"learner rank 0": ON_GPU, "rollout worker 0": ON_GPU, "rollout worker 1": engine}


def test_gpus_of_one_machine_share_memory_by_themselves() -> None:
    assert choose_transport("auto", places(ON_GPU), nodes=1, broadcasts=True) == "ipc"
    assert choose_transport("host", places(ON_GPU), nodes=1, broadcasts=True) == "host"


def test_a_cluster_shares_memory_only_when_it_is_told_to() -> None:
    assert choose_transport("auto", places(ON_GPU), nodes=2, broadcasts=False) == "host"
    assert choose_transport("ipc", places(ON_GPU), nodes=2, broadcasts=True) == "ipc"


def test_whole_gpus_of_several_machines_are_sent_broadcasts() -> None:
    for engine in (ON_GPU, ELSEWHERE):
        assert choose_transport("auto", places(engine), nodes=2, broadcasts=True) == "broadcast"
    on_cpus = {"learner rank 0": ON_CPU, "rollout worker 0": ON_CPU}
    assert choose_transport("auto", on_cpus, nodes=2, broadcasts=True) == "host"
    assert choose_transport("broadcast", on_cpus, nodes=1, broadcasts=True) == "broadcast"


def test_a_broadcast_between_a_gpu_and_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="GPUs everywhere or nowhere, but rollout worker 1 has none"):
        choose_transport("broadcast", places(ON_CPU), nodes=1, broadcasts=True)


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [(ON_CPU, "rollout worker 1 has no GPU"), (ELSEWHERE, "rollout worker 1 is not on the host of learner rank 0")],
)
def test_what_cannot_share_goes_through_the_host_and_is_named_when_sharing_is_asked_for(
    engine: DevicePlace, complaint: str
) -> None:
    assert choose_transport("auto", places(engine), nodes=1, broadcasts=True) == "host"
    with pytest.raises(
        UserError, match=f"sync.transport=ipc needs GPUs of one host, but {complaint}; use auto or host"
    ):
        choose_transport("ipc", places(engine), nodes=1, broadcasts=True)


def test_memory_that_an_allocator_strews_over_segments_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_place().cannot_share is None
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "expandable_segments" in str(device_place().cannot_share)
