"""Make the control for distillation: the same problems without the thoughts, for the same number of target tokens.

    python experiments/no_think_control.py --data_path data/r1_1024.jsonl --tokenizer_path weakwater_tokenizer \\
        --out_dir out/control --max_steps 300 --batch_size 16 --max_seq_len 256

Writes out/control/no_think.jsonl (and no_think_val.jsonl from --val_path), in which every <think> is present and empty.
Counts the targets in the first --max_steps optimizer steps of distill.py on the original data with these settings, and
prints how many steps distill.py needs on no_think.jsonl to see the same number. The other flags must equal those of the
distill.py run under comparison. Replies without thoughts are short, so the control sees many more conversations; the
last line on stdout, one JSON object, has these numbers.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import exits
from common.files import write_jsonl
from Config import FLAGS, OneLineParser, UserError, number
from dataset import StepLoader, load_splits
from text.content import Reading, RecordReader
from text.records import MalformedRecord, parse_record, read_lines
from text.sources import find_files, find_sources
from text.tokenizer import choose_tokenizer

AS_DISTILL = Reading("chat", thoughts=True)
THOUGHT = re.compile(r"(<think>)(\s*).*?(</think>)", re.DOTALL)


def without_thoughts(record: dict) -> dict:
    """A chat record in which every <think> of the assistant is empty except for the white space at its start."""
    messages = [m | {"content": THOUGHT.sub(r"\1\2\3", m["content"])} if m["role"] == "assistant" else m
                for m in record["conversations"]]
    return record | {"conversations": messages}


def emptied_records(path: str, counts: dict[str, int]) -> Iterator[dict]:
    """The conversations that distill.py makes of the files of `path`, without their thoughts. Counts all records,
    emptied and malformed ones."""
    reader = RecordReader(AS_DISTILL, [])
    for file in find_files(path):
        for line_number, line in read_lines(file):
            try:
                record = parse_record(line, "chat")
            except MalformedRecord as error:
                counts["malformed"] += 1
                print(f"malformed: {file}:{line_number}: {error}", file=sys.stderr)
                continue
            counts["records"] += 1
            for document in reader.documents(record):
                emptied = without_thoughts(document)
                counts["emptied"] += emptied != document
                yield emptied


def steps_of(loader: StepLoader) -> Iterator[tuple[int, int]]:
    """(targets, conversations) of each optimizer step, over endless epochs."""
    for epoch in count():
        for step in range(loader.steps_in_epoch(epoch)):
            batches = loader.step(epoch, step).micro_batches
            yield sum(len(batch.targets) for batch in batches), sum(len(batch.lengths) for batch in batches)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="the R1 conversations of the distill.py run")
    parser.add_argument("--out_dir", required=True, help="folder for no_think.jsonl and the token cache")
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
    write_jsonl(control_path, emptied_records(args.data_path, counts))
    if not counts["emptied"]:
        raise UserError(f"--data_path {args.data_path}: no reply has a <think>: nothing to remove")
    if args.val_path:
        control_val_path = str(out / "no_think_val.jsonl")
        write_jsonl(Path(control_val_path), emptied_records(args.val_path, dict(counts)))
    tokenizer = choose_tokenizer(args.tokenizer_path)
    loaders = []
    for path, val_path in ((args.data_path, args.val_path), (str(control_path), control_val_path)):
        train, _ = load_splits(find_sources([path]), [val_path] if val_path else None, tokenizer, AS_DISTILL,
                               args.cache_dir or str(out / "cache"), args.max_seq_len)
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
    sys.exit(exits.run(main))
