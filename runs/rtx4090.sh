#!/usr/bin/env bash
# All stages with the defaults: weakwater-30m on one 24 GB GPU.   DATA=/path/to/data bash runs/rtx4090.sh
# Time and scores on such a GPU: not yet measured.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
[ -d weakwater_tokenizer ] || "$PYTHON" train_tokenizer.py --data_path "$DATA/pretrain.jsonl"
"$PYTHON" pretrain.py --data_path "$DATA/pretrain.jsonl" --resume
"$PYTHON" SFT.py --data_path "$DATA/sft_512.jsonl" --resume
"$PYTHON" SFT_long.py --data_path "$DATA/sft_1024.jsonl" --resume
"$PYTHON" distill.py --data_path "$DATA/r1_1024.jsonl" --resume
