"""Hold out math problems for an exact-answer score.

    python experiments/split_holdout.py --questions $DATA/math_verifiable.jsonl.xz \\
        --chats $DATA/r1.jsonl.xz --out_dir out/data

Draws --n problems by seed from a file of {"question", "answer"} records and writes them to held_out.jsonl. Writes the
conversations that ask none of them, with the same or with other numbers, to chats.jsonl. Questions are compared by
their letters alone (NFKC, no spaces or punctuation, all numbers equal).
"""

import argparse
import json
import random
import re
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import exits
from common.files import write_jsonl, write_whole
from Config import OneLineParser, UserError
from text.records import MalformedRecord, parse_object, parse_record, read_lines
from text.sources import find_files


def bare(question: str) -> str:
    """The letters of a question, with # for each number."""
    numbered = re.sub(r"\d+([.,]\d+)*", "#", unicodedata.normalize("NFKC", question))
    return re.sub(r"[^\w#]+|_", "", numbered)


def records(path: str, parse, counts: dict):
    """(line, record) of each line in the files of `path`. Malformed lines are counted and printed."""
    for file in find_files(path):
        for number, line in read_lines(file):
            try:
                yield line, parse(line)
            except MalformedRecord as error:
                counts["malformed"] += 1
                print(f"malformed: {file}:{number}: {error}", file=sys.stderr)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", required=True, help="JSONL of {question, answer}")
    parser.add_argument("--chats", required=True, help="JSONL of conversations to remove them from")
    parser.add_argument("--out_dir", required=True)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = {"held_out": args.n, "kept": 0, "removed": 0, "malformed": 0}
    problems = {}  # by bare question: problems that differ only in their numbers count once
    for _, record in records(args.questions, parse_object, counts):
        if not isinstance(record.get("question"), str) or "answer" not in record:
            raise UserError(f'{args.questions}: a record without "question" and "answer"')
        problems.setdefault(bare(record["question"]), record)
    if not 1 <= args.n <= len(problems):
        raise UserError(f"--n {args.n}: {args.questions} holds {len(problems)} different problems")
    hidden = set(random.Random(args.seed).sample(sorted(problems), args.n))
    out = Path(args.out_dir)

    def kept():
        for line, record in records(args.chats, lambda line: parse_record(line, "chat"), counts):
            asked = {bare(m["content"]) for m in record["conversations"] if m["role"] == "user"}
            counts["removed" if hidden & asked else "kept"] += 1
            if not hidden & asked:
                yield line + b"\n"

    write_whole(out / "chats.jsonl", lambda stream: stream.writelines(kept()))
    # last: where this file exists, chats.jsonl is complete
    write_jsonl(out / "held_out.jsonl", [problems[question] for question in sorted(hidden)])
    print(json.dumps(counts))


if __name__ == "__main__":
    sys.exit(exits.run(main))
