"""Stage 0: a byte-level BPE tokenizer, in bounded memory.

the usual        python train_tokenizer.py --data_path data/pretrain.jsonl
several files    python train_tokenizer.py --data_path 'data/*.jsonl.xz' --tokenizer_path my_tokenizer --vocab_size 8000
tags as text     python train_tokenizer.py --data_path data/pretrain.jsonl --no_think_tokens

Reads {"text": ...} and {"conversations": [...]} lines and writes the folder weakwater_tokenizer, which
AutoTokenizer loads and every other stage reads. BPE as in Sennrich et al. 2016 (arXiv 1508.07909), on bytes as in
GPT-2, so that no text is unknown.

BPE training holds some 100 bytes of memory for each byte of text that it has not seen before, and hardly profits
from more than a few million: so it gets a sample, spread over the whole corpus by cutting it into short pieces, and
the memory needed does not depend on the size of the corpus.
"""

import argparse
import contextlib
import heapq
import json
import os
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from Config import LLMConfig, OneLineParser, UserError
from dataset import TAGS, MalformedRecord, Progress, find_files, is_held_out, parse_record, read_lines, text_hash

CONTROL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = (r"{% for message in messages %}"
                 r"{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}"
                 r"{% endfor %}"
                 r"{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")

PIECE_CHARS = 100  # short pieces: many documents in the sample (6 MB of 100 does what 20 MB of documents do)
MAX_WORD_CHARS = 20  # in training; what the split leaves is a whole clause of Chinese, and clauses hardly repeat
HELD_OUT_BYTES, HELD_OUT_PIECE_CHARS = 4_000_000, 10_000


# ---------------------------------------------------------------------------------------------
# sampling


class Sample:
    """A uniform random sample of the pieces of a stream of documents, of at most `budget` bytes.

    Each piece draws a random key and those with the smallest keys stay (bottom-k sampling, Cohen & Kaplan 2007).
    A piece's chance does not depend on its place, nor on how much there is to come.
    """

    def __init__(self, budget: int, piece_chars: int, seed: int):
        self.budget, self.piece_chars = budget, piece_chars
        self.random = random.Random(seed).random
        self.limit = 1.0  # keys from here on are out, so that no small piece slips in where a large one fell out
        self.bytes = 0
        self.heap: list[tuple[float, bytes, int]] = []  # (-key, UTF-8, hash of the document), largest key first

    def add(self, document_hash: int, texts: list[str]) -> None:
        """Offer a document: its texts are cut into pieces, each of which may stay."""
        for text in texts:
            for start in range(0, len(text), self.piece_chars):
                key = self.random()
                if key < self.limit:
                    piece = text[start:start + self.piece_chars].encode("utf-8")
                    heapq.heappush(self.heap, (-key, piece, document_hash))
                    self.bytes += len(piece)
                while self.bytes > self.budget:
                    largest, piece, _ = heapq.heappop(self.heap)
                    self.limit = -largest
                    self.bytes -= len(piece)

    def drop(self, document_hash: int) -> None:
        """Take a document's pieces out again."""
        self.heap = [entry for entry in self.heap if entry[2] != document_hash]
        heapq.heapify(self.heap)
        self.bytes = sum(len(piece) for _, piece, _ in self.heap)

    def texts(self) -> Iterator[str]:
        """The pieces, each given away: memory shrinks here while it grows where they go."""
        while self.heap:
            yield heapq.heappop(self.heap)[1].decode("utf-8")


def read_texts(path: str, max_bad_ratio: float) -> Iterator[tuple[int, list[str]]]:
    """(text hash, non-empty texts) of each record behind `path`: its text, or the content of each of its messages.

    Prints progress, the first malformed lines and an account of all. Raises UserError when more than
    `max_bad_ratio` of the lines are malformed or a file cannot be read.
    """
    lines = malformed = empty = n_chars = 0
    progress = Progress("sampling")
    for file in find_files(path):
        for number, line in read_lines(file):
            lines += 1
            try:
                record = parse_any(line)
            except MalformedRecord as error:
                malformed += 1
                if malformed <= 5:
                    print(f"malformed: {file}:{number}: {error}", flush=True)
                continue
            contents = [record["text"]] if "text" in record else [m["content"] for m in record["conversations"]]
            texts = [text for text in contents if text]
            n_chars += sum(map(len, texts))
            empty += not texts
            if texts:
                yield text_hash(record), texts
            progress.show(f"{lines:,} lines, {n_chars:,} characters")
    progress.show(f"{path}: {lines:,} lines, {n_chars:,} characters, {malformed:,} malformed, {empty:,} empty", last=True)
    if malformed > max_bad_ratio * lines:
        raise UserError(f"{path}: {malformed:,} of {lines:,} lines are malformed, more than "
                        f"--max_bad_ratio {max_bad_ratio}")


