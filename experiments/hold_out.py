"""Set aside maths problems for an honest exact-answer score.

    python experiments/hold_out.py --questions $DATA/math_verifiable.jsonl.xz \\
        --chats $DATA/r1.jsonl.xz --out_dir out/data

Draws --n problems by seed from a file of {"question", "answer"} records, writes them to held_out.jsonl, and
writes to chats.jsonl the conversations in which none of them is asked, with these or with other numbers. Questions
are compared by their letters alone (NFKC; no spaces, no punctuation, every run of digits the same).
"""

import argparse
import json
import random
import re
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.runtime import run
from Config import OneLineParser, UserError
from dataset import find_files, parse_record, read_lines


def bare(question: str) -> str:
    """A question's letters, and # for each of its numbers."""
    return re.sub(r"\d+", "#", re.sub(r"[^\w.]+|_", "", unicodedata.normalize("NFKC", question)))


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", required=True, help="JSONL of {question, answer}")
    parser.add_argument("--chats", required=True, help="JSONL of conversations to take them out of")
    parser.add_argument("--out_dir", required=True)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    problems = {}  # by bare question, so that a problem and its twins with other numbers count once
    for file in find_files(args.questions):
        for number, line in read_lines(file):
            record = json.loads(line)
            if not {"question", "answer"} <= set(record):
                raise UserError(f"{file}:{number}: not a {{question, answer}} record")
            problems.setdefault(bare(record["question"]), record)
    if len(problems) < args.n:
        raise UserError(f"--n {args.n}: {args.questions} holds {len(problems)} different problems")
    held_out = random.Random(args.seed).sample(sorted(problems), args.n)
    out = Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "held_out.jsonl", "w", encoding="utf-8") as stream:
        for question in held_out:
            stream.write(json.dumps(problems[question], ensure_ascii=False) + "\n")
    counts = {"held_out": args.n, "kept": 0, "removed": 0}
    hidden = set(held_out)
    with open(out / "chats.jsonl", "wb") as stream:
        for file in find_files(args.chats):
            for _, line in read_lines(file):
                asked = [bare(m["content"]) for m in parse_record(line, "chat")["conversations"] if m["role"] == "user"]
                if hidden.intersection(asked):
                    counts["removed"] += 1
                    continue
                counts["kept"] += 1
                stream.write(line + b"\n")
    print(json.dumps(counts))


if __name__ == "__main__":
    sys.exit(run(main))
