#!/usr/bin/env bash
# Makes the project's virtual environment (.venv) with the versions of tools/constraints.txt; does nothing if it is there.
# tools/quickstart.sh, tools/test.sh and tools/downstream.sh run it first.
#
#   ./tools/setup.sh          what the jobs need
#   ./tools/setup.sh dev      and what the tests need
#
# PyTorch has several builds of one version, and PyPI has one of them, on Linux the one with CUDA. The first that works:
#   1. without a GPU: the CPU build, if pip's own sources (index, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) offer it
#   2. `uv pip install --torch-backend`, which knows PyTorch's indexes: cpu; with a GPU auto, the build for its driver
#   3. the plain version from pip's own sources
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
    "" | dev) extras=${1:-} ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) printf 'set-up failed: unknown argument "%s". Usage: tools/setup.sh [dev]\n' "$1" >&2; exit 2 ;;
esac
log=$PWD/.venv/setup.log
say() { printf '\n== %s\n' "$*"; }
fail() { printf '\nset-up failed: %s\n' "$*" >&2; exit 1; }
# Runs a command with its output in the log; on a failure of the set-up the end of the log is shown, see fail_with_log.
logged() { printf '\n$ %s\n' "$*" >> "$log"; "$@" >> "$log" 2>&1; }
fail_with_log() { tail -n 15 "$log" >&2; fail "$*
The lines above are the end of the log, $log"; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; }

# Prints the path of the first Python on PATH that is new enough.
find_python() {
    local name old=
    for name in python3.11 python3.12 python3.13 python3; do
        command -v "$name" > /dev/null || continue
        if new_enough "$name"; then
            command -v "$name"
            return
        fi
        old="${old:+$old, }$(command -v "$name") is $("$name" --version 2>&1 || true)"
    done
    fail "Python 3.11 or newer is needed, and PATH has ${old:-no Python at all: no python3.11, python3.12, python3.13 or python3}.
Install one, for example \"apt install python3 python3-venv\" (Debian 12, Ubuntu 24.04 or newer), \"brew install python@3.12\"
(macOS) or \"conda create -n py312 python=3.12\" and \"conda activate py312\"; then start again."
}

make_environment() {
    local python output
    python=$(find_python) || exit 1
    say "making the virtual environment .venv with $python"
    if ! output=$("$python" -m venv .venv 2>&1); then
        rm -rf .venv # without ensurepip it has a Python and no pip, and the next start would take it for whole
        fail "$python -m venv .venv ended with:
$output
Python's module venv, or pip for it, is missing. On Debian and Ubuntu: apt install python3-venv; then start again."
    fi
}

# The environment is as good as new while the files that define it, and what was asked for, are unchanged.
wanted=$(cat pyproject.toml tools/constraints.txt tools/setup.sh | cksum | cut -d' ' -f1)
stamp=.venv/.neurostorm-$wanted
if [ -e "$stamp" ] && { [ -z "$extras" ] || [ -e "$stamp-$extras" ]; }; then
    say "environment .venv is ready"
    exit 0
fi

[ -x .venv/bin/python ] || make_environment
new_enough .venv/bin/python && .venv/bin/python -m pip --version > /dev/null 2>&1 \
    || fail "$PWD/.venv has no Python 3.11 or newer with pip. Remove it (rm -r $PWD/.venv) and start again."
: > "$log"
# Not compiled: most of the files are never imported, and the others compile then.
pip_install() {
    logged .venv/bin/python -m pip install --no-compile --disable-pip-version-check --constraint tools/constraints.txt "$@"
}

# Pips of before 24 spend half a minute on comparing tags of wheels.
pip_install --upgrade pip || say "pip could not be upgraded; going on with the one that is here"

torch=$(grep '^torch==' tools/constraints.txt)
gpu= backend=cpu install=all${extras:+,$extras}
if nvidia-smi > /dev/null 2>&1; then
    gpu=1 backend=auto install=$install,gpu
fi

torch_from_uv() {
    pip_install uv || return
    local uv=(.venv/bin/uv pip install --python .venv/bin/python --constraint tools/constraints.txt --no-progress
        --torch-backend "$backend" "$torch")
    # Where PyTorch's indexes cannot be reached, this says so without minutes of retries.
    UV_HTTP_RETRIES=1 logged "${uv[@]}" --dry-run && logged "${uv[@]}"
}

install_torch() {
    if [ "$(uname -s)" = Linux ]; then # elsewhere there is one build
        if [ -z "$gpu" ]; then
            say "installing $torch+cpu (log: $log)"
            pip_install "$torch+cpu" && return
            say "pip's sources do not have $torch+cpu: trying uv, which knows PyTorch's own"
        else
            say "installing $torch for this GPU's driver with uv (log: $log)"
        fi
        torch_from_uv && return
        say "uv could not install it: taking $torch from pip's sources. From PyPI it comes with CUDA, a download of about 3 GB
   that takes 5 GB of disk; to follow it: tail -f $log"
    else
        say "installing $torch (log: $log)"
    fi
    pip_install "$torch"
}

install_torch || fail_with_log "$torch could not be installed from pip's sources nor with uv."
if [ -n "$gpu" ]; then
    .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >> "$log" 2>&1 \
        || say "warning: nvidia-smi shows a GPU, but the installed PyTorch cannot use it: it is a CPU build, or its CUDA is newer
   than the driver. Jobs will run on the CPU. Update the driver, or install the build of $torch that fits it into .venv"
fi
say "installing neurostorm and what it needs (some minutes the first time; log: $log)"
pip_install --editable ".[$install]" || fail_with_log "pip could not install the project."
touch "$stamp" ${extras:+"$stamp-$extras"}
say "environment .venv is ready; use it with: source $PWD/.venv/bin/activate"
