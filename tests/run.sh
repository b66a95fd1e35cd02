#!/usr/bin/env bash
# Lint, types and the test suite, in the quickstart's environment. Arguments go to pytest: `bash tests/run.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh dev
ruff check .
ruff format --check .
[ $# -gt 0 ] || set -- -m "not slow"
# Tests mostly wait for processes to start: two at once, each file as a whole, and types beside them, told at the end.
types=$(mktemp)
mypy > "$types" 2>&1 & checking=$!
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@" || failed=$?
wait $checking || { failed=$?; cat "$types"; }
rm "$types"
exit "${failed:-0}"
