"""The control of a gain by thinking: the same problems with the thoughts taken out, for as many target tokens.

    python experiments/control.py --data_path data/r1_1024.jsonl --tokenizer_path weakwater_tokenizer \\
        --out_dir out/control --max_steps 300 --batch_size 16 --max_seq_len 256

writes out/control/no_think.jsonl (and no_think_val.jsonl, of --val_path), in which every reply's <think> is there and
empty, counts the targets of the first --max_steps optimizer steps of distill.py on the original with these settings,
and says for how many steps on no_think.jsonl distill.py must go to see as many. The other flags must be those of the
distill.py that is controlled. A reply without its thought is short, so the control sees many more conversations: the
last line, one JSON object, says how many.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.runtime import run
from Config import FLAGS, OneLineParser, UserError, number
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


def emptied_records(path: str, counts: dict[str, int]) -> Iterator[dict]:
    """The records behind `path` without their thoughts; counts how many there are, were emptied, are malformed."""
    for file in find_files(path):
        for line_number, line in read_lines(file):
            try:
                record = parse_record(line, "chat")
            except MalformedRecord as error:
                counts["malformed"] += 1
                print(f"malformed: {file}:{line_number}: {error}", file=sys.stderr)
                continue
            emptied = without_thoughts(record)
            counts["records"] += 1
            counts["emptied"] += emptied != record
            yield emptied


def steps_of(loader: StepLoader) -> Iterator[tuple[int, int]]:
    """(targets, conversations) of each optimizer step, epoch after epoch without end."""
    for epoch in count():
        for step in range(loader.steps_in_epoch(epoch)):
            batches = loader.step(epoch, step).micro_batches
            yield sum(len(batch.targets) for batch in batches), sum(len(batch.lengths) for batch in batches)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="the R1 conversations that distill.py trains on")
    parser.add_argument("--out_dir", required=True, help="where no_think.jsonl and the token cache go")
    for name in ("val_path", "tokenizer_path", "cache_dir", "seed"):
        parser.add_argument(f"--{name}", type=FLAGS[name].kind, default=FLAGS[name].default, help=FLAGS[name].help)
    for name in ("max_seq_len", "batch_size", "max_steps"):
        parser.add_argument(f"--{name}", type=number(int, 1), required=True, help=FLAGS[name].help)
    parser.add_argument("--accumulation_steps", type=number(int, 1), default=1, help=FLAGS["accumulation_steps"].help)
    args = parser.parse_args(argv)
    out = Path(args.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {out}: cannot be made: {error}") from None
    control_path, control_val_path = out / "no_think.jsonl", None
    counts = {"records": 0, "emptied": 0, "malformed": 0}
    write_jsonl(emptied_records(args.data_path, counts), control_path)
    if not counts["emptied"]:
        raise UserError(f"--data_path {args.data_path}: no reply has a <think>: nothing to take out")
    if args.val_path:
        control_val_path = str(out / "no_think_val.jsonl")
        write_jsonl(emptied_records(args.val_path, dict(counts)), Path(control_val_path))
    tokenizer = load_tokenizer(args.tokenizer_path)
    loaders = []
    for path, val_path in ((args.data_path, args.val_path), (str(control_path), control_val_path)):
        train, _ = load_splits(path, val_path, tokenizer, "chat", args.cache_dir or str(out / "cache"),
                               args.max_seq_len)
        loaders.append(StepLoader(train, args.max_seq_len, args.batch_size, args.accumulation_steps, args.seed))
    wanted, conversations = (sum(column) for column in zip(*islice(steps_of(loaders[0]), args.max_steps), strict=True))
    seen = control_conversations = steps = 0
    for targets, more in steps_of(loaders[1]):
        seen, control_conversations, steps = seen + targets, control_conversations + more, steps + 1
        if seen >= wanted:
            break
    print(json.dumps(counts | {"data_path": str(control_path), "targets": wanted, "control_targets": seen,
                               "conversations": conversations, "control_conversations": control_conversations,
                               "control_steps": steps}))


if __name__ == "__main__":
    sys.exit(run(main))
