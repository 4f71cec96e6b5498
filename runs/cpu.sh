#!/usr/bin/env bash
# All stages on two CPU cores with bf16 (AVX512_BF16): weakwater-5m, 20 M tokens of pretraining.
#
#   DATA=/path/to/data OUT=out/cpu bash runs/cpu.sh
#   STEPS="1000 250 80 300" DATA=... OUT=... bash runs/cpu.sh      optimizer steps of the four stages
#
# $DATA holds pretrain-*.jsonl.xz, pretrain_val.jsonl.xz, sft.jsonl.xz, r1.jsonl.xz and math_verifiable.jsonl.xz in the
# project's formats; TEXT, VAL, CHATS, LONG_CHATS, R1 and QUESTIONS name other files (runs/data.sh does: what
# prepare_data.py made of them). 500 math problems are held out first. A tenth of the tokens of the later stages is pretraining text,
# and a fifth of distill's are chats without thoughts, so that earlier skills do not fade. To resume a stopped run, repeat
# the command.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/cpu}
read -r pretrain_steps sft_steps sft_long_steps distill_steps <<< "${STEPS:-4900 800 240 1000}"
PYTHON=${PYTHON:-.venv/bin/python}
TEXT=${TEXT:-$DATA/pretrain-*.jsonl.xz} VAL=${VAL:-$DATA/pretrain_val.jsonl.xz} CHATS=${CHATS:-$DATA/sft.jsonl.xz}
LONG_CHATS=${LONG_CHATS:-$CHATS} R1=${R1:-$DATA/r1.jsonl.xz} QUESTIONS=${QUESTIONS:-$DATA/math_verifiable.jsonl.xz}
common=(--out_dir "$OUT" --tokenizer_path "$OUT/tokenizer" --lr_schedule cosine --min_lr_ratio 0.1
        --eval_interval 600 --eval_tokens 100000 --save_interval 300 --resume)

[ -f "$OUT/data/held_out.jsonl" ] || "$PYTHON" experiments/split_holdout.py --questions "$QUESTIONS" \
    --chats "$R1" --out_dir "$OUT/data"
[ -d "$OUT/tokenizer" ] || "$PYTHON" train_tokenizer.py --data_path "$TEXT" \
    --val_path "$VAL" --tokenizer_path "$OUT/tokenizer"

"$PYTHON" pretrain.py --data_path "$TEXT" --val_path "$VAL" --preset weakwater-5m --batch_size 8 \
    --learning_rate 4e-3 --max_steps "$pretrain_steps" "${common[@]}"
"$PYTHON" SFT.py --data_path "$CHATS=0.9" "$TEXT=0.1" --batch_size 8 --learning_rate 2e-3 --max_steps "$sft_steps" \
    "${common[@]}"
"$PYTHON" SFT_long.py --data_path "$LONG_CHATS=0.9" "$TEXT=0.1" --batch_size 4 --learning_rate 1e-3 \
    --max_steps "$sft_long_steps" "${common[@]}"
"$PYTHON" distill.py --data_path "$OUT/data/chats.jsonl=0.7" "$CHATS=0.2" "$TEXT=0.1" --batch_size 4 \
    --learning_rate 2e-3 --max_steps "$distill_steps" "${common[@]}"

for stage in SFT_long distill; do
    "$PYTHON" evaluate.py --checkpoint "$OUT/$stage.pth" --out_dir "$OUT" --tokenizer_path "$OUT/tokenizer" \
        --data_path "$OUT/data/held_out.jsonl" --max_new_tokens 400
done
for stage in pretrain SFT SFT_long distill; do
    if [ $stage = pretrain ]; then  # this model continues text
        prompts=("春天来了，" "中华人民共和国" "Linux 是" "从前有一个人" "人工智能的发展")
    else
        prompts=("你好，你是谁？" "中国的首都是哪里？" "请写一句关于春天的话。" "怎样才能睡得更好？"
                 "小明有12个苹果，又买了5个，吃掉了3个，还剩几个？")
    fi
    for prompt in "${prompts[@]}"; do
        echo "=== $stage: $prompt"
        "$PYTHON" eval_model.py --checkpoint "$OUT/$stage.pth" --tokenizer_path "$OUT/tokenizer" --prompt "$prompt" \
            --temperature 0 --max_new_tokens 150 2> /dev/null
    done
done | tee "$OUT/answers.txt"
