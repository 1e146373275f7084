#!/usr/bin/env bash
# From nothing to a pretrained model on this machine: set-up, data, ingest, a local Ray with token authentication,
# `ray job submit -- python jobs/pretrain.py`, and a summary. Started again, it goes on where it was.
#
#   ./tools/quickstart.sh                  a synthetic cohort of 24 subjects
#   ./tools/quickstart.sh --source DIR     your own preprocessed NIfTI files (BIDS derivatives, HCP or plain names)
#   --output DIR     where everything goes (default: outputs/quickstart, or outputs/quickstart-NAME for --source)
#   further arguments go to jobs/pretrain.py, for example --train.epochs 4
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$*"; }
fail() { printf '\nquickstart failed: %s\n' "$*" >&2; exit 1; }

source= output= extra=()
while [ $# -gt 0 ]; do
    case $1 in
        --source) source=${2:?--source needs a folder}; shift 2 ;;
        --output) output=${2:?--output needs a folder}; shift 2 ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) extra+=("$1"); shift ;;
    esac
done
if [ -n "$source" ]; then
    [ -d "$source" ] || fail "--source $source: no such folder"
    source=$(cd "$source" && pwd)
fi
: "${output:=$root/outputs/quickstart${source:+-$(basename "$source")}}"
mkdir -p "$output"
output=$(cd "$output" && pwd)
cd "$root"

tools/setup.sh
bin=$root/.venv/bin
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1

if [ -z "$source" ]; then
    source=$output/cohort
    say "data: a synthetic cohort in $source"
    [ -e "$source/participants.tsv" ] || "$bin/python" tools/make_cohort.py "$source"
fi

say "a local Ray with token authentication, dashboard on loopback"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$output/ray_token
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    (umask 077 && "$bin/python" -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH")
fi
# Free ports for all three, because another Ray of this machine may have the usual ones.
read -r gcs_port dashboard_port client_port < <("$bin/python" - <<'PY'
import socket

sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))
PY
)
# Nothing is left to do for this Ray when the script ends: without this it waits 30 s for work to drain.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
ray_temp=$(mktemp -d /tmp/neurostorm-ray.XXXXXX) # short: Ray's sockets live here, and a socket's path may have 107 bytes
"$bin/ray" start --head --block --node-ip-address 127.0.0.1 --port "$gcs_port" --dashboard-host 127.0.0.1 \
    --dashboard-port "$dashboard_port" --ray-client-server-port "$client_port" --temp-dir "$ray_temp" \
    > "$output/ray.log" 2>&1 &
ray_pid=$!
stop_ray() {
    kill "$ray_pid" 2>/dev/null || true
    wait "$ray_pid" 2>/dev/null || true
    rm -rf "$ray_temp"
}
trap stop_ray EXIT
address=http://127.0.0.1:$dashboard_port
for second in $(seq 90); do
    kill -0 "$ray_pid" 2>/dev/null || fail "Ray did not start; see $output/ray.log"
    "$bin/ray" job list --address "$address" > /dev/null 2>&1 && break
    [ "$second" -lt 90 ] || fail "Ray's dashboard did not answer at $address; see $output/ray.log"
    sleep 1
done
echo "dashboard $address (token in $RAY_AUTH_TOKEN_PATH)"

say "ingest: NIfTI files to the frame store $output/store"
RAY_ADDRESS=127.0.0.1:$gcs_port "$bin/python" jobs/ingest.py --preset tiny --source "$source" --store "$output/store" \
    || fail "nothing could be ingested from $source"

say "pretraining: ray job submit -- python jobs/pretrain.py"
submit=(--preset tiny --store "$output/store" --output "$output" ${extra[@]+"${extra[@]}"})
revision=$("$bin/python" -c 'from neurostorm.tracking.tracker import code_revision; print(code_revision())')
"$bin/ray" --logging-level error job submit --log-style pretty --log-color false \
    --address "$address" --working-dir "$root" \
    --runtime-env-json "{\"env_vars\": {\"NEUROSTORM_REVISION\": \"$revision\"}}" \
    -- "$bin/python" jobs/pretrain.py "${submit[@]}" \
    || fail "the job did not finish; its output is above, its files are in $output"

say "done"
"$bin/python" - "$output"/*/summary.json <<'PY'
import json
import sys

for path in sys.argv[1:]:
    summary = json.load(open(path))
    loss, mean = summary["loss/validation"], summary["loss/validation_predicting_mean"]
    print(f"{path}: held-out masked loss {loss:.4f}; predicting each voxel's mean {mean:.4f}")
PY
# In full, so that they work as typed in any folder.
mlflow=$(printf '%q server --backend-store-uri %q' "$bin/mlflow" "sqlite:///$output/mlflow.db")
cat <<EOF
Look at the run:   $mlflow --host 127.0.0.1 --port 5000
                   then open http://127.0.0.1:5000 (experiment "neurostorm": losses, reconstructions, the model)
Inspect the store: $(printf '%q ' "$bin/python" "$root/tools/store.py" stats "$output/store")
EOF
