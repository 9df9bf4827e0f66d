#!/usr/bin/env bash
# The whole system on one GPU, with every part real: is everything there, and does it run?
#
#   bash tools/gpu_smoke.sh CASE [key=value ...]
#
#   check       versions, devices, and the imports of every process
#   quickstart  20 steps of configs/quickstart.yaml after a shorter warm start, in float32
#   bfloat16    the same in bfloat16
#   kernels     tests that compare the GPU with the reference, and short runs of the system
#   dense       a profile of a dense model of 1.5 B parameters against bf16
#   learner     updates of a dense model of 3 B parameters by recipe, without engines
#   moe         updates of a model with 128 experts over two GPUs by recipe, without engines
#
# SITE: a folder of packages beside the Python's own. OUT: where results go (results/ by default). PYTHON: python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case=${1:-check}
shift || true
export PYTHONPATH=${SITE:+$SITE:}$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export NCCL_NVLS_ENABLE=0 HF_HUB_OFFLINE=1 RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0
python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-results}")
mkdir -p "$out"
runs=$(mktemp -d)
one_gpu=(learner.ranks=1 learner.expert_parallel=1 learner.gpus_per_rank=0.5 rollout.gpus_per_worker=0.5
    rollout.kv_cache_mib=1024 deadlines.start=580)

# keep DIRECTORY NAME: what is worth reading of a run, also of one that failed; with the logs of Ray's processes.
keep() {
    local file
    for file in metrics.jsonl log.txt profile.json profile.txt; do
        [ ! -e "$1/$file" ] || cp "$1/$file" "$out/$2_$file"
    done
    tail -n 60 /tmp/ray/session_latest/logs/worker-*.err >"$out/$2_ray_errors.txt" 2>/dev/null || true
}

train() {
    local name=$1 status=0
    shift
    "$python" -m mxdist train configs/quickstart.yaml "${one_gpu[@]}" warm_start.steps=100 run.steps=20 \
        run.checkpoint_every=0 run.dir="$runs/$name" "$@" || status=$?
    keep "$runs/$name" "$name"
    return "$status"
}

case $case in
check)
    nvidia-smi --query-gpu=name,memory.used,memory.total,driver_version --format=csv
    df -h /dev/shm /tmp | cat
    "$python" - <<'CHECK'
import importlib, os, time
os.environ.update(VLLM_LOGGING_LEVEL="ERROR")
for name in ("torch", "triton", "transformers", "ray", "megatron.core", "pydantic", "typer", "math_verify", "vllm",
             "mxdist.control.app", "mxdist.learner.worker", "mxdist.rollout.vllm_plugin"):
    started = time.time()
    module = importlib.import_module(name)
    print(f"{name:28} {getattr(module, '__version__', '')!s:18} {time.time() - started:5.1f} s", flush=True)
import torch
print("CUDA", torch.version.cuda, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
CHECK
    ;;
quickstart) train quickstart "$@" ;;
bfloat16) train bfloat16 model.dtype=bfloat16 "$@" ;;
kernels) "$python" -m pytest -q tests/gpu tests/quant/test_devices.py "$@" ;;
dense)
    status=0
    "$python" -m mxdist profile tools/bench/dense_1.5b.yaml --steps 3 --warmup 1 --out "$runs/dense" "$@" || status=$?
    keep "$runs/dense" dense
    exit "$status"
    ;;
learner) "$python" -m tools.bench.learner tools/bench/dense_3b.yaml --out "$out/learner.json" "$@" ;;
moe) "$python" -m tools.bench.learner tools/bench/moe_ep2.yaml --out "$out/moe.json" "$@" ;;
*)
    sed -n '2,14p' "$0" >&2
    exit 2
    ;;
esac
