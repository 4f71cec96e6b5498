#!/usr/bin/env bash
# All stages on 1, 2, 4 or 8 GPUs of one machine, with the tokens per step that one GPU has by default.
#
#   DATA=/path/to/data GPUS=2 bash runs/multi_gpu.sh
#
# Time and scores on such a machine: not yet measured.
set -euo pipefail
cd "$(dirname "$0")/.."
GPUS=${GPUS:-2}
case $GPUS in 1 | 2 | 4 | 8) ;; *) echo "GPUS=$GPUS: must be 1, 2, 4 or 8, to share the rows of a step evenly" >&2; exit 2 ;; esac
run() { .venv/bin/python -m torch.distributed.run --nproc_per_node "$GPUS" "$@" --resume; }
short=(--batch_size $((32 / GPUS)))
long=(--batch_size $((16 / GPUS)))
[ -d weakwater_tokenizer ] || .venv/bin/python train_tokenizer.py --data_path "$DATA/pretrain.jsonl"
run pretrain.py --data_path "$DATA/pretrain.jsonl" "${short[@]}"
run SFT.py --data_path "$DATA/sft_512.jsonl" "${short[@]}"
run SFT_long.py --data_path "$DATA/sft_1024.jsonl" "${long[@]}"
run distill.py --data_path "$DATA/r1_1024.jsonl" "${long[@]}"
