#!/usr/bin/env bash
# Installs the CPU environment if need be and trains configs/quickstart.yaml: the whole system, no GPU.
# Further arguments are settings, such as run.seed=1 recipe=bf16.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" cpu
exec "$venv/bin/mxdist" train "$root/configs/quickstart.yaml" "$@"
