"""Near-duplicates: how many planted copies prepare_data.py finds in real text, and how many of its finds are right.

    python benchmarks/near_duplicates.py --data_path data/pretrain.jsonl --pairs 2000 --seed 1

Of --texts real texts some are copied: 3 to 40 % of their characters replaced in bursts of ten by characters of other
texts, or sentences moved, deleted or inserted. Texts and copies are shuffled, and prepare_data.py runs on them with the
steps that find duplicates alone. The overlap of two texts is the Jaccard of their sets of five characters in a row, in
NFKC and lower case, without white space and punctuation. It is computed here by brute force, not by prepare_data.py's
code, which also keeps the marks of a number (-3, 3/4, 50%): of texts full of them the two differ by about 0.01.

recall      of the planted pairs that overlap by at least --near: those of which both records are in one group
precision   of the records that were dropped as near-duplicates: those that overlap by at least --near with the record
            named as the one that stays, among them those that were in the texts before
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import ROOT, print_table, warn_of_load
from common import exits
from common.files import write_jsonl
from Config import OneLineParser, UserError, number
from text.records import MalformedRecord, parse_record, read_lines

SHARES = (0.03, 0.05, 0.10, 0.15, 0.20, 0.40)  # of the characters
BURST = 10  # characters
SENTENCES = (1, 3)  # sentences moved, deleted or inserted: from, to
BINS = (0.0, 0.3, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
SHORTEST = 60  # characters of a text that is copied
SENTENCE = re.compile(r"[^。！？\n]*[。！？\n]*")
STEPS_OF_DUPLICATES = {"exact", "near"}


def shingles(text: str) -> set[str]:
    """All five characters in a row of a text in NFKC and lower case, without white space, punctuation and controls."""
    normalized = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(char for char in normalized if unicodedata.category(char)[0] not in "PZC")
    return {kept[i:i + 5] for i in range(len(kept) - 4)}


def overlap(a: str, b: str) -> float:
    """Jaccard of the shingles of two texts."""
    a, b = shingles(a), shingles(b)
    return len(a & b) / max(1, len(a | b))


# ---------------------------------------------------------------------------------------------
# copies


def replace_bursts(text: str, share: float, other: str, rng: random.Random) -> str:
    """A text of which about `share` of the characters is replaced, in bursts at random places."""
    chars = list(text)
    for _ in range(max(1, round(share * len(chars) / BURST))):
        at, source = rng.randrange(max(1, len(chars) - BURST)), rng.randrange(max(1, len(other) - BURST))
        burst = other[source:source + BURST]
        chars[at:at + len(burst)] = burst
    return "".join(chars)


def _of_sentences(change: Callable) -> Callable:
    """A change of a list of sentences, as one of a text."""
    def changed(text: str, other: str, rng: random.Random) -> str:
        sentences = SENTENCE.findall(text)[:-1]  # the last match is empty
        for _ in range(rng.randint(*SENTENCES)):
            change(sentences, SENTENCE.findall(other)[:-1], rng)
        return "".join(sentences)
    return changed


def _move(sentences: list[str], _, rng: random.Random) -> None:
    if sentences:
        sentence = sentences.pop(rng.randrange(len(sentences)))
        sentences.insert(rng.randint(0, len(sentences)), sentence)


def _delete(sentences: list[str], _, rng: random.Random) -> None:
    if len(sentences) > 1:
        del sentences[rng.randrange(len(sentences))]


def _insert(sentences: list[str], others: list[str], rng: random.Random) -> None:
    sentences.insert(rng.randint(0, len(sentences)), rng.choice(others))


EDITS = {f"{share:.0%} replaced": lambda text, other, rng, share=share: replace_bursts(text, share, other, rng)
         for share in SHARES} | {
    "sentences moved": _of_sentences(_move), "sentences deleted": _of_sentences(_delete),
    "sentences inserted": _of_sentences(_insert)}


def plant(texts: list[str], seed: int, n_pairs: int) -> list[tuple[str, str, float, str]]:
    """(original, copy, overlap, name of the edit) of `n_pairs` different texts, each edit equally often.

    Raises UserError when there are too few texts of at least SHORTEST characters.
    """
    rng = random.Random(seed)
    fit = sorted({text for text in texts if len(text) >= SHORTEST})
    if len(fit) < max(2, n_pairs):
        raise UserError(f"--pairs {n_pairs}: only {len(fit)} different texts of {SHORTEST} characters")
    pairs, names = [], [*EDITS]
    for index, text in enumerate(rng.sample(fit, n_pairs)):
        name, other = names[index % len(names)], text
        while other == text:
            other = rng.choice(fit)
        copy = EDITS[name](text, other, rng)
        pairs.append((text, copy, overlap(text, copy), name))
    return pairs


# ---------------------------------------------------------------------------------------------
# the run


def read_texts(paths: list[str], most: int, seed: int) -> list[str]:
    """`most` texts of JSON lines at random, the messages of a chat as one. Raises UserError if there are none."""
    texts, rng, seen = [], random.Random(f"texts {seed}"), 0
    for path in paths:
        for line_number, line in read_lines(Path(path)):
            kind = "chat" if b'"conversations"' in line else "text"
            try:
                record = parse_record(line, kind)
            except MalformedRecord as error:
                raise UserError(f"{path} line {line_number}: {error}") from None
            text = record["text"] if kind == "text" else "\n".join(
                message["content"] for message in record["conversations"])
            seen += 1
            if len(texts) < most:  # a reservoir: each text has the same chance
                texts.append(text)
            elif (place := rng.randrange(seen)) < most:
                texts[place] = text
    if not texts:
        raise UserError("--data_path: no texts")
    return texts


def find_duplicates(texts: list[str], folder: Path, near: float, flags: list[str]) -> tuple[dict, float]:
    """Run prepare_data.py on the texts.

    Returns, for "exact" and "near", the numbers of the dropped texts → those of the texts that stay; and seconds.
    Raises RuntimeError when it fails, or when a text is neither in the output nor among the dropped ones.
    """
    from prepare.steps import STEPS

    source, out = folder / "texts.jsonl", folder / "out"
    write_jsonl(source, [{"text": text} for text in texts])
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--data_path", str(source), "--out_dir", str(out),
               "--near", str(near), *flags, "--skip", *sorted({step.name for step in STEPS} - STEPS_OF_DUPLICATES)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"prepare_data.py exits with {done.returncode}: {done.stderr[-2000:]}")

    def number_of(id: str) -> int:
        return int(id.rpartition(":")[2]) - 1  # lines are counted from 1

    dropped = {name: {} for name in sorted(STEPS_OF_DUPLICATES)}
    for name, found in dropped.items():
        path = out / "dropped" / f"{name}.jsonl.zst"
        for _, line in read_lines(path) if path.exists() else ():
            record = json.loads(line)
            found[number_of(record["id"])] = number_of(record["duplicate_of"])
    n_kept = sum(1 for path in out.glob("pretrain-*.jsonl.zst") for _ in read_lines(path))
    n_dropped = sum(map(len, dropped.values()))
    if n_kept + n_dropped != len(texts):
        raise RuntimeError(f"{len(texts)} texts went in, {n_kept} + {n_dropped} came out")
    return dropped, seconds


def root(index: int, stays: dict[int, int]) -> int:
    """The text that stays of the group of text `index`."""
    while index in stays:
        index = stays[index]
    return index


def judge(texts: list[str], pairs: list[tuple[int, int, float, str]], dropped: dict[str, dict[int, int]],
          near: float) -> dict:
    """Recall by overlap and by edit, and precision; `pairs` name texts by their numbers."""
    stays = dropped["exact"] | dropped["near"]
    found = [root(a, stays) == root(b, stays) for a, b, *_ in pairs]

    def recall(fits: Callable[[float, str], bool]) -> dict:
        hits = [hit for hit, (_, _, shared, edit) in zip(found, pairs, strict=True) if fits(shared, edit)]
        return {"pairs": len(hits), "found": sum(hits)}

    shared = {index: overlap(texts[index], texts[kept]) for index, kept in dropped["near"].items()}
    right = [value >= near for value in shared.values()]
    bins = {f"{low:.2f} to {high:.2f}": recall(
        lambda value, _, low=low, high=high: low <= value < high or value == high == 1)
        for low, high in pairwise(BINS)}
    edits = {name: recall(lambda value, edit, name=name: edit == name and value >= near) for name in EDITS}
    return {"bins": bins, "edits": edits, "all": recall(lambda value, _: value >= near),
            "dropped": {"exact": len(dropped["exact"]), "near": len(right), "right": sum(right),
                        "least_overlap": min(shared.values(), default=None)}}


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", nargs="+", required=True, help="JSON lines of texts or conversations")
    parser.add_argument("--texts", type=number(int, 2), default=20_000,
                        help="texts taken at random (default: %(default)s)")
    parser.add_argument("--pairs", type=number(int, 1), default=2000, help="of them copied (default: %(default)s)")
    parser.add_argument("--near", type=number(float, 0.3, 1), default=0.6, help="overlap (default: %(default)s)")
    parser.add_argument("--workers", type=number(int, 1), help="of prepare_data.py (default: its own)")
    parser.add_argument("--seed", type=int, default=1, help="of texts and copies (default: %(default)s)")
    args = parser.parse_args()
    warn_of_load()
    texts = read_texts(args.data_path, args.texts, args.seed)
    planted = plant(texts, args.seed, args.pairs)
    place = {text: index for index, text in reversed([*enumerate(texts)])}
    named = [(place[text], len(texts) + index, shared, edit)
             for index, (text, _, shared, edit) in enumerate(planted)]
    texts += [copy for _, copy, *_ in planted]
    order = random.Random(args.seed).sample(range(len(texts)), len(texts))
    moved = {old: new for new, old in enumerate(order)}
    texts = [texts[old] for old in order]
    pairs = [(moved[a], moved[b], shared, edit) for a, b, shared, edit in named]
    print(f"{len(texts):,} texts, {sum(map(len, texts)):,} characters; {len(pairs):,} are planted copies", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--workers", str(args.workers)] if args.workers else []
        dropped, seconds = find_duplicates(texts, Path(folder), args.near, flags)
    result = judge(texts, pairs, dropped, args.near)

    def row(name: str, counted: dict) -> list[str]:
        share = f"{counted['found'] / counted['pairs']:.2%}" if counted["pairs"] else ""
        return [name, f"{counted['pairs']:,}", f"{counted['found']:,}", share]

    print_table(["planted pairs that overlap by", "pairs", "found", "recall"],
                [row(name, counted) for name, counted in result["bins"].items()])
    print_table([f"of an overlap of at least {args.near}", "pairs", "found", "recall"], [
        *(row(name, counted) for name, counted in result["edits"].items()), row("all", result["all"])])
    n = result["dropped"]
    ratios = {"recall": result["all"]["found"] / max(1, result["all"]["pairs"]),
              "precision": n["right"] / max(1, n["near"])}
    print(f"recall {ratios['recall']:.2%}; precision {ratios['precision']:.2%} of {n['near']:,} dropped as "
          f"near-duplicates, {n['exact']:,} as exact copies; {seconds:.1f} s")
    print(json.dumps({"ratios": ratios} | result | {"texts": len(texts), "near": args.near, "seconds": seconds,
                                                    "seed": args.seed}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(exits.run(main))
