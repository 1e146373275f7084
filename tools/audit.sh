#!/usr/bin/env bash
# Known vulnerabilities of the pinned packages, from the public database (needs the network). Not a part of CI: its
# answer changes without any change of ours. pip-audit is no dependency; install it elsewhere, `pipx install pip-audit`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v pip-audit > /dev/null || { echo "pip-audit is not installed: pipx install pip-audit" >&2; exit 2; }
exec pip-audit --requirement tools/constraints.txt --no-deps --disable-pip "$@"