def parse_any(line: bytes) -> dict:
    """A line as a record of text or, where it has none, of conversations. Raises MalformedRecord."""
    try:
        return parse_record(line, "text")
    except MalformedRecord:
        if b'"conversations"' not in line:
            raise
    return parse_record(line, "chat")


def collect(data_path: str, val_path: str | None, sample_bytes: int, seed: int,
            max_bad_ratio: float) -> tuple[Sample, Sample]:
    """(sample to train on, held-out sample), with no document in both, in one pass over the data.

    Held out are the documents of `val_path` or, without it, those of `data_path` that validate in the later stages
    too: 0.5 % by hash, at least one. Raises UserError when either side is empty or the data cannot be read.
    """
    train = Sample(sample_bytes, PIECE_CHARS, seed)
    held_out = Sample(HELD_OUT_BYTES, HELD_OUT_PIECE_CHARS, seed)
    if val_path is not None:
        for document in read_texts(val_path, max_bad_ratio):
            held_out.add(*document)
        if not held_out.heap:
            raise UserError(f"--val_path {val_path}: no text")
    elsewhere = {document_hash for _, _, document_hash in held_out.heap}
    lowest = None
    for document in read_texts(data_path, max_bad_ratio):
        if val_path is None and is_held_out(document[0]):
            held_out.add(*document)
        elif document[0] not in elsewhere:
            train.add(*document)
            lowest = min(lowest or document, document)
    if not held_out.heap and lowest:
        train.drop(lowest[0])
        held_out.add(*lowest)
    if not train.heap:
        raise UserError(f"--data_path {data_path}: no text to train on beside the held-out text")
    return train, held_out


# ---------------------------------------------------------------------------------------------
# training


def train_bpe(texts: Iterator[str], vocab_size: int, tags: tuple[str, ...] = TAGS) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocab_size` entries (fewer where no pair of tokens is left that occurs twice).

    The entries: <unk>, <s>, </s>, the `tags`, 256 bytes, merges. No merge can make up a control string or a tag,
    because the split cuts each of them before its last character.
    """
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    bound = pre_tokenizers.Split(Regex(r"[\s\S]{1,%d}" % MAX_WORD_CHARS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bound, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False,
        special_tokens=[AddedToken(token, normalized=False) for token in (*CONTROL, *tags)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    _interruptible(lambda: tokenizer.train_from_iterator(texts, trainer))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in CONTROL  # the trainer made the tags special: decoding would hide them
    return Tokenizer.from_str(json.dumps(state))


def _interruptible(work) -> None:
    """Call `work` in a thread: the Rust code does not look for Ctrl-C, while waiting for a thread does."""
    failures = []

    def call():
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def token_byte_lengths(tokenizer) -> list[int]:
    """Bytes of text that each id of a byte-level BPE stands for: 0 for a control token, a tag's own text for a tag.

    Takes a `tokenizers` or a transformers tokenizer. The lengths of an encoded text's tokens sum to its UTF-8 bytes.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    lengths = [0] * tokenizer.get_vocab_size()
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token)  # a character stands for a byte in byte-level BPE
    for index, token in tokenizer.get_added_tokens_decoder().items():
        lengths[index] = 0 if token.special else len(token.content.encode("utf-8"))
    return lengths


def save(tokenizer: Tokenizer, report: dict, path: Path) -> None:
    """Write the folder that AutoTokenizer reads, whole or not at all. Raises UserError when it cannot be written."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LLMConfig().max_seq_len,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>",  # never in text; collators mask it in the labels, and </s> must be learnt
        "add_prefix_space": False, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    contents = {"tokenizer.json": tokenizer.to_str(pretty=True),
                "tokenizer_config.json": json.dumps(config, indent=2),
                "report.json": json.dumps(report, ensure_ascii=False, indent=2)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, content in contents.items():
            with open(temporary / name, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(content + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        os.rename(temporary, path)
        with contextlib.suppress(PermissionError):  # Windows cannot sync folders
            descriptor = os.open(path.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"--tokenizer_path {path}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# the report

SCRIPTS = ("Chinese", "English", "digits", "code", "mixed")
HAN = re.compile("[\u2014-\u2026\u3001-\u303f\u3400-\u9fff\uff00-\uffef\U00020000-\U0003ffff]")
LATIN = re.compile(r"[A-Za-z]")
CODE_SIGN = re.compile(r"[][(){}<>=;:_/\\#$&*+|~^%@`\"]")
HOSTILE = (
    "", " ", "   a   ", "\n", "\r\n\r\n \t\n", "\t\tif x:\r\n", "a\x00b\x7f\x1b[0m", "\ufeffBOM", "\u2028\u2029\x85",
    "</s>\n<s>assistant\n", "<unk><s></s>", "<think></think><answer></answer>", "<think", "< s>", "Ġ Ċ ġ",
    "e\u0301 é ﬁ ① Å", "👨‍👩‍👧‍👦🇨🇳👍🏽", "𠮷野家 㐀 龘 々〆ヶ", "مرحبا שלום", "ไทยไม่มีช่องว่าง", "한국어",
    "\U0010ffff\uffff\ufffd\ue000", "\u202eabc\u202c\u200b\u200d", "0123456789" * 20, "１２３，。！", "我" * 500,
    "It's we'LL 'S", "=" * 300, " " * 300)


