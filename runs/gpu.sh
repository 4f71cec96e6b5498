#!/usr/bin/env bash
# Produces what the documentation says about one GPU (H100, H200, RTX 4090), in two commands of at most ten minutes each.
#
#   bash runs/gpu.sh measure     checks, a sweep of rows and learning rates, speed of training and decoding
#   bash runs/gpu.sh train       weakwater-30m through all four stages, 500 problems, sample answers, the weights
#   DEVICE=cpu PRESET=nano bash runs/gpu.sh measure      tries the script without a GPU
#
# No network is needed. The data is in $CARRY (default: .carry):
#
#   pretrain/*.jsonl.xz  val.jsonl.xz    text                sft.jsonl.xz  r1.jsonl.xz    conversations
#   held_out.jsonl                       problems in no conversation (experiments/split_holdout.py)
#   tokenizer/                           train_tokenizer.py
#
# To make it from the built-in corpus (other text works the same way; every file is compressed with xz):
#
#   python make_demo_data.py --out_dir data/demo; mkdir -p .carry/pretrain
#   xz -c data/demo/pretrain.jsonl > .carry/pretrain/0.jsonl.xz; xz -c data/demo/val/pretrain.jsonl > .carry/val.jsonl.xz
#   cat data/demo/sft_*.jsonl | xz > .carry/sft.jsonl.xz; xz -c data/demo/r1_1024.jsonl > .carry/r1.jsonl.xz
#   cp data/demo/eval/multi_step.jsonl .carry/held_out.jsonl
#   python train_tokenizer.py --data_path data/demo/pretrain.jsonl --tokenizer_path .carry/tokenizer \
#       --vocab_size 1700 --single_hanzi
#
# `measure` needs pytest (requirements-dev.txt).
#
# Each part has its own time limit (LIMIT_<part>=SECONDS changes it). At the limit Python gets SIGINT, so a training stage
# saves its weights and the next part continues from them. A part's output goes to stdout and to $OUT/<part>.txt. At the
# end this output, the training logs, charts and replies are packed in $OUT/logs.tgz; the only other files in $OUT are the
# pieces of the weights (experiments/split_weights.py). The exit code is 1 if a part failed, 2 if nothing could start.
#
# Environment (defaults in brackets):
#   DEVICE [cuda]  PRESET [weakwater-30m]  PYTHON [.venv/bin/python, python3 or python]  CARRY [.carry]
#   OUT [out/gpu/results/<command>] results    RUN [out/gpu] token caches, runs and their checkpoints
#   BUDGET [600] seconds for the whole command: no part runs longer
#   ROWS [32] rows of 512 tokens in a step
#   measure: BIG_ROWS [128], SWEEP ["32:2e-3 32:4e-3 32:8e-3 128:4e-3 128:8e-3"] rows:learning rate,
#            SWEEP_TOKENS [16000000] tokens of each case, PILOT [100] steps of a speed run, REPEATS [5]
#   train:   RATE [500000] tokens/s, as measured; PRETRAIN_S [170] SFT_S [25] SFT_LONG_S [12] DISTILL_S [35] seconds of
#            the stages at that rate; SFT_ROWS SFT_LONG_ROWS DISTILL_ROWS [as many tokens as ROWS]; COMPILE=1 adds
#            --compile; PRETRAIN_FLAGS SFT_FLAGS SFT_LONG_FLAGS DISTILL_FLAGS more flags; RESERVE [90] seconds kept
#            for the parts after the stages; QUESTIONS [500]; NEW_TOKENS [400];
#            WEIGHTS ["distill"] stages whose weights are packed; MIB [15] of a piece
# A second `train` needs another $RUN. split_weights.py joins the pieces; the complete weights are in $RUN/train.
set -uo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in measure | train) ;; *) echo "usage: bash runs/gpu.sh measure | train" >&2; exit 2 ;; esac
DEVICE=${DEVICE:-cuda} PRESET=${PRESET:-weakwater-30m} CARRY=${CARRY:-.carry} RUN=${RUN:-out/gpu} BUDGET=${BUDGET:-600}
OUT=${OUT:-out/gpu/results/$1} ROWS=${ROWS:-32} CORES=$(nproc)
few_threads=(env OMP_NUM_THREADS=$(((CORES + 7) / 8)))  # for parts that run in parallel: more threads would wait for each other
if [ -z "${PYTHON:-}" ]; then
    for PYTHON in .venv/bin/python python3 python; do
        command -v "$PYTHON" > /dev/null && break
    done
