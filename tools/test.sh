#!/usr/bin/env bash
# Linter, type checker and tests, in the environment of the locks cpu and test. Arguments go to pytest, and then only
# pytest runs: bash tools/test.sh tests/quant -k tie
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh" cpu test
cd "$root"
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" -m pytest "$@"
fi
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
# Fast ones first: a mistake in a formula should not wait for Ray to start.
order=(config quant tasks observe decomposition cli aqn sync gpu model learner rollout control launch e2e)
exec "$venv/bin/python" -m pytest "${order[@]/#/tests/}"
