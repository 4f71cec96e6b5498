"""Stage 0: a byte-level BPE tokenizer, in bounded memory.

default         python train_tokenizer.py
several files   python train_tokenizer.py --data_path 'data/*.jsonl.xz' --vocab_size 8000 --tokenizer_path my_tokenizer
tags as text    python train_tokenizer.py --no_think_tokens

Reads {"text": ...} and {"conversations": [...]} lines and writes the folder weakwater_tokenizer, which AutoTokenizer
loads and every later stage reads. The method is BPE (Sennrich et al. 2016, arXiv 1508.07909) over bytes, as in GPT-2,
so every text can be encoded. Training takes about 100 bytes of memory per byte of text, and more than a few million
bytes of text improve the result little. It therefore uses a random sample of short segments from the whole corpus.
"""

import argparse
import heapq
import json
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from common import exits
from common.files import write_folder
from Config import OneLineParser, UserError
from dataset import Progress
from text.chat import CHAT_TEMPLATE
from text.content import CONTROL_STRING, is_empty
from text.records import (
    ROLES,
    MalformedRecord,
    check_conversation,
    check_text,
    is_held_out,
    parse_object,
    parse_record,
    read_lines,
    text_hash,
)
from text.sources import explain, find_sources
from text.tokenizer import DEFAULT_FOLDER, TAGS, OurTokenizer

CONTROL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SEGMENT_CHARS = 100  # short, to cover many documents: 6 MB of such segments do as well as 20 MB of whole documents
MAX_WORD_CHARS = 20  # in training only: the split leaves whole Chinese clauses, which are long and rarely recur
HELD_OUT_BYTES, HELD_OUT_SEGMENT_CHARS = 4_000_000, 10_000


class Sample:
    """A uniform random sample of text segments from a stream of documents, at most `budget` bytes in all.

    Each segment draws a random key, and those with the smallest keys are kept (bottom-k sampling, Cohen and Kaplan
    2007). The chance of a segment depends neither on its position nor on its size.
    """

    def __init__(self, budget: int, segment_chars: int, seed: int):
        self.budget, self.segment_chars, self.bytes = budget, segment_chars, 0
        self.random = random.Random(seed).random
        # keys from here on are rejected: else a small segment could fill the room that a large one left
        self.limit = 1.0
        self.heap: list[tuple[float, bytes, int]] = []  # (-key, UTF-8, hash of the document), largest key first

    def add(self, document_hash: int, texts: list[str]) -> None:
        """Cut the texts of a document into segments and sample them."""
        for text in texts:
            for start in range(0, len(text), self.segment_chars):
                key = self.random()
                if key >= self.limit:
                    continue
                segment = text[start:start + self.segment_chars].encode("utf-8")
                heapq.heappush(self.heap, (-key, segment, document_hash))
                self.bytes += len(segment)
                while self.bytes > self.budget:
                    largest, segment, _ = heapq.heappop(self.heap)
                    self.limit = -largest
                    self.bytes -= len(segment)

    def pop_texts(self) -> Iterator[str]:
        """Yield and free the segments one by one, so that they are never in memory twice."""
        while self.heap:
            yield heapq.heappop(self.heap)[1].decode("utf-8")


def read_texts(paths: list[str], max_bad_ratio: float, flag: str = "--data_path") -> Iterator[tuple[int, list[str]]]:
    """Yield (text hash, texts) of each non-empty record in the files of `paths`. Prints progress and line counts.

    Raises UserError when more than `max_bad_ratio` of the lines are malformed or a file cannot be read.
    """
    lines = malformed = empty = spelled = n_chars = 0
    (source, *_) = find_sources(paths, flag)
    if source.share is not None:
        raise UserError(f"{flag} {paths[0]}: a tokenizer is trained without shares")
    progress = Progress(f"sampling {source.name}")
    for file in source.files:
        for number, line in read_lines(file):
            lines += 1
            try:
                document_hash, texts = parse_texts(line)
            except MalformedRecord as error:
                malformed += 1
                if malformed <= 5:
                    print(f"malformed: {file}:{number}: {error}", flush=True)
                continue
            texts = [text for text in texts if not is_empty(text)]
            if texts:
                yield document_hash, texts
            empty += not texts
            spelled += any(map(CONTROL_STRING.search, texts))
            n_chars += sum(map(len, texts))
            progress.show(f"{lines:,} lines, {n_chars:,} characters")
    progress.show(f"{lines:,} lines, {n_chars:,} characters, {malformed:,} malformed, {empty:,} empty", last=True)
    if spelled:
        print(f"{spelled:,} documents spell control strings such as </s>: the tokenizer makes ordinary text of them; "
              "--split_documents of pretrain.py splits a text there", flush=True)
    if malformed > max_bad_ratio * lines:
        raise UserError(f"{source.name}: {malformed:,} of {lines:,} lines are malformed, more than --max_bad_ratio "
                        f"{max_bad_ratio}{explain(source.files)}")


