"""What is left of validation files in training files: the largest containment, by plain sets of five characters.

    python benchmarks/leaks_left.py --data_path data/pretrain-*.jsonl.zst data/sft_512-*.jsonl.zst --val_path FILE…

For each training record: the largest share of the shorter text that it has in common with a validation record, counted
over all of their runs of five characters, not by hashes as prepare_data.py does. Both are normalized as there
(prepare/similarity.py). Prints a histogram, and the records with the largest shares.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import print_table
from common import exits
from Config import OneLineParser
from prepare.inputs import RawReader, find_raw_files
from prepare.similarity import normalize

EDGES = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.01)


def runs_of_five(text: str) -> set[str]:
    """The runs of five characters of a normalized text."""
    return {text[begin:begin + 5] for begin in range(len(text) - 4)}


def main(argv: list[str] | None = None) -> None:
    """Measure and print. Raises UserError where files are missing."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", nargs="+", required=True, help="training files")
    parser.add_argument("--val_path", nargs="+", required=True, help="validation files")
    args = parser.parse_args(argv)
    from prepare.duplicates import LEAST_SHINGLES  # here: --help works without datatrove
    from prepare.pipeline import content_of

    owners, sizes, n_records = defaultdict(list), [], 0
    for file in find_raw_files(args.val_path, "--val_path")[0]:
        for _, record in RawReader(file).read():
            found = runs_of_five(normalize(content_of(record)))
            for run in found if len(found) >= LEAST_SHINGLES else ():
                owners[run].append(len(sizes))
            sizes.append(len(found))
    histogram, largest = Counter(), []
    for file in find_raw_files(args.data_path, "--data_path")[0]:
        for number, record in RawReader(file).read():
            found = runs_of_five(normalize(content_of(record)))
            common = Counter(owner for run in found if run in owners for owner in owners[run])
            share = max((n / min(len(found), sizes[owner]) for owner, n in common.items()), default=0.0)
            histogram[next(low for low, high in zip(EDGES, EDGES[1:], strict=False) if low <= share < high)] += 1
            largest = sorted([*largest, (share, f"{file.path}:{number}")])[-3:]
            n_records += 1
    print_table(["largest containment", "training records"], [
        [f"{low:.1f} to {min(high, 1):.1f}", f"{histogram[low]:,}"]
        for low, high in zip(EDGES, EDGES[1:], strict=False)])
    for share, name in reversed(largest):
        print(f"{share:.4f} {name}")
    print(json.dumps({"ratios": {}, "records": n_records, "val_records": len(sizes), "leaks": histogram[0.5],
                      "largest": largest[-1][0] if largest else None}))


if __name__ == "__main__":
    sys.exit(exits.run(main))
