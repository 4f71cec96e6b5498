"""Make the control for distillation: the same data without the thoughts, for the same number of target tokens.

    python experiments/no_think_control.py --data_path r1_1024=0.7 sft_512=0.2 pretrain=0.1 --out_dir out/control \\
        --tokenizer_path weakwater_tokenizer --max_steps 300 --batch_size 16 --max_seq_len 1024

Of each source with thoughts it writes a copy into --out_dir, no_think_1.jsonl for the first source, in which a reply
that thinks is only its plain answer: distill.py puts it behind an empty thought, as it does every reply without one.
All other sources are used as they are; --val_path likewise, file by file.
Counts the targets in the first --max_steps optimizer steps of distill.py on the original data with these settings, and
how many steps distill.py --without_thoughts needs on the control's data for as many. The other flags must equal those
of the distill.py run under comparison, and that run must name its --data_path too: without it an epoch is one pass over
the first source. Replies without thoughts are short, so the control sees many more conversations.
The last line on stdout, one JSON object, has these numbers (records, emptied and malformed: of the sources that are
copied) and the words to pass to --data_path and --val_path.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import exits
from common.files import write_jsonl
from Config import FLAGS, OneLineParser, UserError, number
from dataset import StepLoader, load_splits
from text.chat import thinks, without_thought
from text.content import Reading, RecordReader
from text.records import MalformedRecord, parse_record, read_lines
from text.sources import find_sources, kind_of
from text.tokenizer import choose_tokenizer

AS_DISTILL = Reading("chat", thoughts=True)


def without_thoughts(record: dict) -> dict:
    """A chat record in which each of the assistant's replies that thinks is only its answer."""
    return record | {"conversations": [
        m | {"content": without_thought(m["content"])} if m["role"] == "assistant" and thinks(m["content"]) else m
        for m in record["conversations"]]}


def control_records(files: list[Path], counts: dict[str, int]) -> Iterator[dict]:
    """The conversations that distill.py makes of the files, without their thoughts. Counts records, conversations that
    had a thought and malformed lines."""
    reader = RecordReader(AS_DISTILL, [])
    for file in files:
        for _, line in read_lines(file):
            try:
                record = parse_record(line, "chat")
            except MalformedRecord:  # load_splits names them
                counts["malformed"] += 1
                continue
            counts["records"] += 1
            for document in reader.documents(record):
                emptied = without_thoughts(document)
                counts["emptied"] += emptied != document
                yield emptied


def write_control(target: Path, files: list[Path], mixed: bool, counts: dict[str, int]) -> bool:
    """Write the control of a source's files to `target`. Writes nothing and returns False if nothing in them thinks:
    they are text, which only stands beside other sources (`mixed`), or chats without thoughts."""
    if mixed and kind_of(files, ("chat", "text")) == "text":
        return False
    trial = dict.fromkeys(counts, 0)
    if not any(trial["emptied"] for _ in control_records(files, trial)):
        return False
    write_jsonl(target, control_records(files, counts))
    return True


def control_data(data_path: list[str], val_path: list[str] | None, out: Path,
                 counts: dict[str, int]) -> tuple[list[str], list[str] | None]:
    """What distill.py gets as --data_path and --val_path in the control; the copies that are named are written. Raises
    UserError when no reply of the training data thinks."""
    sources, words, val_words = find_sources(data_path), [], None
    mixed = len(sources) > 1
    for index, (source, word) in enumerate(zip(sources, data_path, strict=False)):  # without shares: one source
        copy = out / f"no_think_{index + 1}.jsonl"
        share = "" if source.share is None else f"={word.rpartition('=')[2]}"
        words.append(f"{copy}{share}" if write_control(copy, source.files, mixed, counts) else word)
    if not counts["emptied"]:
        raise UserError(f"--data_path {' '.join(data_path)}: no reply has a <think>: nothing to remove")
    if val_path:
        files = find_sources(val_path, "--val_path")[0].files
        copies = [out / f"no_think_val_{index + 1}.jsonl" for index in range(len(files))]
        val_words = [str(copy) if write_control(copy, [file], mixed, dict(counts)) else str(file)
                     for copy, file in zip(copies, files, strict=True)]
    return words, val_words


def steps_of(loader: StepLoader) -> Iterator[tuple[int, int]]:
    """(targets, conversations) of each optimizer step, over endless epochs."""
    documents = loader.documents
    for epoch in count():
        for number_in_epoch in range(loader.steps_in_epoch(epoch)):
            step = loader.step(epoch, number_in_epoch)
            yield (sum(len(batch.targets) for batch in step.micro_batches),
                   sum(documents.cache_of(document).is_chat for document, _, _ in step.segments))


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, nargs="+", metavar="PATH", help="that of the distill.py run")
    parser.add_argument("--val_path", nargs="+", metavar="PATH", help="that of the distill.py run")
    parser.add_argument("--out_dir", required=True, help="folder for the control's data and the token cache")
    for name in ("tokenizer_path", "cache_dir", "seed"):
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
    counts = {"records": 0, "emptied": 0, "malformed": 0}
    data_path, val_path = control_data(args.data_path, args.val_path, out, counts)
    tokenizer = choose_tokenizer(args.tokenizer_path)
    loaders = []
    for paths, val_paths in ((args.data_path, args.val_path), (data_path, val_path)):
        train, _ = load_splits(find_sources(paths), val_paths, tokenizer, AS_DISTILL,
                               args.cache_dir or str(out / "cache"), args.max_seq_len)
        loaders.append(StepLoader(train, args.max_seq_len, args.batch_size, args.accumulation_steps, args.seed))
    wanted, conversations = (sum(column) for column in zip(*islice(steps_of(loaders[0]), args.max_steps), strict=True))
    seen = control_conversations = steps = 0
    for targets, more in steps_of(loaders[1]):
        seen, control_conversations, steps = seen + targets, control_conversations + more, steps + 1
        if seen >= wanted:
            break
    print(json.dumps(counts | {"data_path": data_path, "val_path": val_path, "targets": wanted,
                               "control_targets": seen, "conversations": conversations,
                               "control_conversations": control_conversations, "control_steps": steps}))


if __name__ == "__main__":
    sys.exit(exits.run(main))