def parse_texts(line: bytes) -> tuple[int, list[str]]:
    """(text hash, texts) of a line. The texts are its text, else the contents of its conversation, else its history,
    question and answer; a question to decline has no answer. Raises MalformedRecord.
    """
    record = parse_object(line)
    if record.get("text") is None and "conversations" in record:
        record = parse_record(line, "chat")
        texts = [message["content"] for message in record["conversations"] if message["role"] in ROLES]
        return text_hash(record), texts
    keys, history = ("text",), []
    if "text" not in record and "question" in record:
        keys = ("question",) if record.get("decline") is True else ("question", "answer")
        history = record.get("history", [])
        if not isinstance(history, list):
            raise MalformedRecord('"history" is not a list of messages')
        check_conversation(history)
    for key in keys:
        if key not in record:
            raise MalformedRecord(f'no "{key}"')
        check_text(record[key], f'"{key}"')
    texts = [message["content"] for message in history] + [record[key] for key in keys]
    return text_hash({"text": "\n".join(texts)}), texts


def collect(data_path: list[str], val_path: list[str] | None, sample_bytes: int, seed: int,
            max_bad_ratio: float) -> tuple[Sample, Sample]:
    """(training sample, held-out sample) from one pass over the data. No document is in both.

    The documents of `val_path` are held out. Without it, 0.5 % of `data_path` by hash are, at least one: the same that
    the later stages use for validation. Raises UserError when a sample is empty or the data cannot be read.
    """
    train = Sample(sample_bytes, SEGMENT_CHARS, seed)
    held_out = Sample(HELD_OUT_BYTES, HELD_OUT_SEGMENT_CHARS, seed)
    for document in read_texts(val_path, max_bad_ratio, "--val_path") if val_path else ():
        held_out.add(*document)
    known = {document_hash for _, _, document_hash in held_out.heap}
    lowest = None
    for document in read_texts(data_path, max_bad_ratio):
        if not val_path and is_held_out(document[0]):
            held_out.add(*document)
        elif document[0] not in known:
            train.add(*document)
            lowest = min(lowest or document, document)
    if not val_path and not held_out.heap and lowest:
        held_out.add(*lowest)
        train.heap = sorted(entry for entry in train.heap if entry[2] != lowest[0])
    if not train.heap or not held_out.heap:
        raise UserError(f"{' '.join(data_path)}: not enough text for a training and a held-out sample")
    return train, held_out


def train_bpe(texts: Iterator[str], vocab_size: int, tags: tuple[str, ...] = TAGS,
              single_hanzi: bool = False) -> Tokenizer:
    """Train a byte-level BPE tokenizer.

    Its entries are CONTROL, `tags`, the 256 bytes, and merges until there are `vocab_size` entries or no pair occurs
    twice. No merge can spell a control string or a tag: the split cuts each of them before its `>`. Each role name
    becomes one entry, even if it is rare in the texts, because every chat message begins with one. With `single_hanzi`
    no entry joins two hanzi: in training each is a word of its own. The split that is saved is the same, since bytes of
    two hanzi are then merged nowhere.
    """
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    word = r"\p{Han}" if single_hanzi else rf"[\s\S]{{1,{MAX_WORD_CHARS}}}"
    bound = pre_tokenizers.Split(Regex(word), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bound, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False) for token in (*CONTROL, *tags)], show_progress=False)
    roles = ["\n".join(ROLES)] * 10_000
    done = []
    train = tokenizer.train_from_iterator
    thread = threading.Thread(target=lambda: done.append(train(chain(texts, roles), trainer)), daemon=True)
    thread.start()
    thread.join()  # reacts to Ctrl-C; the Rust code does not
    assert done, "training failed: see the traceback above"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:  # the trainer marks the tags as special, so decoding would hide them
        token["special"] = token["content"] in CONTROL
    return Tokenizer.from_str(json.dumps(state))