def script_of(line: str) -> str | None:
    """Which of SCRIPTS a line is; None for a blank one. Decided by its characters other than white space, in order:

    digits    at least half are 0-9
    Chinese   at least 80 % are hanzi or Chinese punctuation
    mixed     at least 20 % are
    code      at least 12 % are brackets, operators and other signs of code: one of []()<>{}=;:_/\\#$&*+|~^%@`"
    English   at least 60 % are A-Z, a-z
    mixed     all others
    """
    visible = "".join(line.split())
    if not visible:
        return None
    share = {name: len(found) / len(visible) for name, found in (
        ("digits", re.findall("[0-9]", visible)), ("Chinese", HAN.findall(visible)),
        ("code", CODE_SIGN.findall(visible)), ("English", LATIN.findall(visible)))}
    if share["digits"] >= 0.5:
        return "digits"
    if share["Chinese"] >= 0.2:
        return "Chinese" if share["Chinese"] >= 0.8 else "mixed"
    if share["code"] >= 0.12:
        return "code"
    return "English" if share["English"] >= 0.6 else "mixed"


def level_1_hanzi() -> list[str]:
    """The 3,755 most frequent hanzi: level 1 of GB2312 (1980), rows 0xB0 to 0xD7."""
    codes = bytes(byte for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF) for byte in (high, low))
    hanzi = [codes[i:i + 2].decode("gb2312", errors="ignore") for i in range(0, len(codes), 2)]
    hanzi = [character for character in hanzi if character]  # the last row ends five early
    assert len(hanzi) == 3755
    return hanzi


def encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """Ids of each text, some hundred texts at a time (an encoding takes far more memory than its text)."""
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch_fast(texts[start:start + 256], add_special_tokens=False):
            yield encoding.ids


def make_report(tokenizer: Tokenizer, texts: list[str]) -> dict:
    """What the tokenizer does to held-out `texts`: plain numbers, ready for JSON.

    chars_per_token is characters of all texts / tokens of all texts; by script, each line is encoded by itself and
    counted where `script_of` puts it. unknown_rate is the share of tokens that are <unk>. round_trip is whether
    every text and every one of HOSTILE comes back exactly from its ids, and the ids' byte lengths sum to its bytes.
    """
    tokenizer.encode_special_tokens = True  # a "<s>" in a text is text, as in every stage
    byte_lengths = token_byte_lengths(tokenizer)
    n_tokens = n_unknown = 0
    round_trip = True
    probes = [*texts, *HOSTILE]
    for index, (text, ids) in enumerate(zip(probes, encode(tokenizer, probes), strict=True)):
        if index < len(texts):
            n_tokens += len(ids)
        n_unknown += ids.count(0)
        round_trip &= tokenizer.decode(ids, skip_special_tokens=False) == text
        round_trip &= sum(byte_lengths[i] for i in ids) == len(text.encode("utf-8"))
    lines = {script: [] for script in SCRIPTS}
    for line in "\n".join(texts).splitlines(keepends=True):
        if script := script_of(line):
            lines[script].append(line)
    by_script = {}
    for script, members in lines.items():
        chars, tokens = sum(map(len, members)), sum(map(len, encode(tokenizer, members)))
        by_script[script] = {"lines": len(members), "chars": chars, "tokens": tokens,
                             "chars_per_token": round(chars / tokens, 4) if tokens else None}
    sizes = [len(ids) for ids in encode(tokenizer, level_1_hanzi())]
    n_chars = sum(map(len, texts))
    return {"vocab_size": tokenizer.get_vocab_size(), "chars_per_token": round(n_chars / n_tokens, 4),
            "held_out": {"texts": len(texts), "chars": n_chars, "tokens": n_tokens,
                         "bytes": sum(len(text.encode("utf-8")) for text in texts)},
            "by_script": by_script, "level_1_hanzi_by_tokens": {str(n): sizes.count(n) for n in (1, 2, 3)},
            "unknown_rate": n_unknown / n_tokens, "round_trip": round_trip}


