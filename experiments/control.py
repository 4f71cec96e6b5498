"""The control of a gain by thinking: the same problems with the thoughts taken out, for as many target tokens.

    python experiments/control.py --data_path data/r1_1024.jsonl --tokenizer_path weakwater_tokenizer \\
        --out_dir out/control --max_steps 300 --batch_size 16 --max_seq_len 256

writes out/control/no_think.jsonl, in which every reply's <think> is there and empty, counts the targets of the first
--max_steps optimizer steps of distill.py on the original with these settings, and says for how many steps on
no_think.jsonl distill.py must go to see as many. The other flags must be those of the distill.py that is controlled.
A reply without its thought is short, so the control sees many more problems. The last line is one JSON object.
"""

import argparse
import json
import re
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.runtime import run
from Config import FLAGS, OneLineParser, UserError
from dataset import (
    MalformedRecord,
    StepLoader,
    find_files,
    load_splits,
    load_tokenizer,
    parse_record,
    read_lines,
    write_jsonl,
)

THOUGHT = re.compile(r"(<think>)(\s*).*?(</think>)", re.DOTALL)


def without_thoughts(record: dict) -> dict:
    """A chat record with every <think> of the assistant's emptied, but for the white space it begins with."""
    messages = [m | {"content": THOUGHT.sub(r"\1\2\3", m["content"])} if m["role"] == "assistant" else m
                for m in record["conversations"]]
    return record | {"conversations": messages}


def emptied_records(path: str, counts: dict[str, int]):
    """The records behind `path` without their thoughts; counts how many there are, were emptied, are malformed."""
    for file in find_files(path):
        for number, line in read_lines(file):
            try:
                parse_record(line, "chat")
            except MalformedRecord as error:
                counts["malformed"] += 1
                print(f"malformed: {file}:{number}: {error}", file=sys.stderr)
                continue
            record = json.loads(line)
            emptied = without_thoughts(record)
            counts["records"] += 1
            counts["emptied"] += emptied != record
            yield emptied


def targets_by_step(loader: StepLoader, max_steps: int | None = None):
    """Targets of each optimizer step, epoch after epoch."""
    done = 0
    for epoch in count():
        for number in range(loader.steps_in_epoch(epoch)):
            if done == max_steps:
                return
            done += 1
            yield sum(len(batch.targets) for batch in loader.step(epoch, number).micro_batches)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="the R1 conversations that distill.py trains on")
    parser.add_argument("--out_dir", required=True, help="where no_think.jsonl and the token cache go")
    for name in ("val_path", "tokenizer_path", "cache_dir", "seed"):
        parser.add_argument(f"--{name}", type=FLAGS[name].kind, default=FLAGS[name].default, help=FLAGS[name].help)
    for name in ("max_seq_len", "batch_size", "max_steps"):
        parser.add_argument(f"--{name}", type=int, required=True, help=FLAGS[name].help)
    parser.add_argument("--accumulation_steps", type=int, default=1, help=FLAGS["accumulation_steps"].help)
    args = parser.parse_args()
    out = Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    control_path = out / "no_think.jsonl"
    counts = {"records": 0, "emptied": 0, "malformed": 0}
    write_jsonl(emptied_records(args.data_path, counts), control_path)
    if not counts["emptied"]:
        raise UserError(f"--data_path {args.data_path}: no reply has a <think>: nothing to take out")
    tokenizer = load_tokenizer(args.tokenizer_path)
    loaders = []
    for path, val_path in ((args.data_path, args.val_path), (str(control_path), None)):
        train, _ = load_splits(path, val_path, tokenizer, "chat", args.cache_dir or str(out / "cache"),
                               args.max_seq_len)
        loaders.append(StepLoader(train, args.max_seq_len, args.batch_size, args.accumulation_steps, args.seed))
    wanted = sum(targets_by_step(loaders[0], args.max_steps))
    per_step = targets_by_step(loaders[1])
    seen = steps = 0
    while seen < wanted:
        seen, steps = seen + next(per_step), steps + 1
    print(json.dumps(counts | {"data_path": str(control_path), "targets": wanted, "control_targets": seen,
                               "control_steps": steps}))


if __name__ == "__main__":
    sys.exit(run(main))