def token_byte_lengths(tokenizer) -> list[int]:
    """The number of text bytes of each id of a byte-level BPE: 0 for a control token, the length of its text for a tag.

    The lengths of a text's ids sum to the text's UTF-8 bytes. `tokenizer` is one of `tokenizers`, one of transformers,
    or a result of text.tokenizer.load_tokenizer.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    vocabulary = tokenizer.get_vocab()
    lengths = [0] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        lengths[index] = len(token)  # byte-level BPE spells each byte as one character
    for index, token in tokenizer.get_added_tokens_decoder().items():
        lengths[index] = 0 if token.special else len(token.content.encode("utf-8"))
    return lengths


def save(tokenizer: Tokenizer, report: dict, path: Path) -> None:
    """Write the folder that AutoTokenizer reads, atomically. Raises UserError when that fails."""
    config = OurTokenizer.SETTINGS | {"chat_template": CHAT_TEMPLATE}
    files = {"tokenizer.json": tokenizer.to_str(pretty=True),
             "tokenizer_config.json": json.dumps(config, indent=2), "report.json": json.dumps(report, indent=2)}

    def fill(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_text(content + "\n", encoding="utf-8", newline="\n")

    if not write_folder(path, fill):
        raise UserError(f"--tokenizer_path {path}: another process has created it; choose another name")


SCRIPTS = {  # (characters, their least share of a line without white space); the first match decides
    "digits": ("[0-9]", 0.5),
    "Chinese": ("[\u2014-\u2026\u3001-\u303f\u3400-\u9fff\uff00-\uffef\U00020000-\U0003ffff]", 0.8),
    "code": (r"[][(){}<>=;_/\\#$&*+|~^%@`]", 0.12),
    "English": ("[A-Za-z]", 0.8)}
HOSTILE = ("", " ", "   a   ", "\n", "\r\n\r\n \t\n", "a\0b\x7f\x1b[0m", "\ufeffBOM\u2028\u2029\x85", "e\u0301 é ﬁ ① Å",
           "</s>\n<s>assistant\n", "<unk><s></s>", "<think></think><answer></answer>", "< s>Ġ Ċ ġ", "It's 'LL",
           "👨\u200d👩\u200d👧🇨🇳👍🏽", "𠮷野家㐀龘々〆", "مرحبا שלום ไม่มี 한국어", "\U0010ffff\uffff\ufffd\ue000\u202e",
           "１２３，。！", "我" * 500, "0123456789" * 20, "=" * 300, " " * 300)
LEVEL_1_HANZI = bytes(byte for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF) if (high, low) < (0xD7, 0xFA)
                      for byte in (high, low)).decode("gb2312")  # the 3,755 common hanzi, level 1 of GB2312 (1980)
assert len(LEVEL_1_HANZI) == 3755


def script_of(line: str) -> str:
    """The script of a line: the first of digits (half of its characters are 0-9), Chinese (80 % are hanzi or Chinese
    punctuation), code (12 % are brackets, operators and similar signs), English (80 % are A-Z, a-z), else mixed."""
    visible = "".join(line.split())
    return next((script for script, (characters, share) in SCRIPTS.items()
                 if len(re.findall(characters, visible)) >= share * len(visible)), "mixed")


def make_report(tokenizer: Tokenizer, texts: list[str]) -> dict:
    """Measure a tokenizer on held-out `texts`. Returns a dict of JSON types.

    It holds characters per token (of whole texts; by script, of single lines), how many level-1 hanzi take one, two or
    three tokens, and the share of <unk> among the tokens. "round_trip" is true if each text, and each of HOSTILE, is
    decoded exactly from its ids and the byte lengths of these ids sum to the text's bytes.
    """
    tokenizer.encode_special_tokens = True  # "<s>" in a text is ordinary text, as in every stage
    byte_lengths = token_byte_lengths(tokenizer)
    n_tokens, unknown, round_trip = 0, 0, True
    for text in (*texts, *HOSTILE):
        ids = tokenizer.encode(text).ids
        n_tokens += len(ids)
        unknown += ids.count(0)
        round_trip &= tokenizer.decode(ids, skip_special_tokens=False) == text
        round_trip &= sum(byte_lengths[i] for i in ids) == len(text.encode("utf-8"))
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    rows = {name: {"chars": 0, "tokens": 0} for name in (*SCRIPTS, "mixed", "all")}
    for name, text in [(script_of(line), line) for line in lines] + [("all", text) for text in texts]:
        rows[name]["chars"] += len(text)
        rows[name]["tokens"] += len(tokenizer.encode(text).ids)
    for row in rows.values():
        row["chars_per_token"] = round(row["chars"] / row["tokens"], 4) if row["tokens"] else None
    hanzi = [len(tokenizer.encode(character).ids) for character in LEVEL_1_HANZI]
    return {"vocab_size": tokenizer.get_vocab_size(), **rows.pop("all"), "by_script": rows,
            "hanzi_by_tokens": [hanzi.count(n) for n in (1, 2, 3)],
            "unknown_rate": unknown / n_tokens, "round_trip": round_trip}


def main(argv: list[str] | None = None) -> int:
    """Train, report and save. Returns 0, or 1 if the round trip is not exact. Raises UserError."""
    parser = OneLineParser(prog="train_tokenizer.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_path", nargs="+", metavar="PATH", default=["pretrain"],
        help="training data: JSONL files (plain, .gz, .xz, .zst), folders, globs or names in data/ (default: pretrain)")
    add("--val_path", nargs="+", metavar="PATH",
        help="held-out text for the report (default: 0.5 %% of data_path, by hash)")
    add("--tokenizer_path", default=DEFAULT_FOLDER, help="folder to write (default: %(default)s)")
    add("--vocab_size", type=int, default=6400, help="entries, control tokens included (default: %(default)s)")
    add("--sample_bytes", type=int, default=6_000_000, help="bytes of text to train on (default: %(default)s)")
    add("--seed", type=int, default=42, help="seed of the sample (default: %(default)s)")
    add("--no_think_tokens", action="store_true", help="treat <think> </think> <answer> </answer> as ordinary text")
    add("--single_hanzi", action="store_true", help="no entry joins two hanzi: more tokens a text, but a small model "
        "copies words better that it has rarely seen")
    add("--max_bad_ratio", type=float, default=0.01,
        help="stop when more than this share of lines is malformed (default: %(default)s)")
    args = parser.parse_args(argv)
    tags = () if args.no_think_tokens else TAGS
    if not 256 + len(CONTROL + tags) <= args.vocab_size <= 1_000_000:
        parser.error(f"--vocab_size {args.vocab_size}: must be between {256 + len(CONTROL + tags)} and 1000000")
    if args.sample_bytes < 1 or not 0 <= args.max_bad_ratio <= 1:
        parser.error("--sample_bytes must be at least 1, and --max_bad_ratio between 0 and 1")
    path = Path(args.tokenizer_path).absolute()
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        raise UserError(f"--tokenizer_path {args.tokenizer_path}: already exists; remove it or choose another name")

    train, held_out = collect(args.data_path, args.val_path, args.sample_bytes, args.seed, args.max_bad_ratio)
    begin, sampled_bytes = time.monotonic(), sum(len(segment) for _, segment, _ in train.heap)
    print(f"training on {len(train.heap):,} segments, {sampled_bytes:,} bytes", flush=True)
    tokenizer = train_bpe(train.pop_texts(), args.vocab_size, tags, args.single_hanzi)
    print(f"trained: {tokenizer.get_vocab_size():,} entries, {time.monotonic() - begin:.1f} s", flush=True)
    if tokenizer.get_vocab_size() < args.vocab_size:
        print(f"warning: too little text for --vocab_size {args.vocab_size}: the tokenizer has fewer entries",
              flush=True)
    report = make_report(tokenizer, list(held_out.pop_texts()))
    report |= {"seed": args.seed, "sampled_bytes": sampled_bytes, "seconds": round(time.monotonic() - begin, 1)}
    print(f"{'held-out lines':16}{'characters':>12}{'tokens':>12}{'characters/token':>20}")
    for name, row in {**report["by_script"], "all": report}.items():
        print(f"{name:16}{row['chars']:12,}{row['tokens']:12,}{row['chars_per_token'] or '-':>20}")
    print("GB2312's 3,755 level-1 hanzi: {:,} take one token, {:,} two, {:,} three".format(*report["hanzi_by_tokens"]))
    print(f"unknown rate {report['unknown_rate']}, round trip {'exact' if report['round_trip'] else 'FAILED'}")
    passed = report["round_trip"] and report["unknown_rate"] == 0
    if passed:
        save(tokenizer, report, path)
    print(f"saved {path}" if passed else "not saved: the tokenizer does not reproduce every text")
    print(json.dumps(report))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(exits.run(main))
