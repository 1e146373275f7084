#!/usr/bin/env bash
# Makes the project's virtual environment (.venv) with the versions of tools/constraints.txt; nothing to do if it is there.
# Sourced or run by tools/quickstart.sh and tools/test.sh. Usage: tools/setup.sh [dev]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
say() { printf '\n== %s\n' "$*"; }
fail() { printf '\nset-up failed: %s\n' "$*" >&2; exit 1; }

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and none was found on PATH"
}

# The environment is as good as new while the files that define it, and what was asked for, are unchanged.
wanted=$(cat pyproject.toml tools/constraints.txt tools/setup.sh | cksum | cut -d' ' -f1)
stamp=.venv/.neurostorm-$wanted
if [ -e "$stamp" ] && { [ -z "$extras" ] || [ -e "$stamp-$extras" ]; }; then
    say "environment .venv is ready"
    exit 0
fi

if [ ! -x .venv/bin/python ]; then
    say "making the virtual environment .venv"
    "$(find_python)" -m venv .venv || fail "python -m venv did not work; on Debian and Ubuntu: apt install python3-venv"
fi
# Not compiled: most of the files are never imported, and the others compile then.
pip() { .venv/bin/python -m pip "$@" --no-compile --disable-pip-version-check --quiet; }

# Pips of before 24 spend half a minute on comparing tags of wheels.
pip install --upgrade --constraint tools/constraints.txt pip || say "pip could not be renewed: the one that is here does it"

torch=torch==2.13.0 install=$extras
if nvidia-smi > /dev/null 2>&1; then
    install=${extras:+$extras,}gpu
elif [ "$(uname -s)" = Linux ]; then
    torch+=+cpu
fi
say "installing $torch"
pip install "$torch" || fail "no package source offers $torch.
Without a GPU the CPU build is needed, so that no gigabytes of CUDA come along. Add PyTorch's CPU wheel index (its
address is on PyTorch's page \"Get Started\", platform CPU) to pip, for example as PIP_EXTRA_INDEX_URL, and start again."
say "installing neurostorm${install:+[$install]} and what it needs (some minutes the first time)"
pip install --constraint tools/constraints.txt --editable ".${install:+[$install]}" \
    || fail "pip could not install the project; its messages above say why"
touch "$stamp" ${extras:+"$stamp-$extras"}
say "environment .venv is ready"
