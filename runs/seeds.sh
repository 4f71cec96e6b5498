#!/usr/bin/env bash
# Runs the quickstart with several seeds, 8 to 12 minutes each, and writes docs/results/quickstart.
#
#   bash runs/seeds.sh [SEED ...]      default: 1 2 3 4 5
set -euo pipefail
cd "$(dirname "$0")/.."
RESULTS=docs/results/quickstart
seeds=("$@")
[ $# -gt 0 ] || seeds=(1 2 3 4 5)
for seed in "${seeds[@]}"; do
    case $seed in *[!0-9]*) echo "$0: $seed is not a seed: give whole numbers" >&2; exit 2 ;; esac
done
mkdir -p $RESULTS out
reports=()
for seed in "${seeds[@]}"; do
    status=0
    bash quickstart.sh --seed "$seed" > "out/quickstart_$seed.log" 2>&1 || status=$?
    case $status in
        0) ;;
        1) echo "seed $seed: a threshold was missed" ;;
        *) echo "seed $seed: did not end: see out/quickstart_$seed.log" >&2; exit 2 ;;
    esac
    cp out/quickstart/report.json "$RESULTS/seed_$seed.json"
    reports+=("$RESULTS/seed_$seed.json")
    [ "$seed" != "${seeds[0]}" ] || cp out/quickstart/{report.md,thinking.png,stages.png} $RESULTS
done
.venv/bin/python experiments/quickstart.py compare "${reports[@]}" | tee $RESULTS/README.md
