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
order=(config quant tasks observe decomposition cli aqn sync gpu doctor model learner rollout control launch e2e)
for folder in tests/*/; do
    name=$(basename "$folder")
    if [[ $name != __pycache__ && " ${order[*]} " != *" $name "* ]]; then
        echo "tools/test.sh: tests/$name would not be run; give it a place in the order" >&2
        exit 1
    fi
done
exec "$venv/bin/python" -m pytest "${order[@]/#/tests/}"
