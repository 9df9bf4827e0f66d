#!/usr/bin/env bash
# What slurm.sbatch and kuberay.yaml start, once or after an interruption: trains, or resumes what RUN_DIR holds.
#
#   bash launch/train_or_resume.sh CONFIG RUN_DIR [key=value ...]
#
# Nothing to edit. RUN_DIR has to be on a file system that every node mounts. It ends as mxdist does (exit codes: README),
# but with code 75 when SIGTERM asked it to stop before the run was done: start it again, and the run goes on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

[ $# -ge 2 ] || fail "give a configuration and a run directory: launch/train_or_resume.sh CONFIG RUN_DIR"
config=$1 run_dir=$2
shift 2
command=(train "$config" "run.dir=$run_dir")
if [ -e "$run_dir/config.yaml" ]; then
    command=(resume "$run_dir")
fi
asked= signalled=
python3 -m mxdist "${command[@]}" "$@" &
run=$!
# Slurm signals every process of a step, Kubernetes only the first of a container.
trap 'asked=1 signalled=1; [ -n "${SLURM_STEP_ID:-}" ] || kill -TERM $run 2>/dev/null || true' TERM
trap 'asked=1 signalled=1; kill -TERM $run 2>/dev/null || true' INT # bash lets what it starts with & ignore Ctrl-C
await $run
[ -z "$asked" ] || [ "$code" -eq 0 ] || code=75
exit "$code"
