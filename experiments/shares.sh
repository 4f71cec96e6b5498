#!/usr/bin/env bash
# Compare mixtures of sources for a chat stage: what each run learns of its own data and keeps of the rest, in held-out
# bits per byte.
#
#   MIXTURES="sft=1; sft=0.9 pretrain=0.1" VAL="val/text.jsonl val/chats.jsonl" \
#       STAGE=SFT INIT_FROM=out/pretrain.pth bash experiments/shares.sh
#   flags on the command line go to every run: bash experiments/shares.sh --device cpu --batch_size 8
#
# A run is a stage script with one mixture as its --data_path and as many steps as every other run, in a folder of its own,
# $OUT/$STAGE/<number of the mixture>_<seed>. A run that was stopped continues; a finished run is not trained again. All
# weights, INIT_FROM first, are then scored on each file of VAL.
#
# Environment (defaults in brackets):
#   STAGE [SFT] SFT, SFT_long or distill        INIT_FROM weights to start from
#   MIXTURES mixtures, separated by ";"          VAL files that no mixture reads
#   STEPS [300]    SEEDS ["1 2"]    OUT [out/shares]    PYTHON [.venv/bin/python]
#   JOBS [1] runs at the same time; OMP_NUM_THREADS gives each its share of the cores
set -euo pipefail
cd "$(dirname "$0")/.."
STAGE=${STAGE:-SFT} STEPS=${STEPS:-300} SEEDS=${SEEDS:-1 2} JOBS=${JOBS:-1} OUT=${OUT:-out/shares}
PYTHON=${PYTHON:-.venv/bin/python}
fail() { echo "shares.sh: $1" >&2; exit 2; }
case $STAGE in SFT | SFT_long | distill) ;; *) fail "STAGE=$STAGE: not SFT, SFT_long or distill" ;; esac
[ "${INIT_FROM:-}" ] && [ "${MIXTURES:-}" ] && [ "${VAL:-}" ] || fail "INIT_FROM, MIXTURES and VAL must be set (see the head of this file)"
for number in "$STEPS" "$JOBS" $SEEDS; do
    case $number in *[!0-9]*) fail "$number: STEPS, SEEDS and JOBS are whole numbers" ;; esac
done
[ "$JOBS" -gt 0 ] || fail "JOBS=$JOBS: at least 1"
IFS=';' read -ra mixtures <<< "$MIXTURES"
mkdir -p "$OUT/$STAGE"

jobs=()
trap 'kill $(jobs -pr) 2> /dev/null || true; wait' EXIT # a stage that gets SIGTERM saves its state first
start() {  # LOG COMMAND…: in the background, at most JOBS at a time
    local log=$1
    shift
    while [ "$(jobs -pr | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
    "$@" > "$log" 2>&1 < /dev/null &
    jobs+=($!)
}
finish() {  # waits for all; a run that failed shows the end of its log
    local job failed=0
    for job in "${jobs[@]}"; do wait "$job" || failed=1; done
    jobs=()
    [ $failed = 0 ] || { tail -n 3 "$OUT/$STAGE"/*.log >&2; fail "a run failed: see $OUT/$STAGE/*.log"; }
}

for seed in $SEEDS; do
    for i in "${!mixtures[@]}"; do
        run=$OUT/$STAGE/${i}_$seed
        start "$run.log" "$PYTHON" "$STAGE.py" --data_path ${mixtures[$i]} --init_from "$INIT_FROM" --out_dir "$run" \
            --cache_dir "$OUT/cache" --epochs 1000000 --max_steps "$STEPS" --seed "$seed" --eval_interval 0 \
            --keep_checkpoints 1 --resume "$@"
    done
done
finish
score() {  # NAME WEIGHTS
    start "$OUT/$STAGE/$1.score.log" "$PYTHON" evaluate.py --checkpoint "$2" --data_path $VAL --out_dir "$OUT/$STAGE"
}
score start "$INIT_FROM"
for seed in $SEEDS; do
    for i in "${!mixtures[@]}"; do score "${i}_$seed" "$OUT/$STAGE/${i}_$seed/$STAGE.pth"; done
done
finish
"$PYTHON" - "$OUT/$STAGE" "$MIXTURES" "$SEEDS" <<'EOP'
import json, pathlib, sys
folder, mixtures, seeds = pathlib.Path(sys.argv[1]), sys.argv[2].split(";"), sys.argv[3].split()
def show(name, seed, run):
    files = json.loads((folder / f"{run}.score.log").read_text().splitlines()[-1])["files"]
    print(f"| {name} | {seed} |", " | ".join(f"{file['bpb']:.4f}" for file in files), "|")
    return files
first = json.loads((folder / "start.score.log").read_text().splitlines()[-1])["files"]
print("| mixture | seed |", " | ".join(pathlib.Path(file["file"]).name for file in first), "|")
print("|---|---|" + "---:|" * len(first))
show("before the stage", "", "start")
for i, mixture in enumerate(mixtures):
    for seed in seeds:
        show(mixture.strip(), seed, f"{i}_{seed}")
EOP
