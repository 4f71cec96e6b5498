#!/usr/bin/env bash
# From raw files to trained weights on two CPU cores: prepare_data.py, a tokenizer, runs/cpu.sh on what they made; beside
# it a pretraining on the text as it was, with equal tokens, and the bits per byte of both on validation text.
#
#   DATA=/path/to/data OUT=out/prepared bash runs/data.sh
#   STEPS="1000 250 80 300" PREPARE="--sort_by length" DATA=... OUT=... bash runs/data.sh
#
# $DATA holds the files that runs/cpu.sh names. The 500 math problems are held out first, and are validation for
# prepare_data.py: no chat of the training files asks one of them. PREPARE: more flags for prepare_data.py. To resume a
# stopped run, repeat the command.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/prepared} PYTHON=${PYTHON:-.venv/bin/python} STEPS=${STEPS:-4900 800 240 1000}
val=$DATA/pretrain_val.jsonl.xz
data=$OUT/data held_out=$OUT/held_out   # runs/cpu.sh draws the same problems again

[ -f "$held_out/held_out.jsonl" ] || "$PYTHON" experiments/split_holdout.py --out_dir "$held_out" \
    --questions "$DATA/math_verifiable.jsonl.xz" --chats "$DATA/r1.jsonl.xz"
prepare() {
    # shellcheck disable=SC2086
    "$PYTHON" prepare_data.py --data_path "$DATA/pretrain-*.jsonl.xz" "$DATA/sft.jsonl.xz" "$held_out/chats.jsonl" \
        --val_path "$val" "$held_out/held_out.jsonl" --tokenizer_path "$OUT/run/tokenizer" --out_dir "$data" \
        ${PREPARE:-} $([ ! -d "$data/.prepare" ] || echo --resume)
}
if [ ! -d "$OUT/run/tokenizer" ]; then
    code=0
    prepare || code=$?
    # 2 is also that of a wrong flag
    [ $code = 0 ] || grep -qs '"complete": false' "$data/manifest.json" || exit $code # the chats wait for a tokenizer
    "$PYTHON" train_tokenizer.py --data_path "$data/pretrain-*.jsonl.zst" --val_path "$val" \
        --tokenizer_path "$OUT/run/tokenizer"
fi
prepare

TEXT="$data/pretrain-*.jsonl.zst" VAL=$val CHATS="$data/sft_512-*.jsonl.zst" LONG_CHATS="$data/sft_1024-*.jsonl.zst" \
    R1="$data/r1_1024-*.jsonl.zst" QUESTIONS=$DATA/math_verifiable.jsonl.xz STEPS=$STEPS OUT=$OUT/run bash runs/cpu.sh

# the same pretraining as in runs/cpu.sh, on the text as it was
mkdir -p "$OUT/unprepared"
"$PYTHON" pretrain.py --data_path "$DATA/pretrain-*.jsonl.xz" --val_path "$val" --preset weakwater-5m --batch_size 8 \
    --learning_rate 4e-3 --max_steps "${STEPS%% *}" --out_dir "$OUT/unprepared" --tokenizer_path "$OUT/run/tokenizer" \
    --lr_schedule cosine --min_lr_ratio 0.1 --eval_interval 600 --eval_tokens 100000 --save_interval 300 --resume
for run in run unprepared; do
    echo "=== $run"
    "$PYTHON" evaluate.py --checkpoint "$OUT/$run/pretrain.pth" --data_path "$val" --out_dir "$OUT/$run" | tail -n 1
done
