"""Repetition: FineWeb-2's thresholds a word (cmn_Hani) beside ours a character, and what each drops.

    python benchmarks/repetition_thresholds.py --data_path data/pretrain.jsonl --sample 20

Every --sample-th text of the files is judged by both. theirs: the thresholds of FineWeb-2's configs/cmn_Hani.yml with
Gopher's counts, as in datatrove, over the words of jieba (pip install jieba; without it these columns are empty).
ours: prepare/text_filters.py. Texts are put into kinds by their shape, or by a field "source". Real text should
stay; in the last rows repetition was planted in real texts, which should go. Shares are per cent of the texts.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import print_table
from common import exits
from Config import OneLineParser, UserError, number
from prepare.step import Drop, Options
from prepare.text_filters import DUPLICATE_GRAMS, HAN, LATIN, TOP_GRAMS, count_classes, judge_repetition, judge_symbols
from text.sources import find_files

THEIR_LINES, THEIR_LINE_ENDS, THEIR_LINE_FEEDS, THEIR_LINE_CHARACTERS = 0.287, 0.106, 0.178, 0.1
THEIR_DUPLICATES = {5: 0.198, 6: 0.182, 7: 0.167, 8: 0.154, 9: 0.14, 10: 0.127}
THEIR_TOPS = {2: 0.256, 3: 0.201, 4: 0.171}
THEIR_ENDS = ("。", "！", "？", ".", "!", "?")  # the Chinese and Latin ones of datatrove
THEIRS = ("lines", "top 2-4", "repeated 5-10", "line ends", "line feeds", "any")
OURS = ("lines", "phrase", "passages", "symbols", "any")
OUR_REASONS = {"repeated lines": "lines", "one phrase again and again": "phrase", "repeated passages": "passages"}
ARTICLE = re.compile(r"^第[一二三四五六七八九十百千零]+条", re.M)
SPEAKER = re.compile(r"^\S{2,4}[:：]", re.M)
PLANTED = ("a sentence 10 times", "a sentence 10 times in a text", "the text twice", "a menu of 6 lines 5 times",
           "哈 300 times", "half of the text 哈")


# ---------------------------------------------------------------------------------------------
# theirs


def repeated_characters(words: list[str], n: int) -> int:
    """Characters of the grams that stood before, from left to right, none counted twice (Gopher, table A1)."""
    seen, repeated, index = set(), 0, 0
    while index <= len(words) - n:
        gram = "".join(words[index:index + n])
        if gram in seen:
            repeated += len(gram)
            index += n
        else:
            seen.add(gram)
            index += 1
    return repeated


def their_reasons(text: str, words: list[str]) -> set[str]:
    """The rules of FineWeb-2 that drop a text of these words."""
    reasons, size = set(), len(text)
    lines = re.split(r"\n+", text.strip())
    if 1 - len(set(lines)) / len(lines) > THEIR_LINES or (
            sum(map(len, lines)) - sum(map(len, set(lines))) > THEIR_LINE_CHARACTERS * len(text.replace("\n", ""))):
        reasons.add("lines")
    for n, most in THEIR_TOPS.items():
        grams = Counter(" ".join(words[i:i + n]) for i in range(len(words) - n + 1))
        if grams:
            gram, count = grams.most_common(1)[0]
            if len(gram) * count > most * size:
                reasons.add("top 2-4")
    if any(repeated_characters(words, n) > most * size for n, most in THEIR_DUPLICATES.items()):
        reasons.add("repeated 5-10")
    if sum(line.rstrip().endswith(THEIR_ENDS) for line in lines) < THEIR_LINE_ENDS * len(lines):
        reasons.add("line ends")
    if text.count("\n") > THEIR_LINE_FEEDS * len(words):
        reasons.add("line feeds")
    return reasons | ({"any"} if reasons else set())


# ---------------------------------------------------------------------------------------------
# ours


def our_reasons(text: str) -> set[str]:
    """The rules of the steps symbols and repetition that drop a text."""
    reasons = set()
    judged = judge_repetition(text, Options(), Counter())
    if isinstance(judged, Drop):
        reasons.add(OUR_REASONS[judged.reason])
    if isinstance(judge_symbols(text, Options(), Counter()), Drop):
        reasons.add("symbols")
    return reasons | ({"any"} if reasons else set())


# ---------------------------------------------------------------------------------------------
# texts


def kind_of(text: str) -> str:
    """The kind of a text by its shape."""
    lines = [line for line in text.split("\n") if line.strip()]
    if ARTICLE.search(text):
        return "statutes"
    if len(SPEAKER.findall(text)) > 0.6 * len(lines) > 2:
        return "dialogues"
    if len(lines) > 4 and len(text) < 22 * len(lines):
        return "poems and lists"
    kinds = count_classes(text)
    if kinds[LATIN] > 0.15 * (kinds[HAN] + kinds[LATIN]):
        return "technical"
    return "short prose" if len(text) < 400 else "long prose"


def read_sample(paths: list[str], sample: int) -> list[tuple[str, str]]:
    """The kind and the text of every sample-th record. Raises UserError if there is none."""
    texts = []
    for path in paths:
        with open(path, encoding="utf-8") as stream:
            for index, line in enumerate(stream):
                if index % sample == 0:
                    record = json.loads(line)
                    text = record.get("text")
                    if isinstance(text, str) and text.strip():
                        texts.append((str(record.get("source") or kind_of(text)), text))
    if not texts:
        raise UserError(f"{', '.join(paths)}: no texts")
    return texts


def plant(text: str, kind: str, rng: random.Random) -> str | None:
    """A text with repetition planted, or None if it has no sentence to repeat."""
    sentences = [part for part in re.split(r"(?<=[。！？])", text.replace("\n", "")) if 12 <= len(part) <= 40]
    if not sentences:
        return None
    sentence = rng.choice(sentences)
    if kind == "a sentence 10 times":
        return sentence * 10
    if kind == "a sentence 10 times in a text":
        parts = re.split(r"(?<=。)", text[:1000])
        for _ in range(10):
            parts.insert(rng.randrange(len(parts) + 1), sentence)
        return "".join(parts)
    if kind == "the text twice":
        return f"{text}\n{text}"
    if kind == "a menu of 6 lines 5 times":
        menu = "\n".join(["首页", "新闻中心", "产品展示", "技术支持", "联系方式", "在线留言"])
        return "\n".join(f"{menu}\n{text[start:start + 60]}" for start in range(0, 300, 60))
    return "哈" * 300 if kind == "哈 300 times" else text[:400] + "哈" * 400


def judge(texts: list[str], cut) -> dict:
    """How many texts each rule drops, of both."""
    theirs, ours = Counter(), Counter()
    for text in texts:
        ours.update(our_reasons(text))
        if cut:
            theirs.update(their_reasons(text, [word for word in cut(text) if word.strip()]))
    return {"texts": len(texts), "theirs": dict(theirs) if cut else None, "ours": dict(ours)}


def load_jieba():
    """jieba's function that cuts a text into words, or None with a message."""
    try:
        import jieba
    except ImportError:
        print("jieba is not installed (pip install jieba): the columns of FineWeb-2 are empty", file=sys.stderr)
        return None
    jieba.setLogLevel(60)
    return jieba.lcut


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", nargs="+", required=True, help="JSONL of texts")
    parser.add_argument("--sample", type=number(int, 1), default=20, help="every so many texts (default: %(default)s)")
    parser.add_argument("--planted", type=number(int, 1), default=100,
                        help="texts of each planted kind (default: %(default)s)")
    args = parser.parse_args()
    cut, rng = load_jieba(), random.Random(0)
    texts = read_sample([str(path) for each in args.data_path for path in find_files(each)], args.sample)
    groups = {"all": [text for _, text in texts]}
    for kind in sorted({kind for kind, _ in texts}):
        groups[kind] = [text for its_kind, text in texts if its_kind == kind]
    for kind in PLANTED:
        planted = (plant(text, kind, rng) for text in groups["all"][::max(1, len(texts) // (3 * args.planted))])
        groups[f"planted: {kind}"] = [text for text in planted if text][:args.planted]
    begin = time.process_time()
    for text in groups["all"]:
        our_reasons(text)
    seconds = time.process_time() - begin
    characters = sum(map(len, groups["all"]))
    cases = {name: judge(group, cut) for name, group in groups.items() if group}
    words = sum(len([word for word in cut(text) if word.strip()]) for text in groups["all"][::20]) if cut else 0
    print(f"theirs, per word: lines > {THEIR_LINES} or their characters > {THEIR_LINE_CHARACTERS}, top {THEIR_TOPS}, "
          f"repeated {THEIR_DUPLICATES}, line ends < {THEIR_LINE_ENDS}, line feeds > {THEIR_LINE_FEEDS}")
    print(f"ours, per character: top {TOP_GRAMS}, repeated {DUPLICATE_GRAMS}; see prepare/text_filters.py")

    def share(case: dict, whose: str, rule: str) -> str:
        return f"{100 * case[whose].get(rule, 0) / case['texts']:.1f}" if case[whose] is not None else ""

    print_table(["texts", "number", *(f"theirs: {rule}" for rule in THEIRS), *(f"ours: {rule}" for rule in OURS)], [
        [name, f"{case['texts']:,}", *(share(case, "theirs", rule) for rule in THEIRS),
         *(share(case, "ours", rule) for rule in OURS)] for name, case in cases.items()])
    result = {"cases": cases, "microseconds_per_character": seconds / characters * 1e6, "ratios": {}}
    if words:
        result["characters_per_word"] = sum(len("".join(text.split())) for text in groups["all"][::20]) / words
    print(json.dumps(result, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(exits.run(main))
