#!/usr/bin/env bash
# Everything that docs/PERFORMANCE.md says about a GPU, in under eight minutes, without network.
#
#   bash benchmarks/gpu.sh            results in out/gpu; OUT=… chooses another folder, PYTHON=… the Python
#   DEVICE=cpu PRESET=nano bash benchmarks/gpu.sh      tries the script where there is no GPU
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
DEVICE=${DEVICE:-cuda} PRESET=${PRESET:-weakwater-30m} ROWS=${ROWS:-128} REPEATS=${REPEATS:-5}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch sees no GPU here; DEVICE=cpu PRESET=nano tries the script without one" >&2
    exit 2
fi
mkdir -p "$OUT"

measure() {  # name, seconds at the most, script, flags: its table on the screen and in NAME.txt, its JSON in NAME.json
    local name=$1 limit=$2 script=$3
    shift 3
    echo "== $script $*"
    rm -f "$OUT/$name".{txt,err,json}
    timeout "$limit" "$PYTHON" "benchmarks/$script" --preset "$PRESET" --device "$DEVICE" --repeats "$REPEATS" "$@" \
        > "$OUT/$name.txt" 2> "$OUT/$name.err" || {
            echo "$name failed:" >&2
            tail -5 "$OUT/$name.err" >&2
            failed="$failed $name"
            return 0
        }
    tail -1 "$OUT/$name.txt" > "$OUT/$name.json"
    sed -i.all '$d' "$OUT/$name.txt" && rm -f "$OUT/$name.txt.all"
    cat "$OUT/$name.txt"
}
begin=$SECONDS failed=""
measure train 270 train_throughput.py --rows "$ROWS" --compile
measure decode 190 decode_throughput.py
echo "$((SECONDS - begin)) s in all; the tables are in $OUT"
[ ! "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
