#!/usr/bin/env bash
# Installs the CPU environment if need be and trains configs/quickstart.yaml: the whole system, no GPU.
# Further arguments are settings, such as run.seed=1 recipe=bf16.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" cpu
cd "$root"
exec "$venv/bin/mxdist" train configs/quickstart.yaml "$@"
