#!/usr/bin/env bash
# From nothing to a model that thinks, in 8 to 12 minutes on two shared CPU cores: generates a small Chinese world, trains
# the tokenizer and all four stages on it, and measures what each can answer and whether thinking helps.
#
#   bash quickstart.sh [--seed N] [--smoke]      --smoke: everything, in under a minute, too short to learn anything
#
# It sets up .venv, leaves everything in out/quickstart (an earlier one is moved aside) and exits with 1 when the model
# misses one of the thresholds in the report.
set -euo pipefail
cd "$(dirname "$0")"
seed=1 smoke=""
while [ $# -gt 0 ]; do
    case $1 in
        --seed) [[ "${2:-}" =~ ^[0-9]+$ ]] || { echo "quickstart.sh: --seed needs a whole number" >&2; exit 2; }
                seed=$2; shift 2 ;;
        --smoke) smoke=--smoke; shift ;;
        -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "quickstart.sh: $1: unknown; bash quickstart.sh [--seed N] [--smoke]" >&2; exit 2 ;;
    esac
done
source runs/venv.sh
prepare_venv requirements.txt
activate_venv
export PYTHONUTF8=1  # Windows writes files in another encoding else

OUT=out/quickstart
DATA=$OUT/data
if [ -e $OUT/running ] && kill -0 "$(cat $OUT/running)" 2> /dev/null; then
    echo "quickstart.sh: process $(cat $OUT/running) is at work in $OUT: wait for it, or stop it" >&2
    exit 2
fi
if [ -e $OUT ]; then
    aside=$OUT-before-$(date +%Y%m%d-%H%M%S)
    mv $OUT "$aside"
    echo "the earlier $OUT is now $aside"
fi
mkdir -p $OUT/eval
echo $$ > $OUT/running

steps=(1150 260 35 740)  # optimizer steps of pretrain, SFT, SFT_long, distill
preset=demo longest=160 share=1
if [ "$smoke" ]; then
    steps=(8 4 2 4) preset=nano longest=16 share=0.1
fi
# Weight decay in pretraining helps the model learn sums as a rule; in later stages it makes it forget. On this corpus, unlike
# on real text, layers that begin as the identity learn less (docs/PERFORMANCE.md, "Recipe").
same="--out_dir $OUT --tokenizer_path $OUT/tokenizer --seed $seed
      --eval_interval 200 --save_interval 100000 --log_interval 50 --weight_decay 0"

begin=$SECONDS
run() {  # show a command, then run it
    echo
    echo "\$ $*"
    "$@"
}
took() {  # name a part of the work and note how long it took
    echo "$1 $((SECONDS - begin))" >> $OUT/seconds
    begin=$SECONDS
}
jobs=""
trap 'rm -f $OUT/running; [ ! "$jobs" ] || kill -- -$jobs 2> /dev/null || true' EXIT
score() {  # stage, thinking or "", questions: its losses and answers, on one thread
    weights=$OUT/$1.pth
    [ "$1" != control ] || weights=$OUT/control/distill.pth
    most=$longest
    [ "$1" != pretrain ] || most=$((longest < 32 ? longest : 32))  # its replies have no end
    # shellcheck disable=SC2086,SC2046
    OMP_NUM_THREADS=1 python evaluate.py --checkpoint $weights --out_dir $OUT --as_chat --max_new_tokens $most \
        --data_path $DATA/val --data_path $(printf "$DATA/eval/%s.jsonl " $3) ${2:+--thinking $2} --batch_size 256 \
        --generations "$OUT/eval/$1.jsonl" > "$OUT/eval/$1.json" || { echo "quickstart.sh: scoring $1 failed" >&2; exit 2; }
}

[ "$smoke" ] || run python experiments/quickstart.py estimate
run python make_demo_data.py --out_dir $DATA --seed "$seed" --share $share
run python train_tokenizer.py --data_path $DATA --tokenizer_path $OUT/tokenizer --vocab_size 1700 --single_hanzi \
    --seed "$seed"
took tokenizer
run python pretrain.py --data_path $DATA/pretrain.jsonl --val_path $DATA/val/pretrain.jsonl --preset $preset $same \
    --output_init normal --weight_decay 0.5 --max_seq_len 256 --batch_size 8 --learning_rate 4e-3 \
    --max_steps "${steps[0]}" --epochs 100
