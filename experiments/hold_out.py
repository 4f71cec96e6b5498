"""Set aside maths problems for an honest exact-answer score.

    python experiments/hold_out.py --questions $DATA/math_verifiable.jsonl.xz \\
        --chats $DATA/r1.jsonl.xz --out_dir out/data

Draws --n problems by seed from a file of {"question", "answer"} records, writes them to held_out.jsonl, and writes to
chats.jsonl the conversations in which none of them is asked, with these or with other numbers: questions are compared
by their letters alone (NFKC, no spaces or punctuation, every number the same).
"""

import argparse
import json
import os
import random
import re
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.runtime import run
from Config import OneLineParser, UserError
from dataset import MalformedRecord, find_files, parse_object, parse_record, read_lines


def bare(question: str) -> str:
    """A question's letters, and # for each of its numbers."""
    numbered = re.sub(r"\d+([.,]\d+)*", "#", unicodedata.normalize("NFKC", question))
    return re.sub(r"[^\w#]+|_", "", numbered)


def records(path: str, parse, counts: dict):
    """(line, record) of each line behind `path`; malformed ones are counted and shown."""
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
    parser.add_argument("--chats", required=True, help="JSONL of conversations to take them out of")
    parser.add_argument("--out_dir", required=True)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = {"held_out": args.n, "kept": 0, "removed": 0, "malformed": 0}
    problems = {}  # by bare question, so that a problem and its twins with other numbers count once
    for _, record in records(args.questions, parse_object, counts):
        if not isinstance(record.get("question"), str) or "answer" not in record:
            raise UserError(f'{args.questions}: a record without "question" and "answer"')
        problems.setdefault(bare(record["question"]), record)
    if not 1 <= args.n <= len(problems):
        raise UserError(f"--n {args.n}: {args.questions} holds {len(problems)} different problems")
    hidden = set(random.Random(args.seed).sample(sorted(problems), args.n))
    out = Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "chats.partial", "wb") as stream:
        for line, record in records(args.chats, lambda line: parse_record(line, "chat"), counts):
            asked = {bare(m["content"]) for m in record["conversations"] if m["role"] == "user"}
            counts["removed" if hidden & asked else "kept"] += 1
            if not hidden & asked:
                stream.write(line + b"\n")
    with open(out / "held_out.partial", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(problems[question], ensure_ascii=False) + "\n" for question in sorted(hidden))
    os.replace(out / "chats.partial", out / "chats.jsonl")
    os.replace(out / "held_out.partial", out / "held_out.jsonl")  # last: where it is, the other is whole
    print(json.dumps(counts))


if __name__ == "__main__":
    sys.exit(run(main))
