#!/usr/bin/env bash
# What the choices of prepare_data.py are worth: the same text, prepared with and without each, trained on with equal
# tokens, and held-out bits per byte on several kinds of text.
#
#   DATA="raw/*.jsonl" ORDER_DATA=raw/part.jsonl GOOD=good.jsonl VAL="val/text.jsonl val/replies.jsonl" \
#       bash experiments/data_choices.sh
#   SEEDS=3 ARMS="all both" ... bash experiments/data_choices.sh       another seed, some of the arms
#   flags on the command line go to every training run: bash experiments/data_choices.sh --device cpu
#
# The arms of quality train on TOKENS tokens of DATA, which holds more: all of it, or the best of it by KEEP. Those of order
# and weight train on one pass over ORDER_DATA. The scoring model is a run of half of TOKENS on DATA with seed 0. A run that
# was stopped continues, and a finished one is not trained again.
#
# Environment (defaults in brackets):
#   DATA, ORDER_DATA raw text    GOOD good texts    VAL files that are scored; nothing of them stays in the training text
#   ARMS [all model good both shuffled length score weight]    SEEDS ["1 2"]    KEEP [0.8]    TOKENS [2500000]
#   PRESET [demo]    OUT [out/data_choices]    PYTHON [.venv/bin/python]
#   JOBS [1] runs at the same time; OMP_NUM_THREADS gives each its share of the cores
set -euo pipefail
cd "$(dirname "$0")/.."
ARMS=${ARMS:-all model good both shuffled length score weight} SEEDS=${SEEDS:-1 2} KEEP=${KEEP:-0.8}
TOKENS=${TOKENS:-2500000} PRESET=${PRESET:-demo} OUT=${OUT:-out/data_choices} PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-1}
fail() { echo "data_choices.sh: $1" >&2; exit 2; }
[ "${DATA:-}" ] && [ "${ORDER_DATA:-}" ] && [ "${GOOD:-}" ] && [ "${VAL:-}" ] ||
    fail "DATA, ORDER_DATA, GOOD and VAL must be set (see the head of this file)"
for number in "$TOKENS" "$JOBS" $SEEDS; do
    case $number in *[!0-9]*) fail "$number: TOKENS, SEEDS and JOBS are whole numbers" ;; esac
done
[ "$JOBS" -gt 0 ] || fail "JOBS=$JOBS: at least 1"
mkdir -p "$OUT"
settings="DATA=$DATA ORDER_DATA=$ORDER_DATA GOOD=$GOOD VAL=$VAL KEEP=$KEEP TOKENS=$TOKENS PRESET=$PRESET $*"
[ -f "$OUT/settings" ] || echo "$settings" > "$OUT/settings"
[ "$(cat "$OUT/settings")" = "$settings" ] || fail "OUT=$OUT was begun with $(cat "$OUT/settings"): choose another OUT"
steps=$((TOKENS / (8 * 512)))

# ---- the arms: NAME, DATA or ORDER, flags of prepare_data.py, flags of pretrain.py after the bar ----
scored="--score_with $OUT/scoring/pretrain.pth"
arms="
all       DATA   |
model     DATA   $scored --keep $KEEP |
good      DATA   --good $GOOD --keep $KEEP |
both      DATA   $scored --good $GOOD --keep $KEEP |
shuffled  ORDER  |
length    ORDER  --sort_by length | --order file
score     ORDER  $scored --sort_by score | --order file
weight    ORDER  $scored --weight_by score |
"
for arm in $ARMS; do
    grep -q "^$arm " <<< "$arms" || fail "ARMS: $arm is not one of all, model, good, both, shuffled, length, score, weight"
done

LOGS=$OUT
source experiments/jobs.sh
prepare() {  # NAME DATA|ORDER FLAGS…
    local name=$1 source=$DATA
    [ "$2" = DATA ] || source=$ORDER_DATA
    shift 2
    # shellcheck disable=SC2086
    "$PYTHON" prepare_data.py --data_path $source --val_path $VAL --out_dir "$OUT/data_$name" --categories 0 "$@" \
        --resume >> "$OUT/data_$name.log" || fail "see $OUT/data_$name.log"
}
train() {  # NAME SEED DATA_FOLDER FLAGS…
    local name=$1 seed=$2 data=$3
    shift 3
    start "$OUT/${name}_$seed.log" "$PYTHON" pretrain.py --data_path "$data/pretrain-*.jsonl.zst" --preset "$PRESET" \
        --init_from none --tokenizer_path "$OUT/tokenizer" --out_dir "$OUT/runs/${name}_$seed" --seed "$seed" \
        --batch_size 8 --cache_dir "$OUT/cache" --val_path ${VAL%% *} --eval_interval 0 --eval_tokens 20000 \
        --keep_checkpoints 1 --resume "$@"
}

prepare all DATA
[ -d "$OUT/tokenizer" ] || "$PYTHON" train_tokenizer.py --data_path "$OUT/data_all/pretrain-*.jsonl.zst" \
    --tokenizer_path "$OUT/tokenizer" > "$OUT/tokenizer.log"
if [ ! -f "$OUT/scoring/pretrain.pth" ]; then
    train scoring 0 "$OUT/data_all" --max_steps $((steps / 2)) "$@"
    finish
    mkdir -p "$OUT/scoring"
    cp "$OUT/runs/scoring_0/pretrain.pth" "$OUT/scoring/copy.pth"
    mv "$OUT/scoring/copy.pth" "$OUT/scoring/pretrain.pth"
fi
while read -r name source flags; do
    case " $ARMS " in *" $name "*) ;; *) continue ;; esac
    # shellcheck disable=SC2086
    prepare "$name" "$source" ${flags%%|*}
done < <(grep . <<< "$arms")
for seed in $SEEDS; do
    while read -r name source flags; do
        case " $ARMS " in *" $name "*) ;; *) continue ;; esac
        tokens=()
        [ "$source" = ORDER ] || tokens=(--max_steps "$steps" --epochs 1000000)
        # shellcheck disable=SC2086
        train "$name" "$seed" "$OUT/data_$name" ${flags#*|} ${tokens[@]+"${tokens[@]}"} "$@"
    done < <(grep . <<< "$arms")
done
finish
for seed in $SEEDS; do
    for arm in $ARMS; do
        # shellcheck disable=SC2086
        start "$OUT/${arm}_$seed.score.log" "$PYTHON" evaluate.py --checkpoint "$OUT/runs/${arm}_$seed/pretrain.pth" \
            --data_path $VAL --out_dir "$OUT"
    done
done
finish
"$PYTHON" - "$OUT" "$SEEDS" "$ARMS" <<'EOP'
import json, pathlib, sys
folder, seeds, arms = pathlib.Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()
def files(arm, seed):
    return json.loads((folder / f"{arm}_{seed}.score.log").read_text().splitlines()[-1])["files"]
names = [pathlib.Path(file["file"]).name for file in files(arms[0], seeds[0])]
print("| arm | tokens |", " | ".join(f"{name}, seed {seed}" for name in names for seed in seeds), "|")
print("|---|---:|" + "---:|" * len(names) * len(seeds))
for arm in arms:
    metrics = (folder / "runs" / f"{arm}_{seeds[0]}" / "log" / "pretrain.jsonl").read_text().splitlines()
    tokens = max(json.loads(line).get("tokens", 0) for line in metrics)
    scores = [files(arm, seed)[place]["bpb"] for place in range(len(names)) for seed in seeds]
    print(f"| {arm} | {tokens:,} |", " | ".join(f"{bpb:.4f}" for bpb in scores), "|")
EOP