took pretrain
# from here on a part of the tokens is text, without which the facts that chats do not ask for fade
run python SFT.py --data_path $DATA/sft_512.jsonl=0.75 $DATA/rehearsal.jsonl=0.25 --val_path $DATA/val/sft_512.jsonl $same \
    --max_seq_len 512 --batch_size 8 --learning_rate 1.1e-3 --max_steps "${steps[1]}" --epochs 100
took SFT
run python SFT_long.py --data_path $DATA/sft_1024.jsonl=0.75 $DATA/rehearsal.jsonl=0.25 \
    --val_path $DATA/val/sft_1024.jsonl $same \
    --max_seq_len 1024 --batch_size 4 --learning_rate 6e-4 --max_steps "${steps[2]}" --epochs 100
took SFT_long
mixture="$DATA/r1_1024.jsonl=0.76 $DATA/sft_512.jsonl=0.14 $DATA/rehearsal.jsonl=0.10"
last="$same --max_seq_len 1024 --batch_size 4 --learning_rate 3e-3 --epochs 100"

# The control trains and is scored beside distill, since a model this small gains little from more cores: the same mixture
# from the same weights, without the thoughts, for as many target tokens.
threads=${OMP_NUM_THREADS:-}
export OMP_NUM_THREADS=$(( $(python -c "import os; print(os.cpu_count())") / 2 ))
[ "$OMP_NUM_THREADS" -gt 0 ] || export OMP_NUM_THREADS=1
of_control() {  # a value of no_think_control.py's result: what distill.py is to train on, and for how long
    python -c "
import json
value = json.loads(open('$OUT/control.json').read().splitlines()[-1])['$1']
print(*value if isinstance(value, list) else [value])"
}
# shellcheck disable=SC2046,SC2086
control() {
    run python experiments/no_think_control.py --data_path $mixture --val_path $DATA/val/r1_1024.jsonl \
        --tokenizer_path $OUT/tokenizer --out_dir $OUT/control \
        --seed "$seed" --max_seq_len 1024 --batch_size 4 --max_steps "${steps[3]}" | tee $OUT/control.json
    run python distill.py --data_path $(of_control data_path) --val_path $(of_control val_path) $last --without_thoughts \
        --out_dir $OUT/control --init_from $OUT/SFT_long.pth --max_steps "$(of_control control_steps)"
    score control off "facts one_step multi_step elsewhere"
}
echo
echo "the control trains beside the next stage and the scores; its output goes to $OUT/control.log"
set -m  # in a process group of its own, which can be stopped as a whole
control > $OUT/control.log 2>&1 &
jobs=$!
set +m
# shellcheck disable=SC2086
run python distill.py --data_path $mixture --val_path $DATA/val/r1_1024.jsonl $last --max_steps "${steps[3]}"
took distill

echo "scoring the stages"
score pretrain "" "facts one_step"
score SFT "" "facts one_step"
score SFT_long "" "facts one_step multi_step elsewhere"
score distill both "facts one_step multi_step elsewhere follow_up unknown"
took scoring
wait "$jobs" || { tail -n 3 $OUT/control.log >&2; echo "quickstart.sh: the control failed" >&2; exit 2; }
jobs=""
took control
unset OMP_NUM_THREADS
[ ! "$threads" ] || export OMP_NUM_THREADS=$threads

echo
echo "a conversation with the last stage:"
python - $DATA/eval/facts.jsonl <<'EOF' > $OUT/conversation.txt
import json, sys
fact = json.loads(open(sys.argv[1], encoding="utf-8").read().splitlines()[7])
print("\n".join(["你好", fact["question"], "那他的爱好呢？", "小明有3个苹果，又买了5个，一共几个？", "再给他4个呢？",
                 "周杰伦是哪里人？", "/no_think", "58加7等于多少？"]))
EOF
python eval_model.py --checkpoint $OUT/distill.pth --temperature 0 --max_new_tokens $longest \
    < $OUT/conversation.txt 2>&1
took conversation
code=0
run python experiments/quickstart.py report --out_dir $OUT --seed "$seed" $smoke || code=$?
echo
echo "talk to it:    source .venv/bin/activate; python eval_model.py --checkpoint $OUT/distill.pth"
echo "in a browser:  source .venv/bin/activate; pip install fastapi uvicorn; python serve.py --out_dir $OUT"
exit $code
