#!/usr/bin/env bash
# All stages on 1, 2, 4 or 8 GPUs of one machine, with as many tokens per step as one GPU has by default.
#
#   GPUS=2 bash runs/multi_gpu.sh      on the files in data/ (README, "Data")
#
# Time and scores on such a machine: not yet measured.
set -euo pipefail
cd "$(dirname "$0")/.."
GPUS=${GPUS:-2}
case $GPUS in 1 | 2 | 4 | 8) ;; *) echo "GPUS=$GPUS: must be 1, 2, 4 or 8, to share the rows of a step evenly" >&2; exit 2 ;; esac
run() { .venv/bin/python -m torch.distributed.run --nproc_per_node "$GPUS" "$@" --resume; }
short=(--batch_size $((32 / GPUS)))
long=(--batch_size $((16 / GPUS)))
[ -d weakwater_tokenizer ] || .venv/bin/python train_tokenizer.py
run pretrain.py "${short[@]}"
run SFT.py "${short[@]}"
run SFT_long.py "${long[@]}"
run distill.py "${long[@]}"
