#!/usr/bin/env bash
# Compare training recipes: runs of one stage that differ in a few flags, and their held-out bits per byte.
#
#   bash experiments/recipe.sh                                  the built-in corpus, original_8 and default_third
#   DATA=data/pretrain.jsonl bash experiments/recipe.sh --device cpu        flags on the command line go to every run
#   STAGE=SFT DATA=data/sft_512.jsonl INIT_FROM=out/pretrain.pth TOKENS=500000 SEEDS=1 bash experiments/recipe.sh
#
# Each run is a stage script with the flags of the table below and an --out_dir of its own, $OUT/$STAGE/<recipe>_<seed>.
# A run that was stopped continues, and a finished run is not trained again. At the end experiments/compare_runs.py prints
# one table per seed, in which the first recipe is the reference.
#
# The original recipe pads: a row holds one document. Documents give the same gradients packed as padded, so the runs here
# are packed; DOC_TOKENS, the mean length of a document, gives a step of `original...` as many real tokens as its padded
# rows have. benchmarks/train_throughput.py measures how long a padded step takes.
#
# Environment (defaults in brackets):
#   STAGE [pretrain] SFT, SFT_long or distill
#   DATA [pretrain: the built-in corpus] --data_path    VAL [0.5 % of DATA] --val_path
#   TOKENIZER [pretrain: trained on DATA; else the one in INIT_FROM] --tokenizer_path
#   INIT_FROM the weights that a stage after pretrain starts from
#   PRESET [weakwater-5m] of pretrain       TOKENS [8000000] of a run with share 1, in whole steps
#   SEEDS ["1 2"]    RECIPES [pretrain: "original_8 default_third"; else all] names from the table, or all
#   DOC_TOKENS [512; the built-in corpus: 45] mean tokens of a document, each cut at 512
#   OUT [out/recipe]    PYTHON [.venv/bin/python]
#   JOBS [1] runs at the same time; OMP_NUM_THREADS gives each its share of the cores, and the minutes in the table are
#            then those of runs that share the machine
set -euo pipefail
cd "$(dirname "$0")/.."
STAGE=${STAGE:-pretrain} DATA=${DATA:-} VAL=${VAL:-} TOKENIZER=${TOKENIZER:-} INIT_FROM=${INIT_FROM:-}
PRESET=${PRESET:-weakwater-5m} TOKENS=${TOKENS:-8000000} SEEDS=${SEEDS:-1 2} JOBS=${JOBS:-1} OUT=${OUT:-out/recipe}
PYTHON=${PYTHON:-.venv/bin/python}
fail() { echo "recipe.sh: $1" >&2; exit 2; }
for number in "$TOKENS" "$JOBS" ${DOC_TOKENS:-} $SEEDS; do
    case $number in *[!0-9]*) fail "$number: TOKENS, SEEDS, DOC_TOKENS and JOBS are whole numbers" ;; esac
done
[ "$JOBS" -gt 0 ] || fail "JOBS=$JOBS: at least 1"

# ---- the recipes: NAME, SHARE of $TOKENS, ROWS x ACCUMULATION of a step, FLAGS ----
adamw="--optimizer adamw --lr_schedule cosine --min_lr_ratio 0.1"
muon="--optimizer muon --lr_schedule trapezoid --decay_ratio 0.4 --min_lr_ratio 0"
default="$muon --learning_rate 4e-3 --output_init zero"
original="$adamw --beta2 0.999 --weight_decay 0.01 --weight_decay_on all --warmup_ratio 0"
documents=${DOC_TOKENS:-$([ "$DATA" ] && echo 512 || echo 45)}
padded=$((8 * documents / 512)) # packed rows with the tokens of 8 padded ones, rounded down: not fewer steps
[ "$padded" -gt 0 ] || padded=1
recipes_pretrain="
original         1       ${padded}x21  $original --learning_rate 5e-4 --output_init normal
original_8       1       ${padded}x1   $original --learning_rate 5e-4 --output_init normal
original_8_15    15/100  ${padded}x1   $original --learning_rate 5e-4 --output_init normal
default          1       8x1   $default
default_half     1/2     8x1   $default
default_35       35/100  8x1   $default
default_third    1/3     8x1   $default
default_quarter  1/4     8x1   $default
default_32_rows       1    32x1  $default
default_32_rows_half  1/2  32x1  $default
default_adamw    1       8x1   $default --optimizer adamw --learning_rate 2e-3
muon_4e-3        1       8x1   $muon --learning_rate 4e-3 --output_init normal
muon_half        1/2     8x1   $muon --learning_rate 4e-3 --output_init normal
muon_third       1/3     8x1   $muon --learning_rate 4e-3 --output_init normal
muon_2e-3        1       8x1   $muon --learning_rate 2e-3 --output_init normal
muon_8e-3        1       8x1   $muon --learning_rate 8e-3 --output_init normal
muon_cosine      1       8x1   $adamw --optimizer muon --learning_rate 4e-3 --output_init normal
muon_linear      1       8x1   $muon --decay_ratio 0.98 --learning_rate 4e-3 --output_init normal
muon_decay_0     1       8x1   $muon --learning_rate 4e-3 --output_init normal --weight_decay 0
muon_4_rows      1       4x1   $muon --learning_rate 4e-3 --output_init normal
muon_16_rows     1       16x1  $muon --learning_rate 4e-3 --output_init normal
adamw_5e-4       1       8x1   $adamw --learning_rate 5e-4 --output_init normal
adamw_1e-3       1       8x1   $adamw --learning_rate 1e-3 --output_init normal
adamw_2e-3       1       8x1   $adamw --learning_rate 2e-3 --output_init normal
adamw_4e-3       1       8x1   $adamw --learning_rate 4e-3 --output_init normal
"
recipes_SFT="
adamw_5e-4  1  8x1  $adamw --learning_rate 5e-4
muon_5e-4   1  8x1  $muon --learning_rate 5e-4
muon_1e-3   1  8x1  $muon --learning_rate 1e-3
muon_2e-3   1  8x1  $muon --learning_rate 2e-3
muon_4e-3   1  8x1  $muon --learning_rate 4e-3
"
recipes_SFT_long="
adamw_5e-4   1  4x1  $adamw --learning_rate 5e-4
muon_2.5e-4  1  4x1  $muon --learning_rate 2.5e-4
muon_5e-4    1  4x1  $muon --learning_rate 5e-4
muon_1e-3    1  4x1  $muon --learning_rate 1e-3
muon_2e-3    1  4x1  $muon --learning_rate 2e-3
"
recipes_distill="
original    1  4x1  $original --learning_rate 1e-6
adamw_5e-4  1  4x1  $adamw --learning_rate 5e-4
muon_5e-4   1  4x1  $muon --learning_rate 5e-4
muon_1e-3   1  4x1  $muon --learning_rate 1e-3
muon_2e-3   1  4x1  $muon --learning_rate 2e-3
muon_4e-3   1  4x1  $muon --learning_rate 4e-3
"

