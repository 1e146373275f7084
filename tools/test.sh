#!/usr/bin/env bash
# Checks the whole project: set-up, lint, types, import floors, tests. Arguments go to pytest.
#
#   ./tools/test.sh
#   ./tools/test.sh tests/store      paths are below the project's root
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' tools/test.sh; exit 0 ;;
esac
tools/setup.sh dev

export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1
bin=$PWD/.venv/bin
step() { printf '\n== %s\n' "$*"; "$@"; }

step "$bin/ruff" check .
step "$bin/ruff" format --check .
step "$bin/lint-imports" --no-logo
# Types are checked while the tests run, which wait for processes now and then; both must be well.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$bin/mypy" > "$types" 2>&1 &
# By file: its tests share what they start, a Ray or a server. In the order of collection, so that no long one comes last.
status=0
step "$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
wait $! || status=1
step cat "$types"
exit "$status"
