#!/usr/bin/env bash
# NeuroSTORM pretraining on Slurm: one Ray cluster over the nodes of this job, the driver on the first of them.
#
#   sbatch cluster/slurm.sh        (from the project's root)
#     srun on every node -> ray symmetric-run: Ray's head on the first node, workers on the others
#       -> jobs/pretrain.py on the first node -> marker file -> Ray ends everywhere
#     three minutes before the time limit, or upon `scancel --batch --signal=USR1 JOBID`: the run saves a checkpoint
#       after the step under way, the job puts itself back in the queue and later resumes from that checkpoint
#     after the failure of a node Slurm puts it back (--requeue); it resumes from the newest checkpoint
#
# Change the five places marked EDIT. The nodes are taken whole: `ray symmetric-run` ends with `ray stop`, which ends
# every Ray of the user on a node, and two Ray heads cannot share a port.

# EDIT 1/5: nodes, GPUs, cores, memory, time, and your site's account and partition. nodes x GPUs = training workers;
# a worker of the presets base and large takes 8 cores, the cores left over read clips.
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=48
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --partition=gpu

#SBATCH --job-name=neurostorm
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=neurostorm-%j.log
set -euo pipefail

# EDIT 2/5: the folders, seen by all nodes: this repository, the frame store, the outputs.
PROJECT=${SLURM_SUBMIT_DIR:-$PWD}
STORE=/mnt/neurostorm/stores/corpus
OUTPUT=/mnt/neurostorm/outputs

# EDIT 3/5: what to train, and the name of the run. The command itself stands in `train` below.
PRESET=base
NAME=base

cd "$PROJECT"
# EDIT 4/5: the Python environment that ./tools/setup.sh made, and your site's modules if any.
source .venv/bin/activate
source cluster/env.sh

# EDIT 5/5: optional, on nodes with several networks: the address of the first node and the interface to train over.
HEAD_IP=${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

WORKERS=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:?the job has no GPU: see EDIT 1/5}))
# A failed start of Ray can end with status 0, so only a finished run leaves this file and only this file counts.
MARKER=$OUTPUT/$NAME.finished
# The same of a run that has saved and stopped because it was asked to: jobs/pretrain.py ends with status 75 then.
STOPPED=$OUTPUT/$NAME.stopped
# Seconds that a run may take for its last step and checkpoint after the notice; then the job is put back anyway.
SAVE_WITHIN_S=${SAVE_WITHIN_S:-120}
export STORE OUTPUT PRESET NAME WORKERS MARKER STOPPED
# Short, and the same on every node: Ray's sockets do not fit below the long TMPDIR of many sites.
export RAY_TMPDIR=/tmp/neurostorm-$SLURM_JOB_ID
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

say() { printf '%s neurostorm: %s\n' "$(date +%FT%T)" "$*"; }

make_token() {  # the user's own token, once; a home folder that the nodes do not share needs RAY_AUTH_TOKEN_PATH
    [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || (umask 077 && ray get-auth-token --generate >/dev/null)
}

train() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 --wait=120 \
        ray symmetric-run --address "$HEAD_IP:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
        --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$SLURM_GPUS_ON_NODE" --dashboard-host 127.0.0.1 \
        -- bash -c 'status=0
        python jobs/pretrain.py --preset "$PRESET" --store "$STORE" --output "$OUTPUT" --name "$NAME" \
            --workers "$WORKERS" || status=$?
        case $status in 0) touch "$MARKER" ;; 75) touch "$STOPPED" ;; esac
        exit "$status"'
}

requeue() {
    say "$1: back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
}

give_up=
stop() {  # the run looks for this file every second, whichever node the signal reached
    [ -z "$give_up" ] || return 0
    say "the time limit is near: the run saves and stops"
    mkdir -p "$OUTPUT/$NAME"
    touch "$OUTPUT/$NAME/stop-requested"
    (
        sleep "$SAVE_WITHIN_S" &
        trap 'kill $!; exit' TERM
        wait
        requeue "no checkpoint came within $SAVE_WITHIN_S s"
    ) &
    give_up=$!
}

mkdir -p "$OUTPUT"
rm -f "$MARKER" "$STOPPED"
make_token
say "start ${SLURM_RESTART_COUNT:-0}: $WORKERS workers on $SLURM_JOB_NUM_NODES nodes, head $HEAD_IP"
say "dashboard: ssh -N -L 8265:127.0.0.1:8265 -J LOGIN_NODE $(hostname), then 127.0.0.1:8265 in a browser"

# In the background, because bash answers a signal only between commands; `wait` is one that a signal interrupts.
train &
step=$!
trap stop USR1
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

[ -z "$give_up" ] || kill "$give_up" 2>/dev/null || true
if [ -e "$STOPPED" ]; then
    requeue "the run has saved and stopped"
    exit 0
fi
if [ ! -e "$MARKER" ]; then
    say "the run is not finished (srun: $status); the reason is above, Ray's own logs are in $RAY_TMPDIR on each node"
    exit $((status > 0 ? status : 1))
fi
say "finished: $OUTPUT/$NAME"
srun --ntasks-per-node=1 rm -rf "$RAY_TMPDIR"