# ---- what all runs share ----
case $STAGE in
    pretrain) length=512 recipes=$recipes_pretrain RECIPES=${RECIPES:-original_8 default_third} ;;
    SFT) length=512 recipes=$recipes_SFT ;;
    SFT_long) length=1024 recipes=$recipes_SFT_long ;;
    distill) length=1024 recipes=$recipes_distill ;;
    *) fail "STAGE=$STAGE: not pretrain, SFT, SFT_long or distill" ;;
esac
names=$(awk 'NF { print $1 }' <<< "$recipes")
RECIPES=${RECIPES:-all}
[ "$RECIPES" != all ] || RECIPES=$names
chosen() { case " ${RECIPES//$'\n'/ } " in *" $1 "*) ;; *) return 1 ;; esac; }
for name in $RECIPES; do
    grep -qxF -- "$name" <<< "$names" || fail "RECIPES: $name is not one of all, ${names//$'\n'/, }"
done
mkdir -p "$OUT"
if [ "$STAGE" = pretrain ]; then
    start=(--preset "$PRESET" --init_from none)
    if [ ! "$DATA" ]; then
        DATA=$OUT/data/pretrain.jsonl
        [ -f "$DATA" ] || "$PYTHON" make_demo_data.py --out_dir "$OUT/data"
    fi
    if [ ! "$TOKENIZER" ]; then
        TOKENIZER=$OUT/tokenizer
        [ -d "$TOKENIZER" ] || "$PYTHON" train_tokenizer.py --data_path "$DATA" --tokenizer_path "$TOKENIZER"
    fi
else
    [ "$DATA" ] && [ "$INIT_FROM" ] || fail "STAGE=$STAGE needs DATA and INIT_FROM"
    start=(--init_from "$INIT_FROM")
fi
same=(--data_path "$DATA" "${start[@]}" --cache_dir "$OUT/cache" --max_seq_len "$length" --epochs 1000000
      --keep_checkpoints 1 --resume)
[ ! "$VAL" ] || same+=(--val_path "$VAL")
[ ! "$TOKENIZER" ] || same+=(--tokenizer_path "$TOKENIZER")

# ---- train ----
jobs=() running=0
wait_for_one() {
    local code=0
    wait -n || code=$?
    [ $code = 0 ] || [ $code = 127 ] || exit $code # 127: no job is left, older bash does not count those that ended
    running=$((running - 1))
}
trap 'kill $(jobs -pr) 2> /dev/null || true; wait' EXIT # a stage that gets SIGTERM saves its state first
train() {  # SEED NAME SHARE STEP FLAGS…
    local seed=$1 name=$2 share=$3 rows=${4%x*} accumulation=${4#*x} step steps
    shift 4
    step=$((rows * accumulation * length))
    steps=$(((TOKENS * $share + step - 1) / step))
    [ "$running" -lt "$JOBS" ] || wait_for_one
    echo "$name, seed $seed: $steps steps"
    "$PYTHON" "$STAGE.py" "${same[@]}" --out_dir "$OUT/$STAGE/${name}_$seed" --seed "$seed" --max_steps "$steps" \
        --batch_size "$rows" --accumulation_steps "$accumulation" --eval_interval $(((steps + 4) / 5)) \
        "$@" > /dev/null < /dev/null & # the log is in the run's folder
    jobs+=($!) running=$((running + 1))
}
for seed in $SEEDS; do
    while read -r name share step flags; do
        ! chosen "$name" || train "$seed" "$name" "$share" "$step" $flags "$@"
    done < <(awk 'NF' <<< "$recipes")
done
for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job"; done
jobs=()

# ---- compare ----
for seed in $SEEDS; do
    folders=()
    for name in $names; do
        ! chosen "$name" || folders+=("$OUT/$STAGE/${name}_$seed")
    done
    echo
    "$PYTHON" experiments/compare_runs.py --stage "$STAGE" "${folders[@]}"
done
