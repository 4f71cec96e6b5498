#!/usr/bin/env bash
# All stages on the GPUs of one machine. With 2 GPUs a step has as many tokens as on one GPU by default; with more, the
# first two stages' steps grow, since their accumulation cannot go below 1.
#
#   DATA=/path/to/data GPUS=2 bash runs/multi_gpu.sh
#
# Time and scores on such a machine: not yet measured.
set -euo pipefail
cd "$(dirname "$0")/.."
GPUS=${GPUS:-2}
run() { .venv/bin/python -m torch.distributed.run --nproc_per_node "$GPUS" "$@" --resume; }
[ -d weakwater_tokenizer ] || .venv/bin/python train_tokenizer.py --data_path "$DATA/pretrain.jsonl"
run pretrain.py --data_path "$DATA/pretrain.jsonl" --accumulation_steps $((2 / GPUS > 0 ? 2 / GPUS : 1))
run SFT.py --data_path "$DATA/sft_512.jsonl" --accumulation_steps $((2 / GPUS > 0 ? 2 / GPUS : 1))
run SFT_long.py --data_path "$DATA/sft_1024.jsonl" --accumulation_steps $((8 / GPUS > 0 ? 8 / GPUS : 1))
run distill.py --data_path "$DATA/r1_1024.jsonl" --accumulation_steps $((8 / GPUS > 0 ? 8 / GPUS : 1))
