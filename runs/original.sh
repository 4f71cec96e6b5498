#!/usr/bin/env bash
# All stages with the settings of the runs this project came from, on one 24 GB GPU.   bash runs/original.sh [FLAGS]
#
# Each stage reads its own file in data/ alone (pretrain, sft_512, sft_1024, r1_1024), and FLAGS go to every stage:
#
#   bash runs/original.sh --out_dir out/original --dtype fp16
#
# AdamW instead of Muon, decay on all weights, a cosine without warmup, random output projections, 168 rows per step, and
# 1e-6 in distillation. Rows are packed here and were padded there, so a step holds more tokens of text. The default recipe
# learns more from each token: docs/PERFORMANCE.md, "Recipe". Time and scores on such a GPU: not yet measured.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
original=(--optimizer adamw --learning_rate 5e-4 --beta2 0.999 --weight_decay 0.01 --weight_decay_on all
          --lr_schedule cosine --warmup_ratio 0 --min_lr_ratio 0.1 --output_init normal)
short=(--batch_size 84 --accumulation_steps 2)
long=(--batch_size 21 --accumulation_steps 8)
[ -d weakwater_tokenizer ] || "$PYTHON" train_tokenizer.py
"$PYTHON" pretrain.py --data_path pretrain "${original[@]}" "${short[@]}" "$@" --resume
"$PYTHON" SFT.py --data_path sft_512 "${original[@]}" "${short[@]}" "$@" --resume
"$PYTHON" SFT_long.py --data_path sft_1024 "${original[@]}" "${long[@]}" "$@" --resume
"$PYTHON" distill.py --data_path r1_1024 "${original[@]}" "${long[@]}" --learning_rate 1e-6 "$@" --resume
