#!/usr/bin/env bash
# The evaluation on the synthetic cohort, from nothing to a report: cohort, ingest, pretraining, five tasks by eight
# methods over three seeds, tables, figures, one HTML page. Started again, it repeats nothing that is done.
#
#   ./tools/downstream.sh                 60 subjects in two sessions
#   --output DIR     where everything goes (default: outputs/downstream)
#   further arguments go to jobs/sweep.py, for example --replicates 5 --fractions 0.25,0.5,1
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }

output=$root/outputs/downstream extra=()
while [ $# -gt 0 ]; do
    case $1 in
        --output) output=${2:?--output needs a folder}; shift 2 ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) extra+=("$1"); shift ;;
    esac
done
mkdir -p "$output"
output=$(cd "$output" && pwd)
cd "$root"

tools/setup.sh
python=$root/.venv/bin/python
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
SECONDS=0

say "data: 60 synthetic subjects, two sessions at rest and a run of five task states"
[ -e "$output/store/manifest.parquet" ] || "$python" tools/make_cohort.py "$output/cohort" --subjects 60 --frames 150
"$python" jobs/ingest.py --preset tiny --source "$output/cohort" --store "$output/store"

say "pretraining: the preset tiny on brain tokens, three quarters of the patches hidden over all frames of a clip"
"$python" jobs/pretrain.py --preset tiny --store "$output/store" --output "$output" --name pretrained \
    --model.tokens brain --mask.kind window-tube --mask.window 1,1,1,4 --mask.ratio 0.75 --strd.enabled false \
    --train.max_steps 900 --train.validate_every 300 --checkpoint.every 300

say "sweep and report"
"$python" jobs/sweep.py --store "$output/store" --model "$output/pretrained" --output "$output" --name sweep \
    --tasks age,sex,diagnosis,reid,state --methods linear,tpt,full,random_linear,random_full,fc,roi,motion \
    --replicates 3 --split.scheme kfold --split.folds 3 --split.group_column family_id \
    --split.validation 0.25 --adapt.epochs 2 --adapt.prompts 8 --adapt.clips_per_unit 4 --adapt.batch_clips 32 \
    ${extra[@]+"${extra[@]}"}
say "done: $output/sweep/report/report.html"
