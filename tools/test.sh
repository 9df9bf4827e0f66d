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
# Fast ones first: a mistake in a formula should not wait for Ray to start. Two lanes, each of which leaves a core idle
# much of the time, run side by side; what has deadlines of seconds or runs the whole system has the machine to itself.
# One thread each: threads of two processes that wait for each other actively would take the cores from one another.
one=(config quant tasks observe aqn gpu rollout)
other=(decomposition cli sync doctor model learner)
alone=(control launch e2e)
for folder in tests/*/; do
    name=$(basename "$folder")
    if [[ $name != __pycache__ && " ${one[*]} ${other[*]} ${alone[*]} " != *" $name "* ]]; then
        echo "tools/test.sh: tests/$name would not be run; give it a place in a lane" >&2
        exit 1
    fi
done
said=$(mktemp)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$said"' EXIT
code=0
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest "${one[@]/#/tests/}" >"$said" 2>&1 &
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest "${other[@]/#/tests/}" || code=$?
wait $! || code=$?
cat "$said"
"$venv/bin/python" -m pytest "${alone[@]/#/tests/}" || code=$?
[ "$code" = 0 ] || echo "tools/test.sh: tests failed; the summaries above say which" >&2
exit "$code"
