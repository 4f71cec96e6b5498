#!/usr/bin/env bash
# All stages with the defaults: weakwater-30m on one 24 GB GPU, on the files in data/ (README, "Data").   bash runs/rtx4090.sh
# Time and scores on such a GPU: not yet measured. A stopped run continues with the same command.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
[ -d weakwater_tokenizer ] || "$PYTHON" train_tokenizer.py
for stage in pretrain SFT SFT_long distill; do
    "$PYTHON" $stage.py --resume
done
