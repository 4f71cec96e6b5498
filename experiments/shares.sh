#!/usr/bin/env bash
# Compare mixtures of sources for a chat stage: what each run learns of its own data and keeps of the rest, in held-out
# bits per byte.
#
#   MIXTURES="sft=1; sft=0.9 pretrain=0.1" VAL="val/text.jsonl val/chats.jsonl" \
#       STAGE=SFT INIT_FROM=out/pretrain.pth bash experiments/shares.sh
#   flags on the command line go to every run: bash experiments/shares.sh --batch_size 8
#
# INIT_FROM is scored on each file of VAL, in the format of its own stage (distill's scores put replies without a thought
# behind an empty one). Then each run is a stage script with one mixture as its --data_path and as many steps as every
# other run, in a folder of its own, $OUT/$STAGE/<number of the mixture>_<seed>. A run that was stopped continues; a
# finished run is not trained again. Their weights are scored likewise.
#
# Environment (defaults in brackets):
#   STAGE [SFT] SFT, SFT_long or distill        INIT_FROM weights to start from
#   MIXTURES mixtures, separated by ";"          VAL files of text or chats that no mixture reads
#   DEVICE [auto] of the runs and scores
#   STEPS [300]    SEEDS ["1 2"]    OUT [out/shares]    PYTHON [.venv/bin/python]
#   JOBS [1] runs at the same time; OMP_NUM_THREADS gives each its share of the cores
set -euo pipefail
cd "$(dirname "$0")/.."
STAGE=${STAGE:-SFT} STEPS=${STEPS:-300} SEEDS=${SEEDS:-1 2} JOBS=${JOBS:-1} OUT=${OUT:-out/shares}
PYTHON=${PYTHON:-.venv/bin/python} DEVICE=${DEVICE:-auto}
fail() { echo "shares.sh: $1" >&2; exit 2; }
case $STAGE in SFT | SFT_long | distill) ;; *) fail "STAGE=$STAGE: not SFT, SFT_long or distill" ;; esac
[ "${INIT_FROM:-}" ] && [ "${MIXTURES:-}" ] && [ "${VAL:-}" ] ||
    fail "INIT_FROM, MIXTURES and VAL must be set (see the head of this file)"
for number in "$STEPS" "$JOBS" $SEEDS; do
    case $number in *[!0-9]*) fail "$number: STEPS, SEEDS and JOBS are whole numbers" ;; esac
done
[ "$STEPS" -gt 0 ] && [ "$JOBS" -gt 0 ] || fail "STEPS=$STEPS, JOBS=$JOBS: at least 1"
mixtures=()
while IFS= read -r -d ';' mixture; do
    [ "${mixture// /}" ] || fail "MIXTURES=\"$MIXTURES\": an empty mixture"
    mixtures+=("$mixture")
done <<< "${MIXTURES//$'\n'/ };"
mkdir -p "$OUT/$STAGE"

LOGS=$OUT/$STAGE
source experiments/jobs.sh
score() {  # NAME WEIGHTS
    # shellcheck disable=SC2086
    start "$OUT/$STAGE/$1.score.log" "$PYTHON" evaluate.py --checkpoint "$2" --data_path $VAL --out_dir "$OUT/$STAGE" \
        --device "$DEVICE"
}

score start "$INIT_FROM" # before the runs: a mistake in VAL or INIT_FROM shows at once
finish
for seed in $SEEDS; do
    for i in "${!mixtures[@]}"; do
        run=$OUT/$STAGE/${i}_$seed
        # shellcheck disable=SC2086
        start "$run.log" "$PYTHON" "$STAGE.py" --data_path ${mixtures[$i]} --init_from "$INIT_FROM" --out_dir "$run" \
            --cache_dir "$OUT/cache" --epochs 1000000 --max_steps "$STEPS" --seed "$seed" --eval_interval 0 \
            --keep_checkpoints 1 --device "$DEVICE" --resume "$@"
    done
done
finish
for seed in $SEEDS; do
    for i in "${!mixtures[@]}"; do score "${i}_$seed" "$OUT/$STAGE/${i}_$seed/$STAGE.pth"; done
done
finish
"$PYTHON" - "$OUT/$STAGE" "$SEEDS" "${mixtures[@]}" <<'EOP'
import json, pathlib, sys
folder, seeds, mixtures = pathlib.Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3:]
def files(run):
    return json.loads((folder / f"{run}.score.log").read_text().splitlines()[-1]).get("files", [])
def show(name, seed, run):
    print(f"| {name} | {seed} |", " | ".join(f"{file['bpb']:.4f}" for file in files(run)), "|")
names = [pathlib.Path(file["file"]).name for file in files("start")]
print("| mixture | seed |", " | ".join(names), "|")
print("|---|---|" + "---:|" * len(names))
show("before the stage", "", "start")
for i, mixture in enumerate(mixtures):
    for seed in seeds:
        show(mixture.strip(), seed, f"{i}_{seed}")
EOP