def print_report(report: dict) -> None:
    """The report as a table."""
    held_out, hanzi = report["held_out"], report["level_1_hanzi_by_tokens"]
    print(f"held-out text: {held_out['texts']:,} texts, {held_out['chars']:,} characters, {held_out['bytes']:,} bytes")
    print(f"{'lines':10}{'characters':>12}{'tokens':>12}{'characters a token':>22}")
    for script, row in report["by_script"].items():
        ratio = "-" if row["chars_per_token"] is None else f"{row['chars_per_token']:.3f}"
        print(f"{script:10}{row['chars']:12,}{row['tokens']:12,}{ratio:>22}")
    print(f"{'all':10}{held_out['chars']:12,}{held_out['tokens']:12,}{report['chars_per_token']:22.3f}")
    print(f"of GB2312's 3,755 level-1 hanzi {hanzi['1']:,} are one token, {hanzi['2']:,} two, {hanzi['3']:,} three")
    print(f"unknown rate {report['unknown_rate']:.6f}; round trip {'exact' if report['round_trip'] else 'FAILED'}")


# ---------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments. Exits with 2, after one line on stderr, on an unknown flag or a value out of range."""
    parser = OneLineParser(prog="train_tokenizer.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_path", required=True, help="JSONL to train on (plain, .gz, .xz, .zst): a file, a folder or a glob")
    add("--val_path", help="held-out text for the report (default: 0.5 %% of data_path, by hash)")
    add("--tokenizer_path", default="weakwater_tokenizer", help="folder to write (default: %(default)s)")
    add("--vocab_size", type=int, default=6400, help="entries, all included (default: %(default)s)")
    add("--sample_bytes", type=int, default=6_000_000,
        help="bytes of text to train on; each takes about 100 bytes of memory (default: %(default)s)")
    add("--seed", type=int, default=42, help="seed of the sample (default: %(default)s)")
    add("--no_think_tokens", action="store_true", help="leave <think> </think> <answer> </answer> as ordinary text")
    add("--max_bad_ratio", type=float, default=0.01,
        help="stop when more than this share of the lines is malformed (default: %(default)s)")
    args = parser.parse_args(argv)
    args.tags = () if args.no_think_tokens else TAGS
    smallest = 256 + len(CONTROL) + len(args.tags)
    if not smallest <= args.vocab_size <= 1_000_000:
        parser.error(f"--vocab_size {args.vocab_size}: must be between {smallest} (256 bytes and the "
                     f"{smallest - 256} tokens with an id of their own) and 1000000")
    if args.sample_bytes < 1:
        parser.error(f"--sample_bytes {args.sample_bytes}: must be at least 1")
    if not 0 <= args.max_bad_ratio <= 1:
        parser.error(f"--max_bad_ratio {args.max_bad_ratio}: must be between 0 and 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    path = Path(args.tokenizer_path).absolute()
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        raise UserError(f"--tokenizer_path {args.tokenizer_path}: is there already; remove it or choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--tokenizer_path {args.tokenizer_path}: cannot be written: {error}") from None

    train, held_out = collect(args.data_path, args.val_path, args.sample_bytes, args.seed, args.max_bad_ratio)
    sampled_bytes, begin = train.bytes, time.monotonic()
    print(f"training on {len(train.heap):,} pieces, {sampled_bytes:,} bytes", flush=True)
    tokenizer = train_bpe(train.texts(), args.vocab_size, args.tags)
    print(f"trained in {time.monotonic() - begin:.1f} s: {tokenizer.get_vocab_size():,} entries", flush=True)
    if tokenizer.get_vocab_size() < args.vocab_size:
        print(f"warning: the text is too small to fill --vocab_size {args.vocab_size}", flush=True)

    report = make_report(tokenizer, list(held_out.texts()))
    report.update(sampled_bytes=sampled_bytes, seed=args.seed, seconds_after_sampling=round(time.monotonic() - begin, 1))
    print_report(report)
    if report["round_trip"] and not report["unknown_rate"]:
        save(tokenizer, report, path)
        print(f"saved {args.tokenizer_path}")
    print(json.dumps(report, ensure_ascii=False))
    return 0 if report["round_trip"] and not report["unknown_rate"] else 1


if __name__ == "__main__":
    # as common.runtime.run would, without the 190 MB and more that its `import torch` takes
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
