#!/usr/bin/env bash
# What slurm.sbatch and kuberay.yaml start, once or after an interruption: trains, or resumes what RUN_DIR holds.
#
#   bash launch/train_or_resume.sh CONFIG RUN_DIR [key=value ...]
#
# Nothing to edit. RUN_DIR has to be on a file system that every node mounts. It ends as mxdist does (exit codes: README).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

[ $# -ge 2 ] || fail "give a configuration and a run directory: launch/train_or_resume.sh CONFIG RUN_DIR"
config=$1 run_dir=$2
shift 2
if [ -e "$run_dir/config.yaml" ]; then
    exec python3 -m mxdist resume "$run_dir" "$@"
fi
exec python3 -m mxdist train "$config" "run.dir=$run_dir" "$@"
