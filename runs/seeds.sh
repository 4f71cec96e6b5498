#!/usr/bin/env bash
# The quickstart with several seeds, about nine minutes each: what docs/results/quickstart holds.
#
#   bash runs/seeds.sh [SEED ...]      default: 1 2 3 4 5
set -euo pipefail
cd "$(dirname "$0")/.."
RESULTS=docs/results/quickstart
seeds=("$@")
[ $# -gt 0 ] || seeds=(1 2 3 4 5)
mkdir -p $RESULTS out
for seed in "${seeds[@]}"; do
    rm -f out/quickstart/report.json  # of an earlier run
    bash quickstart.sh --seed "$seed" > "out/quickstart_$seed.log" 2>&1 || echo "seed $seed: see out/quickstart_$seed.log"
    cp out/quickstart/report.json "$RESULTS/seed_$seed.json"
    [ "$seed" != "${seeds[0]}" ] || cp out/quickstart/{report.md,thinking.png,stages.png} $RESULTS
done
.venv/bin/python experiments/quickstart.py compare $RESULTS/seed_*.json | tee $RESULTS/README.md