fi
for file in pretrain val.jsonl.xz sft.jsonl.xz r1.jsonl.xz held_out.jsonl tokenizer; do
    [ -e "$CARRY/$file" ] || { echo "gpu.sh: $CARRY/$file is missing (the data this script needs is listed at its head)" >&2; exit 2; }
done
case $DEVICE in cuda | cpu) ;; *) echo "gpu.sh: DEVICE=$DEVICE: must be cuda or cpu" >&2; exit 2 ;; esac
[ "$1" != train ] || [ ! -e "$RUN/train" ] || { echo "gpu.sh: $RUN/train is there from an earlier train: choose another RUN" >&2; exit 2; }
export PYTHONUNBUFFERED=1 PYTHONIOENCODING=utf-8
mkdir -p "$OUT" "$RUN" || exit 2
rm -f "$OUT"/*.txt "$OUT"/*.jsonl "$OUT/logs.tgz"  # from an earlier call
"$PYTHON" - "$DEVICE" "$1" > "$OUT/machine.txt" <<'EOP' || {
import importlib.metadata, os, sys
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit(2)
for package in ("torch", "transformers", "tokenizers", "pytest"):
    try:
        print(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        print(package, "is not installed")
        if package == "pytest" and sys.argv[2] == "measure":
            sys.exit(3)
from common import runtime
print(runtime.describe_machine(torch.device(sys.argv[1])), f"{os.cpu_count()} CPUs", sep=", ")
if torch.cuda.is_available():
    print("capability", torch.cuda.get_device_capability(), "CUDA", torch.version.cuda)
EOP
    case $? in
        2) why="its torch finds no CUDA GPU (DEVICE=cpu PRESET=nano tries the script without one)" ;;
        3) why="pytest is missing: $PYTHON -m pip install -r requirements-dev.txt" ;;
        *) why="it cannot load torch" ;;
    esac
    echo "gpu.sh: $PYTHON: $why" >&2
    exit 2
}
[ "$DEVICE" != cuda ] || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit,utilization.gpu \
    --format=csv,noheader >> "$OUT/machine.txt" 2>&1
cat "$OUT/machine.txt"

part() {  # NAME LIMIT COMMAND…: runs it with its output on stdout and in NAME.txt
    local name=$1 limit=$2 begin=$SECONDS left=$((BUDGET - SECONDS - 10)) override="LIMIT_${1//[^A-Za-z0-9]/_}" code
    shift 2
    limit=${!override:-$limit}
    [ "$limit" -le "$left" ] || limit=$((left > 0 ? left : 0))
    echo "=== $name (at most $limit s)"
    if [ "$limit" -lt 1 ]; then
        echo "not started: the $BUDGET s of BUDGET are used up" | tee "$OUT/$name.txt"
        code=124
    else  # background jobs of a script ignore SIGINT, and so would Python, unless env restores it
        timeout -s INT -k 10 "$limit" env --default-signal=INT "$@" 2>&1 | tee "$OUT/$name.txt"
        code=${PIPESTATUS[0]}
    fi
    echo "=== $name: exit $code, $((SECONDS - begin)) s, $SECONDS s in all"
    [ "$code" = 0 ] || echo "$name (exit $code)" >> "$OUT/failed.txt"
}
beside() {  # a part in the background, one per core: printed when it ends, while NAME.txt grows
    while [ "$(jobs -rp | wc -l)" -ge "$CORES" ]; do wait -n; done
    { local text; text=$(part "$@"); printf '%s\n' "$text"; } &
}
caches_text() { caches caches_text 60 pretrain:text val.jsonl.xz:text; }
caches_chat() { caches caches_chat 120 sft.jsonl.xz:chat sft.jsonl.xz:thinking r1.jsonl.xz:thinking; }
caches() {  # NAME LIMIT FILE:KIND…: makes token caches once, before several parts read them; thinking: as distill.py
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" -c '
import sys
from dataset import open_cache
from text.content import Reading
from text.sources import find_files
from text.tokenizer import load_tokenizer
carry, cache, *files = sys.argv[1:]
tokenizer = load_tokenizer(f"{carry}/tokenizer")
for name, kind in (file.split(":") for file in files):
    reading = Reading("chat", thoughts=True) if kind == "thinking" else Reading(kind)
    meta = open_cache(find_files(f"{carry}/{name}"), tokenizer, reading, cache).meta
    print(name, kind, meta["lines"], "lines", flush=True)' "$CARRY" "$RUN/cache" "$@"
}
same=(--tokenizer_path "$CARRY/tokenizer" --cache_dir "$RUN/cache" --device "$DEVICE")
text=(--data_path "$CARRY/pretrain" --val_path "$CARRY/val.jsonl.xz" --preset "$PRESET" --epochs 100)
# the later stages read, beside their own data, what keeps earlier skills from fading
chats=(--data_path "$CARRY/sft.jsonl.xz=0.9" "$CARRY/pretrain=0.1")
thoughts=(--data_path "$CARRY/r1.jsonl.xz=0.7" "$CARRY/sft.jsonl.xz=0.2" "$CARRY/pretrain=0.1")

# ---- measure: one H200 takes 118 s for the checks and the sweep, 84 s for pretrain.py's speed and 53 s for train_eager.
# The other parts share the rest of BUDGET; the one most likely to run out of time is last ----
sweep() {  # all cases at once: they share the GPU, so only their losses are meaningful
    local case rows rate
    for case in ${SWEEP:-32:2e-3 32:4e-3 32:8e-3 128:4e-3 128:8e-3}; do
        rows=${case%:*} rate=${case#*:}
        beside "sweep_${rows}_$rate" 150 "${few_threads[@]}" "$PYTHON" pretrain.py "${text[@]}" "${same[@]}" \
            --out_dir "$RUN/sweep/${rows}_$rate" --batch_size "$rows" --learning_rate "$rate" \
            --max_steps $((${SWEEP_TOKENS:-16000000} / (rows * 512))) --eval_interval 0 --eval_tokens 100000 \
            --save_interval 1000000 --log_interval 50
    done
}
speed() {  # NAME FLAGS…: pretrain.py, with the time of day on each line to show how long the start takes
    local name=$1
    shift
    part "speed_$name" 45 bash -c '
        stamp() { trap "" INT; while IFS= read -r line; do printf "%(%T)T %s\n" -1 "$line"; done; }
        printf "%(%T)T start\n" -1; "$@" 2>&1 | stamp; exit "${PIPESTATUS[0]}"' - \
        "$PYTHON" pretrain.py "${text[@]}" "${same[@]}" --max_steps "${PILOT:-100}" \
        --out_dir "$RUN/speed/$name" --log_interval 25 --eval_interval 0 --eval_tokens 20000 --save_interval 1000000 "$@"
}
measure() {
    local benchmark=(--preset "$PRESET" --device "$DEVICE" --quick)
    local train=("${benchmark[@]}" --repeats "${REPEATS:-5}" --rows "${BIG_ROWS:-128}")
    rm -rf "$RUN"/{sweep,speed}
    WEAKWATER_GPU_REPORT="$OUT/checks.jsonl" beside checks 210 "$PYTHON" -m pytest tests/gpu -m gpu -rs
    caches_text
    caches_chat &  # for `train` on the same machine
    sweep
    wait
    part sweep 10 "$PYTHON" - "$RUN/sweep" <<'EOP'
import json, pathlib, sys
print("rows_rate         steps      tokens    loss  val_loss  val_bpb")
for folder in sorted(pathlib.Path(sys.argv[1]).glob("*")):
    path = folder / "log" / "pretrain.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    shown = [last.get(key) for key in ("step", "tokens", "loss", "val_loss", "val_bpb")]
    print(f"{folder.name:<12}", *(f"{'-' if v is None else v if isinstance(v, int) else f'{v:.4f}':>10}" for v in shown))
EOP
    speed eager --batch_size "$ROWS"
    speed compiled --batch_size "$ROWS" --compile
    speed compiled_big --batch_size "${BIG_ROWS:-128}" --compile
    part train_eager 70 "$PYTHON" benchmarks/train_throughput.py "${train[@]}"
    part decode 110 "$PYTHON" benchmarks/decode_throughput.py "${benchmark[@]}" --repeats 3 --new_tokens 96 --batch 16
    part profile 50 "$PYTHON" benchmarks/step_profile.py --preset "$PRESET" --device "$DEVICE" --rows "$ROWS" --compile
    part train_compiled 200 "$PYTHON" benchmarks/train_throughput.py "${train[@]}" --compile  # compiles four loops
}

# ---- train: the stages end RESERVE seconds before BUDGET, to leave time for answers, scores and weights ----
stage() {  # SCRIPT SECONDS ROWS TOKENS_OF_A_ROW FLAGS…: as many steps as fit in SECONDS at RATE
    local script=$1 seconds=$2 rows=$3 length=$4 steps limit left
    shift 4
    steps=$((${RATE:-500000} * seconds / (rows * length)))
    [ "$steps" -ge 8 ] || steps=8
    limit=$((seconds * 3 / 2 + 35)) left=$((BUDGET - SECONDS - ${RESERVE:-90}))
    part "$script" $((left < limit ? left : limit)) "$PYTHON" "$script.py" "${same[@]}" --out_dir "$RUN/train" \
        --batch_size "$rows" --epochs 100 --max_steps "$steps" --eval_interval $((steps / 8)) --eval_tokens 100000 \
        --save_interval 1000000 --log_interval $((steps / 80 + 1)) ${COMPILE:+--compile} "$@"
    case " ${WEIGHTS:-distill} " in *" $script "*)  # at once, in case the time on this machine ends early
        beside "weights_$script" 60 "${few_threads[@]}" "$PYTHON" experiments/split_weights.py pack \
            "$RUN/train/$script.pth" "$OUT/$script" --mib "${MIB:-15}" ;;
    esac
}
answers() {  # STAGE: ten prompts, each alone, greedy and sampled
    local stage=$1 prompts temperature
    case $stage in
        pretrain) prompts=("春天来了，" "中华人民共和国" "Linux 是一种" "从前有一个人，" "人工智能的发展" "水的沸点是" "北京是"
                           "学习一门外语" "这家餐厅的" "在数学中，") ;;
        distill) prompts=("小明有12个苹果，又买了5个，吃掉了3个，还剩几个？" "一支铅笔2元，买7支要多少元？"
                          "一辆汽车每小时行60千米，3小时行多少千米？" "书架上有48本书，平均放在6层，每层放几本？"
                          "一个长方形长8厘米，宽5厘米，面积是多少？" "小红今年9岁，妈妈比她大26岁，妈妈今年几岁？"
                          "你好，你是谁？" "中国的首都是哪里？" "怎样才能睡得更好？" "为什么天空是蓝色的？") ;;
        *) prompts=("你好，你是谁？" "中国的首都是哪里？" "请写一句关于春天的话。" "怎样才能睡得更好？" "为什么天空是蓝色的？"
                    "请推荐三种健康的早餐。" "把“我喜欢读书”翻译成英文。" "如何学好数学？" "什么是人工智能？" "给朋友写一句生日祝福。") ;;
    esac
    printf '%s\n' "${prompts[@]}" > "$RUN/prompts_$stage"
    for temperature in 0 0.7; do
        beside "answers_${stage}_t$temperature" 70 bash -c 'exec "$@" < "$0"' "$RUN/prompts_$stage" \
            "${few_threads[@]}" "$PYTHON" eval_model.py --checkpoint "$RUN/train/$stage.pth" --device "$DEVICE" \
            --tokenizer_path "$CARRY/tokenizer" --history_turns 0 --temperature $temperature --top_p 0.9 \
            --max_new_tokens "$NEW_TOKENS"
    done
}
train() {
    local stage temperature score=(--tokenizer_path "$CARRY/tokenizer" --device "$DEVICE" --out_dir "$RUN/train")
    NEW_TOKENS=${NEW_TOKENS:-400}
    caches_text
    caches_chat > /dev/null &  # while pretrain.py runs
    stage pretrain "${PRETRAIN_S:-170}" "$ROWS" 512 "${text[@]}" ${PRETRAIN_FLAGS:-}
    wait
    cat "$OUT/caches_chat.txt"
    stage SFT "${SFT_S:-25}" "${SFT_ROWS:-$ROWS}" 512 "${chats[@]}" ${SFT_FLAGS:-}
    stage SFT_long "${SFT_LONG_S:-12}" "${SFT_LONG_ROWS:-$(((ROWS + 1) / 2))}" 1024 "${chats[@]}" ${SFT_LONG_FLAGS:-}
    stage distill "${DISTILL_S:-35}" "${DISTILL_ROWS:-$(((ROWS + 1) / 2))}" 1024 "${thoughts[@]}" ${DISTILL_FLAGS:-}
    for stage in SFT_long distill; do
        beside "problems_$stage" 80 "${few_threads[@]}" "$PYTHON" evaluate.py "${score[@]}" \
            --checkpoint "$RUN/train/$stage.pth" --data_path "$CARRY/held_out.jsonl" --batch_size 256 \
            --max_questions "${QUESTIONS:-500}" --max_new_tokens "$NEW_TOKENS"
    done
    beside metrics_pretrain 60 "${few_threads[@]}" "$PYTHON" evaluate.py "${score[@]}" --checkpoint "$RUN/train/pretrain.pth" \
        --data_path "$CARRY/val.jsonl.xz"
    for stage in pretrain SFT SFT_long distill; do answers $stage; done
    wait
    for stage in pretrain SFT SFT_long distill; do
        for temperature in 0 0.7; do
            printf '\n######## %s, temperature %s\n' "$stage" "$temperature"
            cat "$OUT/answers_${stage}_t$temperature.txt"
            rm "$OUT/answers_${stage}_t$temperature.txt"
        done
    done > "$OUT/answers.txt"
}

"$1"
echo "=== $1: $SECONDS s in all"
status=0
if [ -e "$OUT/failed.txt" ]; then
    status=1
    echo "failed: $(paste -sd ',' "$OUT/failed.txt" | sed 's/,/, /g')"
fi
small=()
for path in "$OUT"/*.txt "$OUT"/*.jsonl; do [ ! -e "$path" ] || small+=("${path##*/}"); done
logs=()
for path in "$RUN"/train/{log,eval} "$RUN"/train/charts_* "$RUN"/{sweep,speed}/*/log; do
    [ ! -e "$path" ] || logs+=("${path#"$RUN"/}")
done
[ ${#logs[@]} = 0 ] || logs=(-C "$(cd "$RUN" && pwd)" "${logs[@]}")
tar czf "$OUT/logs.tgz.partial" -C "$OUT" "${small[@]}" ${logs[@]+"${logs[@]}"} \
    || [ $? = 1 ] && mv "$OUT/logs.tgz.partial" "$OUT/logs.tgz" && (cd "$OUT" && rm -f "${small[@]}") || status=1
ls -l "$OUT"
exit $status
