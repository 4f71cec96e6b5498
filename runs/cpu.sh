#!/usr/bin/env bash
# All stages on two CPU cores with bf16 (AVX512_BF16), about an hour: weakwater-5m, 20 M tokens of pretraining.
#
#   DATA=/path/to/data OUT=out/cpu bash runs/cpu.sh
#
# $DATA holds pretrain-*.jsonl.xz, pretrain_val.jsonl.xz, sft.jsonl.xz, r1.jsonl.xz and math_verifiable.jsonl.xz in the
# project's formats. 500 maths problems are set aside first. A run that was stopped goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/cpu}
PYTHON=${PYTHON:-.venv/bin/python}
common=(--out_dir "$OUT" --tokenizer_path "$OUT/tokenizer" --optimizer muon --warmup_ratio 0.02 --accumulation_steps 1
        --eval_interval 250 --save_interval 250 --resume)

[ -f "$OUT/data/held_out.jsonl" ] || $PYTHON experiments/hold_out.py --questions "$DATA/math_verifiable.jsonl.xz" \
    --chats "$DATA/r1.jsonl.xz" --out_dir "$OUT/data"
[ -d "$OUT/tokenizer" ] || $PYTHON train_tokenizer.py --data_path "$DATA/pretrain-*.jsonl.xz" \
    --val_path "$DATA/pretrain_val.jsonl.xz" --tokenizer_path "$OUT/tokenizer"

$PYTHON pretrain.py --data_path "$DATA/pretrain-*.jsonl.xz" --val_path "$DATA/pretrain_val.jsonl.xz" \
    --preset weakwater-5m --batch_size 16 --learning_rate 3e-3 --max_steps 2560 "${common[@]}"
$PYTHON SFT.py --data_path "$DATA/sft.jsonl.xz" --batch_size 16 --learning_rate 2e-3 --max_steps 900 "${common[@]}"
$PYTHON SFT_long.py --data_path "$DATA/sft.jsonl.xz" --batch_size 8 --learning_rate 1e-3 --max_steps 300 "${common[@]}"
$PYTHON distill.py --data_path "$OUT/data/chats.jsonl" --batch_size 8 --learning_rate 2e-3 "${common[@]}"

for stage in SFT_long distill; do
    $PYTHON evaluate.py --checkpoint "$OUT/$stage.pth" --out_dir "$OUT" --tokenizer_path "$OUT/tokenizer" \
        --data_path "$OUT/data/held_out.jsonl" --max_new_tokens 400
done
for stage in pretrain SFT SFT_long distill; do
    if [ $stage = pretrain ]; then  # it continues text
        prompts=("春天来了，" "中华人民共和国" "Linux 是" "从前有一个人" "人工智能的发展")
    else
        prompts=("你好，你是谁？" "中国的首都是哪里？" "请写一句关于春天的话。" "怎样才能睡得更好？"
                 "小明有12个苹果，又买了5个，吃掉了3个，还剩几个？")
    fi
    for prompt in "${prompts[@]}"; do
        echo "=== $stage: $prompt"
        $PYTHON eval_model.py --checkpoint "$OUT/$stage.pth" --tokenizer_path "$OUT/tokenizer" --prompt "$prompt" \
            --temperature 0 --max_new_tokens 150 2> /dev/null
    done
done | tee "$OUT/answers.txt"
