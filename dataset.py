"""Data: JSONL files → token cache (made once) → selected documents → packed steps.

Read from top to bottom it follows one document on its way into the loss:

1. the token cache     all ids of a source in flat arrays
2. selection           which documents are trained on and which validate; what is cut or skipped
3. order               the documents of an epoch, from one source or from several at their shares
4. steps               documents become micro-batches without padding

What a line and a message become is in text/: records, tokenizer, chat format.
"""

import contextlib
import hashlib
import json
import math
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np

from common.files import remove_leftovers, write_folder, write_lines
from Config import FLAGS, UserError
from text import encode_chat  # noqa: F401  part of the interface of this file
from text.chat import CONTEXT, REPLY, TAG, ChatEncoder
from text.content import BARE, EMPTY_THOUGHT, Reading, RecordReader, describe_found
from text.records import PACKINGS, MalformedRecord, is_held_out, parse_record, read_lines, text_hash
from text.sources import Source, explain, find_sources, kind_of
from text.tokenizer import TextEncoder

# ---------------------------------------------------------------------------------------------
# 1. the token cache

DOCUMENT = np.dtype([("start", "<i8"), ("reply", "<i8"), ("hash", "<u8"), ("weight", "<f4"), ("file", "<u4"),
                     ("line", "<i8")])
REPLIES = np.dtype([("end", "<i8"), ("targets", "<i8"), ("bytes", "<i8")])
CACHE_FORMAT = 6  # part of the fingerprint: raise it when anything above changes what is stored
CACHE_NAME = "[0-9a-f]" * 16  # of a folder


class TokenCache:
    """All documents of a source, encoded, as flat arrays in the files of one folder.

    tokens (uint16; uint32 above 65,536 entries) · types (uint8, chat only) · documents (DOCUMENT, one more
    than there are: the last one's start is the end) · replies (REPLIES). `meta` holds the counts. `files` are the data
    files, under whatever names they have now.
    Raises UserError, naming the file, when one is missing, truncated or damaged.
    """

    def __init__(self, folder: Path, files: list[Path]):
        self.folder, self.files = folder, files
        try:
            self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            sums = self.meta["crc32"]
            if sums.pop("meta.json") != _crc32_of_meta(self.meta):
                raise ValueError("wrong checksum")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'meta.json'}: damaged: {error}") from None
        for name, expected in sums.items():
            file = folder / name
            if not file.is_file() or _crc32(file) != expected:
                raise UserError(f"{file}: missing, truncated or damaged")
        self.is_chat = self.meta["kind"] == "chat"
        self.tokens = FileArray(folder / "tokens.bin", np.dtype(self.meta["token_type"]))
        self.types = FileArray(folder / "types.bin", np.dtype(np.uint8)) if self.is_chat else None
        self.documents = FileArray(folder / "documents.bin", DOCUMENT)
        self.replies = FileArray(folder / "replies.bin", REPLIES)


class FileArray:
    """A flat array in a file that reads only the requested part: `[i]`, `[a:b]`, or `[name]`, a whole field.

    It is not a memory map: touched pages count as this process's memory, which would grow with the file.
    """

    def __init__(self, file: Path, dtype: np.dtype):
        self.stream, self.dtype = open(file, "rb", buffering=0), dtype
        self.length = file.stat().st_size // dtype.itemsize

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, what: int | slice | str) -> np.ndarray:
        if isinstance(what, str):
            return self[:][what]
        begin, end, _ = (what if isinstance(what, slice) else slice(int(what), int(what) + 1)).indices(self.length)
        self.stream.seek(int(begin) * self.dtype.itemsize)
        array = np.empty(max(0, end - begin), self.dtype)
        read = self.stream.readinto(array.view(np.uint8).data) if len(array) else 0
        if read != array.nbytes:
            raise UserError(f"{self.stream.name}: truncated")
        return array if isinstance(what, slice) else array[0]


def _crc32_of_meta(meta: dict) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode("utf-8"))


def _crc32(file: Path) -> int:
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def open_cache(files: list[Path], tokenizer, reading: Reading | str, cache_dir: str,
               max_text_loss: float = FLAGS["max_text_loss"].default) -> TokenCache:
    """The token cache of `files`, built if there is none; a `reading` of "text" or "chat" stands for Reading of it.

    The folder's name is a fingerprint of what the files hold, the tokenizer and the reading, so a file that is only
    touched, moved or renamed is not tokenized again. Other caches of the same files are named when one is built. A
    damaged cache is named in a message and built again; a partial one never has the final name.
    Raises UserError when the data cannot be read, holds no record, or changes while it is read, when the tokenizer
    loses more than `max_text_loss` of the text, or the disk is full.
    """
    reading = Reading(reading) if isinstance(reading, str) else reading
    encoder, parent = TextEncoder.of(tokenizer), Path(cache_dir)
    contents = FileHashes(parent)
    hashes = [contents.of(file) for file in files]
    settings = _sha256([CACHE_FORMAT, reading.key, encoder.fingerprint, encoder.bos_id, encoder.eos_id])
    packings = [file.suffix if file.suffix in PACKINGS else "" for file in files]  # decides how the bytes are read
    folder = parent / _sha256([settings, hashes, packings])
    if folder.is_dir():
        contents.save()
        try:
            return TokenCache(folder, files)
        except UserError as error:
            print(f"token cache refused: {error}; building it again", flush=True)
            shutil.rmtree(folder)
    remove_leftovers(parent, CACHE_NAME)
    meta = {"kind": reading.kind, "settings": settings, "paths": [str(file.resolve()) for file in files]}

    def fill(partial: Path) -> None:
        _build_cache(files, tokenizer, reading, partial, meta, max_text_loss)
        for file, content in zip(files, hashes, strict=True):
            if contents.of(file) != content:
                raise UserError(f"{file}: changed while it was read: start again")

    write_folder(folder, fill)
    contents.save()
    _name_others(folder, meta)
    return TokenCache(folder, files)


class FileHashes:
    """SHA-256 of what files hold. It is remembered beside the token caches by path, size and times, so that a file is
    read only when one of them has changed, or when it was read within two seconds of a change: it may then have been
    written again within the clock's resolution."""

    def __init__(self, cache_dir: Path):
        self.memory, self.is_new = cache_dir / "contents.json", False
        try:  # path -> [size, time of change, of the inode's change, when it was read, hash]
            self.known = dict(json.loads(self.memory.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self.known = {}

    def of(self, file: Path) -> str:
        """The hash of a file. Raises UserError when it cannot be read."""
        path, now, progress = str(file.resolve()), time.time_ns(), Progress(f"reading {file}")
        try:
            status = file.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            known = self.known.get(path)
            if isinstance(known, list) and len(known) == 5 and known[:3] == stamp and known[3] - max(stamp[1:]) > 2e9:
                return known[4]
            digest = hashlib.sha256()
            with open(file, "rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
                    progress.show(f"{stream.tell() / 1e6:,.0f} MB")
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
        self.known[path], self.is_new = [*stamp, now, digest.hexdigest()], True
        return digest.hexdigest()

    def save(self) -> None:
        """Remember the hashes for the next run. A folder that cannot be written costs only time."""
        if self.is_new:
            with contextlib.suppress(UserError):
                write_lines(self.memory, [json.dumps(self.known)])


def _sha256(value) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest()[:16]


def _name_others(folder: Path, meta: dict) -> None:
    """Name the other caches of the same files: of an earlier content, another tokenizer or another reading. They are
    not deleted, since a copy of a file may still use one."""
    others = []
    for other in folder.parent.glob(CACHE_NAME):
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
            found = json.loads((other / "meta.json").read_text(encoding="utf-8"))
            paths = found.get("paths") or [str(Path(file).resolve()) for file in found["files"]]  # of format 3
            if other != folder and paths == meta["paths"]:
                size = sum(file.stat().st_size for file in other.iterdir()) / 1e6
                others.append(f"{other} ({size:,.0f} MB)")
    if others:
        print("older token caches of the same files, of another content, tokenizer or other flags: "
              f"{', '.join(others)}; delete those that are not needed", flush=True)


def _build_cache(files: list[Path], tokenizer, reading: Reading, folder: Path, meta: dict,
                 max_text_loss: float) -> None:
    """Encode all files into `folder`, a block of lines at a time, so that memory does not grow with the data. `meta` is
    what its meta.json says beside the counts."""
    encoder = TextEncoder.of(tokenizer)
    token_type = np.dtype("<u2" if encoder.vocab_size <= 65536 else "<u4")
    reader, is_chat, losses = RecordReader(reading, encoder.control_strings), reading.kind == "chat", Counter()
    meta = meta | {"token_type": token_type.str, "lines": 0, "malformed": 0, "examples": [], "not_ours": []}
    names = ["tokens.bin", "documents.bin", "replies.bin"] + (["types.bin"] if is_chat else [])
    out = {name: open(folder / name, "wb") for name in names}
    n_tokens = n_documents = n_replies = 0
    progress = Progress("tokenizing")
    try:
        for block in _record_blocks(files, reader, meta):
            records = [record for _, _, record in block]
            losses.update(encoder.losses(_sample(records, is_chat)))
            check_losses(losses, max_text_loss, files[0])
            if is_chat:
                encoded = ChatEncoder.of(tokenizer).encode([record["conversations"] for record in records],
                                                           thinking=reading.thoughts)
            else:
                encoded = encoder.encode_texts([record["text"] for record in records])
            documents, replies = np.zeros(len(block), DOCUMENT), []
            for row, (file, line, record), document in zip(documents, block, encoded, strict=True):
                row["start"], row["reply"] = n_tokens, n_replies + len(replies)
                row["hash"], row["weight"] = text_hash(record), record.get("weight", 1.0)
                row["file"], row["line"] = file, line
                replies += [(n_tokens + end, targets, size) for end, targets, size in document.replies]
                n_tokens += len(document.ids)
            # not ndarray.tofile: on a full disk it loses the end of its buffer without a word
            ids = chain.from_iterable(document.ids for document in encoded)
            out["tokens.bin"].write(np.fromiter(ids, token_type).tobytes())
            if is_chat:
                out["types.bin"].writelines(document.types for document in encoded)
            out["documents.bin"].write(documents.tobytes())
            out["replies.bin"].write(np.array(replies, REPLIES).tobytes())
            n_documents, n_replies = n_documents + len(block), n_replies + len(replies)
            progress.show(f"{n_documents:,} documents, {n_tokens:,} tokens")
        end = np.zeros(1, DOCUMENT)
        end["start"], end["reply"] = n_tokens, n_replies
        out["documents.bin"].write(end.tobytes())
    finally:
        for stream in out.values():
            stream.close()
    progress.show(f"{n_documents:,} documents, {n_tokens:,} tokens", last=True)
    meta |= {"found": reader.found, "losses": losses}
    meta["crc32"] = {name: _crc32(folder / name) for name in names}
    meta["crc32"]["meta.json"] = _crc32_of_meta(meta)
    with open(folder / "meta.json", "w", encoding="utf-8") as stream:
        json.dump(meta, stream, indent=1)  # in ASCII: a file's name need not be UTF-8


def _record_blocks(files: list[Path], reader: RecordReader, meta: dict, block_bytes: int = 1 << 22):
    """Blocks of (file index, line number, document), about `block_bytes` of JSON each; lines are counted in `meta`."""
    block, size = [], 0
    for index, file in enumerate(files):
        n_lines = n_malformed = 0
        try:
            for number, line in read_lines(file):
                n_lines += 1
                try:
                    record = parse_record(line, reader.reading.kind)
                except MalformedRecord as error:
                    n_malformed += 1
                    if len(meta["examples"]) < 5:
                        meta["examples"].append([index, number, str(error)[:300]])
                    continue
                block += [(index, number, document) for document in reader.documents(record)]
                size += len(line)
                if block and size >= block_bytes:
                    yield block
                    block, size = [], 0
        except UserError as error:  # from read_lines: not what its name says, or damaged
            raise UserError(f"{error}{explain([file])}") from None
        meta["lines"] += n_lines
        meta["malformed"] += n_malformed
        if n_lines == n_malformed > 0:
            meta["not_ours"].append(index)
    if block:
        yield block


def _sample(records: list[dict], is_chat: bool) -> list[str]:
    """The beginnings of some texts, or of questions and replies, to see whether the tokenizer loses any of it."""
    some = records[::max(1, len(records) // 50)]
    texts = [m["content"] for r in some for m in r["conversations"][:3]] if is_chat else [r["text"] for r in some]
    return [text[:500] for text in texts]


def check_losses(losses: dict[str, int], max_text_loss: float, name) -> None:
    """Raises UserError when a tokenizer loses more of a sample (TextEncoder.losses) than `max_text_loss`."""
    if losses["lost"] > max_text_loss * losses["characters"]:
        lost, unknown = losses["lost"] / losses["characters"], losses["unknown"] / max(1, losses["tokens"])
        raise UserError(f"{name}: the tokenizer loses text: {lost:.2%} of the characters in a sample do not come back "
                        f"from their tokens, {unknown:.2%} of which are unknown tokens. Use another tokenizer (python "
                        "train_tokenizer.py makes one that loses nothing), or allow it with --max_text_loss "
                        f"{math.ceil(lost * 100) / 100}")


class Progress:
    """Prints a progress line every few seconds, and one at the end with the time taken."""

    def __init__(self, what: str, every: float = 5.0):
        self.what, self.every = what, every
        self.begin = self.shown = time.monotonic()

    def show(self, state: str, last: bool = False) -> None:
        """Print `state`, if enough time has passed or it is the last."""
        now = time.monotonic()
        if last or now - self.shown >= self.every:
            self.shown = now
            print(f"{self.what}: {state}, {now - self.begin:.1f} s", flush=True)


# ---------------------------------------------------------------------------------------------
# 2. selection


@dataclass
class Documents:
    """Chosen documents of one or more sources, as parallel arrays with one entry each.

    source: which source, and so which cache · index: number in its cache · length: tokens kept, from its start ·
    targets, bytes: of what is kept · weight: the record's own · hash: of its text. By source: `names`, `shares` (of
    the tokens; None where there are none) and `counts`, which say what became of the other documents. `own_first`: an
    epoch ends when the first source, a stage's own data, has been seen once.
    """

    caches: list[TokenCache]
    source: np.ndarray
    index: np.ndarray
    length: np.ndarray
    targets: np.ndarray
    bytes: np.ndarray
    weight: np.ndarray
    hash: np.ndarray
    names: list[str] = field(default_factory=lambda: [""])
    shares: list[float] | None = None
    counts: list[dict[str, int]] = field(default_factory=list)
    own_first: bool = False

    ARRAYS = ("source", "index", "length", "targets", "bytes", "weight", "hash")

    @classmethod
    def join(cls, parts: list["Documents"], shares: list[float] | None = None) -> "Documents":
        """The documents of several sources, one source after the other."""
        if len(parts) == 1:
            return parts[0]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.ARRAYS[1:]}
        source = np.repeat(np.arange(len(parts), dtype=np.uint16), [len(part) for part in parts])
        return cls([part.caches[0] for part in parts], source, **arrays, names=[part.names[0] for part in parts],
                   shares=shares, counts=[part.counts[0] for part in parts])

    def __len__(self) -> int:
        return len(self.index)

    def take(self, chosen: np.ndarray) -> "Documents":
        """A copy that keeps the documents of `chosen`, a mask or indices."""
        taken = replace(self, counts=[dict(counts) for counts in self.counts])
        taken.keep(chosen)
        return taken

    def keep(self, chosen: np.ndarray) -> None:
        """Keep the documents of `chosen` in place, one array after the other."""
        for name in self.ARRAYS:
            setattr(self, name, getattr(self, name)[chosen])

    def by_source(self) -> list["Documents"]:
        """The documents of each source alone."""
        return [self.take(self.source == number) for number in range(len(self.names))]

    def cache_of(self, document: int) -> TokenCache:
        """The cache that holds a document."""
        return self.caches[self.source[document]]

    def start(self, document: int) -> int:
        """Index of a document's first token in its cache."""
        return int(self.cache_of(document).documents[self.index[document]]["start"])

    def _span(self, document: int) -> slice:
        """Slice of the kept tokens of a document in its cache."""
        begin = self.start(document)
        return slice(begin, begin + int(self.length[document]))

    def tokens(self, document: int) -> np.ndarray:
        """The ids kept of a document, int64 (T,)."""
        return self.cache_of(document).tokens[self._span(document)].astype(np.int64)

    def types(self, document: int) -> np.ndarray:
        """CONTEXT, REPLY, TAG or THINK for each id kept of a conversation, (T,)."""
        cache = self.cache_of(document)
        assert cache.types is not None, "text has no token types: all of it is a target"
        return cache.types[self._span(document)]

    def name(self, document: int) -> str:
        """file:line of a document, for messages."""
        cache = self.cache_of(document)
        row = cache.documents[self.index[document]]
        return f"{cache.files[row['file']]}:{row['line']}"

    def require_thoughts(self) -> None:
        """Raises UserError when no reply of all sources together has a thought."""
        for number, cache in enumerate(self.caches):
            thoughts = [name for name in cache.meta["found"] if name.startswith("reply: ") and BARE not in name]
            if thoughts and any((self.types(d) == TAG).any() for d in np.flatnonzero(self.source == number)):
                return
        raise UserError(f"{' '.join(self.names)}: no reply has a thought: distill.py learns from replies of the form "
                        "<think>…</think><answer>…</answer>, or with the thought in reasoning_content; for replies "
                        f"without thoughts there is SFT.py{explain([f for cache in self.caches for f in cache.files])}")

    def say_what_fades(self, reading: Reading, say) -> None:
        """Say, in one line, that earlier skills fade where the sources lack what keeps them: text, and in distillation
        also replies without thoughts."""
        lacking, found = {}, {name for cache in self.caches for name in cache.meta["found"]}
        if reading.thoughts and not found & {f"reply: {shape}" for shape in (BARE, EMPTY_THOUGHT)}:
            lacking["chats without thoughts"] = "sft_512=0.2"
        if all(cache.is_chat for cache in self.caches):
            lacking["text"] = "pretrain=0.1"
        if lacking:
            say(f"earlier skills fade: --data_path names no {' and no '.join(lacking)}; add some with a share, such as "
                f"{' '.join(lacking.values())}")

    def fingerprint(self) -> str:
        """SHA-256 of the content that is trained on, wherever the files are."""
        digest = hashlib.sha256()
        for array, dtype in ((self.hash, np.uint64), (self.length, np.int64), (self.weight, np.float32)):
            digest.update(array.astype(dtype).tobytes())
        if self.shares is not None:  # which source a document is in decides the order
            digest.update(self.source.tobytes())
            if self.own_first:
                digest.update(b"own first")
        return digest.hexdigest()


def load_documents(source: Source | str, tokenizer, reading: Reading | str, cache_dir: str, max_seq_len: int,
                   min_tokens: int = 0, max_tokens: int | None = None,
                   max_bad_ratio: float = FLAGS["max_bad_ratio"].default, say=print,
                   max_text_loss: float = FLAGS["max_text_loss"].default) -> Documents:
    """The documents of one source, or behind one path, that fit the settings; `reading` as in `open_cache`.

    Conversations are chosen by their whole length (min_tokens..max_tokens). One longer than max_seq_len
    loses whole last turns; one whose first reply does not fit, or that has no reply, is skipped. Text is
    never skipped for its length. Everything left out is counted (Documents.counts); `say` prints log lines: what the
    records hold and what the tokenizer loses.
    Raises UserError when too many lines are malformed, the tokenizer loses text, or nothing is left.
    """
    reading = Reading(reading) if isinstance(reading, str) else reading
    source = source if isinstance(source, Source) else find_sources([source])[0]
    cache = open_cache(source.files, tokenizer, reading, cache_dir, max_text_loss)
    meta, found, losses = cache.meta, cache.meta["found"], cache.meta["losses"]
    counts = {"lines": meta["lines"], "malformed": meta["malformed"], "empty": found.get("empty", 0)}
    counts |= {name: n for name, n in found.items() if name.startswith(("left out for", "shortened for"))}
    examples = [f"{source.files[file]}:{line}: {reason}" for file, line, reason in meta["examples"]]
    for example in examples:
        say(f"malformed: {example}")
    if meta["malformed"] > max_bad_ratio * meta["lines"]:
        raise UserError(f"{source.name}: {meta['malformed']:,} of {meta['lines']:,} lines are malformed, more than "
                        f"--max_bad_ratio {max_bad_ratio} (the first: {examples[0]}){explain(source.files)}")
    if meta["not_ours"] and max_bad_ratio < 1:  # among many good lines it would be lost in silence
        file = source.files[meta["not_ours"][0]]
        raise UserError(f"{file}: none of its lines is a record; take it out of {source.name}{explain([file])}")
    for line in describe_found(found, reading):
        say(f"found in {source.name}: {line}")
    if losses:
        check_losses(losses, max_text_loss, source.name)
        say(f"tokenizer on a sample of {source.name}: {losses['exact']:,} of {losses['texts']:,} texts decode exactly, "
            f"{losses['unknown'] / max(1, losses['tokens']):.2%} unknown tokens, "
            f"{losses['lost'] / max(1, losses['characters']):.2%} of the characters lost"
            + (": bits per byte do not compare with those of other tokenizers" if losses["lost"] else ""))
    blocks = []
    n_documents = len(cache.documents) - 1
    for first in range(0, n_documents, 1 << 13):  # in blocks: only the chosen documents take memory
        block, counted = _choose(cache, first, min(first + (1 << 13), n_documents), max_seq_len, min_tokens, max_tokens)
        blocks.append(block)
        for reason, number in counted.items():
            counts[reason] = counts.get(reason, 0) + number
    if not sum(len(index) for index, *_ in blocks):
        limits = "" if not cache.is_chat else (f" with --min_tokens {min_tokens} --max_tokens {max_tokens} "
                                            f"--max_seq_len {max_seq_len}")
        raise UserError(f"{source.name}: no document is left{limits} ({_in_words(counts)})"
                        f"{explain(source.files) if meta['malformed'] or not meta['lines'] else ''}")
    fields = list(zip(*blocks, strict=True))
    del blocks
    for i, parts in enumerate(fields):  # one after the other: no more than one is in memory twice
        fields[i] = np.concatenate(parts)
    return Documents([cache], np.zeros(len(fields[0]), np.uint16), *fields, names=[source.name], counts=[counts])


def _choose(cache: TokenCache, begin: int, end: int, max_seq_len: int, min_tokens: int,
            max_tokens: int | None) -> tuple[tuple, dict[str, int]]:
    """The fields of Documents for those of the cache's documents `begin` to `end` that fit; why the others do not."""
    table = cache.documents[begin:end + 1]
    start, first = np.array(table["start"]), np.array(table["reply"])
    replies = cache.replies[first[0]:first[-1]]
    first -= first[0]
    length, n_replies = np.diff(start), np.diff(first)
    weight = np.array(table["weight"][:-1])
    if cache.is_chat:
        limit = np.repeat(start[:-1] + max_seq_len, n_replies)
        fits = np.concatenate(([0], np.cumsum(replies["end"] <= limit)))
        kept_replies = fits[first[1:]] - fits[first[:-1]]
        left_out = {"fewer than min_tokens": length < min_tokens,
                    "more than max_tokens": length > (max_tokens or np.inf),
                    "no assistant turn": n_replies == 0, "first reply does not fit": kept_replies == 0,
                    "weight 0": weight == 0}
    else:
        kept_replies, left_out = n_replies, {"weight 0": weight == 0}
    kept, counts = np.ones(len(length), bool), {}
    for reason, applies in left_out.items():  # the first that applies counts
        counts[reason] = int((kept & applies).sum())
        kept &= ~applies
    if cache.is_chat:
        last_end = np.array(replies["end"])[np.maximum(first[1:], 1) - 1] if len(replies) else start[1:]
        counts["lost last turns"] = int((kept & (kept_replies < n_replies)).sum())
        counts["lost a last turn without reply"] = int((kept & (n_replies > 0) & (last_end < start[1:])).sum())
    index = np.flatnonzero(kept)
    first_kept, end_kept = first[index], first[index] + kept_replies[index]
    targets = np.concatenate(([0], np.cumsum(replies["targets"])))
    sizes = np.concatenate(([0], np.cumsum(replies["bytes"])))
    return ((begin + index).astype(np.uint32), (replies["end"][end_kept - 1] - start[index]).astype(np.int32),
            (targets[end_kept] - targets[first_kept]).astype(np.int32),
            (sizes[end_kept] - sizes[first_kept]).astype(np.int32), weight[index],
            np.array(table["hash"][:-1])[index]), counts


def load_splits(sources: list[Source], val_path: list[str] | None, tokenizer, reading: Reading | str, cache_dir: str,
                max_seq_len: int, min_tokens: int = 0, max_tokens: int | None = None,
                max_bad_ratio: float = FLAGS["max_bad_ratio"].default, say=print,
                max_text_loss: float = FLAGS["max_text_loss"].default) -> tuple[Documents, Documents]:
    """(training documents, validation documents), with no text on both sides, and a printed account of all lines.

    `reading` as in `open_cache`; of several sources of a chat stage some may be text. Without `val_path` the documents
    of each source whose text's hash falls in 0.5 % validate, at least one.
    """
    reading = Reading(reading) if isinstance(reading, str) else reading
    mixed = reading.kind == "chat" and len(sources) > 1
    kinds = [kind_of(source.files, ("chat", "text")) if mixed else reading.kind for source in sources]
    if mixed and "chat" not in kinds:
        raise UserError("--data_path: none of the sources has conversations: pretrain.py reads text")

    def load(source: Source, kind: str) -> Documents:
        return load_documents(source, tokenizer, replace(reading, kind=kind), cache_dir, max_seq_len, min_tokens,
                              max_tokens, max_bad_ratio, say, max_text_loss)

    trains = list(map(load, sources, kinds))
    if val_path is None:
        masks = [_held_out(train.hash) for train in trains]
        vals = [train.take(mask) for train, mask in zip(trains, masks, strict=True)]
        for train, mask in zip(trains, masks, strict=True):
            train.keep(~mask)
    else:
        vals = [load(source, own) for source, own in _validation_sources(val_path, reading.kind, mixed)]
    known = np.array([], np.uint64)
    for number, val in enumerate(vals):
        _, once = np.unique(val.hash, return_index=True)
        once = once[~np.isin(val.hash[once], known)]
        counts = trains[number].counts if val_path is None else val.counts
        counts[0]["doubles in validation"] = len(val) - len(once)
        val.keep(once)  # in the order of the hashes: the first --eval_tokens are then a fair sample
        known = np.append(known, val.hash)
    if val_path is not None or len(sources) > 1:
        for train in trains:
            held_out = np.isin(train.hash, known)
            train.counts[0]["also in the validation data"] = int(held_out.sum())
            train.keep(~held_out)
    different = [len(np.unique(train.hash)) for train in trains]
    for train, n in zip(trains, different, strict=True):
        train.counts[0]["doubles in training"] = len(train) - n
    train, val = Documents.join(trains, [s.share for s in sources] if len(sources) > 1 else None), Documents.join(vals)
    for part in trains:
        if not len(part):
            raise UserError(f"{part.names[0]}: nothing is left to train on beside the validation documents "
                            f"({_in_words(part.counts[0])}): add data, or name other validation data with --val_path")
        say(f"data: {part.names[0]}: {_in_words(part.counts[0])}; {len(part):,} train "
            f"({int(part.length.sum()):,} tokens)")
    if len(sources) > 1 and (n := sum(different) - len(np.unique(train.hash))):
        say(f"data: {n:,} documents are in more than one source")
    for part in vals:
        counted = "" if val_path is None else f"{_in_words(part.counts[0])}; "
        say(f"validation: {part.names[0]}: {counted}{len(part):,} documents ({int(part.length.sum()):,} tokens)")
    return train, val


def _validation_sources(paths: list[str], kind: str, mixed: bool) -> list[tuple[Source, str]]:
    """(source, kind) of the files in --val_path: one source, or with mixed sources one for chats and one for text."""
    (source, *_) = found = find_sources(paths, "--val_path")
    if found[0].share is not None:
        raise UserError(f"--val_path {paths[0]}: validation data has no shares")
    if not mixed:
        return [(source, kind)]
    kinds = {file: kind_of([file], ("chat", "text")) for file in source.files}
    names = sorted(set(kinds.values()))
    return [(Source(source.name if len(names) == 1 else f"{source.name} ({own})", None,
                    [file for file in source.files if kinds[file] == own]), own) for own in names]


def _held_out(hashes: np.ndarray) -> np.ndarray:
    """Mask of the documents that validate: 0.5 % by hash, at least one."""
    held_out = is_held_out(hashes)
    return held_out if held_out.any() else hashes == hashes.min()


def _in_words(counts: dict[str, int]) -> str:
    lines, *rest = counts.items()
    return f"{lines[1]:,} lines" + "".join(f", {number:,} {what}" for what, number in rest if number or what in (
        "malformed", "empty"))


# ---------------------------------------------------------------------------------------------
# 3. order


def epoch_order(documents: Documents, seed: int, epoch: int, order: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(document numbers (N,) in the order of an epoch, with shares also which pass over its source each belongs to).

    One source: each document once, in an order drawn from (seed, epoch), or as in the file.

    With shares: each source has its own order, and the next document comes from the source furthest behind its share,
    measured as (tokens of the source so far) / share. A document's sort key is this measure before it, so the order
    is a merge of the sources. A source that is used up starts again (shuffled: in another order). The epoch ends
    when the source that lasts longest at its share has been seen once; with `own_first`, when the first has: beside a
    large source, one epoch would else be many passes over a small one.
    """
    def passes_over(n: int, n_passes: int, source: int) -> np.ndarray:
        numbers = np.tile(np.arange(n, dtype=np.uint32), (n_passes, 1))
        if order == "shuffled":
            numbers = np.random.default_rng([seed, epoch, source]).permuted(numbers, axis=1)
        return numbers.ravel()

    if documents.shares is None:
        n = len(documents)
        if order == "file":
            return np.arange(n, dtype=np.uint32), None
        return np.random.default_rng([seed, epoch]).permutation(n).astype(np.uint32), None
    ends = np.cumsum(np.bincount(documents.source, minlength=len(documents.names)))
    begins = np.append(0, ends[:-1])
    ranges = list(zip(begins, ends, documents.shares, strict=True))
    lasts = [int(documents.length[begin:end].sum()) / share for begin, end, share in ranges]
    # for rounding: sources that last equally long are each seen once
    epoch_end = (lasts[0] if documents.own_first else max(lasts)) * (1 - 1e-9)
    numbers, passes, places = [], [], []
    for source, (begin, end, share) in enumerate(ranges):
        n = end - begin
        n_passes = 1 if lasts[source] >= epoch_end else math.ceil(epoch_end / lasts[source])
        number = begin + passes_over(n, n_passes, source)
        length = documents.length[number]
        place = (np.cumsum(length) - length) / share
        within = place < epoch_end
        numbers.append(number[within].astype(np.uint32))
        passes.append((np.arange(len(number)) // n)[within].astype(np.uint32))
        places.append(place[within])
    merged = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(numbers)[merged], np.concatenate(passes)[merged]


# ---------------------------------------------------------------------------------------------
# 4. steps


@dataclass
class MicroBatch:
    """One packed buffer for `model(**micro_batch.to(device))`: tokens (1, T) of the documents (or segments
    of documents) of `lengths`, and what its N predicting positions should predict, with which loss weight."""

    tokens: np.ndarray
    lengths: list[int]
    target_index: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def to(self, device, multiple_of: int = 64) -> dict:
        """The model's keyword arguments, as tensors on `device`.

        On a CPU the numbers of tokens and of targets are rounded up to a multiple: a document of a few tokens without a
        target fills the buffer up, and targets of weight 0 their list. For each new size of a matmul oneDNN compiles
        code, which takes a quarter of the time of a small model's step.
        """
        import torch  # here, so that training a tokenizer does not cost the memory of torch

        lengths, kind = self.lengths, torch.device(device).type
        arrays = dict(tokens=self.tokens, target_index=self.target_index, targets=self.targets, weights=self.weights)
        if kind == "cpu":
            if more := -len(self.tokens) % multiple_of:
                lengths = [*lengths, more]
            arrays = {name: np.pad(array, (0, -len(array) % multiple_of)) for name, array in arrays.items()}
        arrays |= dict(tokens=arrays["tokens"][None], boundaries=np.cumsum([0, *lengths], dtype=np.int32))
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        on_cuda = kind == "cuda"
        if on_cuda:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        # from memory that is not pinned a copy must be waited for: it would read on after the memory is freed
        return {"lengths": lengths} | {n: t.to(device, non_blocking=on_cuda) for n, t in tensors.items()}


@dataclass
class Step:
    """One optimizer step: this rank's micro-batches, and the loss weight and tokens of all ranks together."""

    micro_batches: list[MicroBatch]
    total_weight: float
    segments: list["Segment"]

    @property
    def tokens(self) -> int:
        """Positions computed, all of them real tokens."""
        return sum(length for _, _, length in self.segments)


Segment = tuple[int, int, int]  # document, first token, number of tokens


def make_micro_batch(documents: Documents, segments: list[Segment], type_weights: np.ndarray | None) -> MicroBatch:
    """Lay segments of documents end to end. A token predicts the next one of its document, also
    across rows; the last token of a document predicts nothing.

    `type_weights` (4,) is the loss weight of each token type, to be multiplied by the record's own weight;
    None leaves every target at weight 1, for evaluation.
    """
    tokens, index, targets, weights = [], [], [], []
    position = 0
    for document, offset, length in segments:
        cache = documents.cache_of(document)
        begin = documents.start(document) + offset
        predicting = min(length, int(documents.length[document]) - offset - 1)
        read = cache.tokens[begin:begin + predicting + 1]  # all of the segment, and what its last token predicts
        tokens.append(read[:length])
        following = read[1:]
        if cache.is_chat:
            types = cache.types[begin + 1:begin + 1 + predicting]
        else:
            types = np.full(predicting, REPLY, np.uint8)
        if type_weights is None:
            weight = (types != CONTEXT).astype(np.float32)
        else:
            weight = type_weights[types] * documents.weight[document]
        counted = np.flatnonzero(weight)
        index.append(position + counted)
        targets.append(following[counted])
        weights.append(weight[counted])
        position += length
    return MicroBatch(np.concatenate(tokens).astype(np.int64), [length for _, _, length in segments],
                      np.concatenate(index), np.concatenate(targets).astype(np.int64),
                      np.concatenate(weights).astype(np.float32))


class StepLoader:
    """Optimizer steps by (epoch, step in the epoch), so resume needs only the step's number.

    A step is chosen as a whole, batch_size × accumulation_steps × ranks × max_seq_len tokens, and only then
    cut into micro-batches: the same documents and so the same gradient, however it is cut.

    Text: the documents of an epoch form one stream, cut into rows of max_seq_len tokens; a document that does
    not end in its row continues in the next. Chat: whole documents are taken in order as long as they fit; one
    that does not fit waits for the next step. A micro-batch may exceed batch_size × max_seq_len by less than one
    conversation. Text among chats is cut into segments of at most max_seq_len tokens. There are no padding tokens,
    but for the few that MicroBatch.to adds on a CPU.
    """

    LOOK_AHEAD = 256  # conversations that may wait at a time; they fill the gaps of later steps

    def __init__(self, documents: Documents, max_seq_len: int, batch_size: int, accumulation_steps: int, seed: int,
                 order: str = "shuffled", rank: int = 0, world_size: int = 1, tag_weight: float = 1.0,
                 think_weight: float = 1.0):
        self.documents, self.max_seq_len, self.seed, self.order = documents, max_seq_len, seed, order
        self.micro_batches_per_rank, self.rank = accumulation_steps, rank
        self.n_micro_batches = accumulation_steps * world_size
        self.micro_batch_tokens = batch_size * max_seq_len
        self.step_tokens = self.micro_batch_tokens * self.n_micro_batches
        self.type_weights = np.array([0.0, 1.0, tag_weight, think_weight], np.float32)  # by token type
        self.is_chat = any(cache.is_chat for cache in documents.caches)
        self._epoch, self._steps = None, {}
        seen = slice(None) if documents.shares is None else epoch_order(documents, seed, 0, order)[0]
        self.tokens_per_epoch = int(documents.length[seen].sum())  # with shares it differs a little between epochs
        self.target_share = int(documents.targets[seen].sum()) / self.tokens_per_epoch
        self.mean_length = float(documents.length[seen].mean())

    def steps_in_epoch(self, epoch: int) -> int:
        """Number of optimizer steps in an epoch; for conversations it depends a little on their order."""
        if not self.is_chat and self.documents.shares is None:
            return math.ceil(self.tokens_per_epoch / self.step_tokens)
        if epoch not in self._steps:
            self._prepare(epoch)
        return self._steps[epoch]

    def epoch_ends(self, epochs: int, max_steps: int = 0) -> list[int]:
        """Steps done at the end of each epoch, as far as the one in which `max_steps` (0: no limit) falls."""
        ends = [0]
        for epoch in range(epochs):
            ends.append(ends[-1] + self.steps_in_epoch(epoch))
            if 0 < max_steps <= ends[-1]:
                break
        return ends[1:]

    def step(self, epoch: int, step_in_epoch: int) -> Step:
        """A step of an epoch, counted from 0. One epoch's order is kept: ask for the steps of an epoch in a row."""
        self._prepare(epoch)
        per_micro_batch = self._cut_rows(step_in_epoch) if self._plan is None else (
            self._share_out(self._plan[step_in_epoch]))
        all_segments = [segment for segments in per_micro_batch for segment in segments]
        total_weight = sum(map(self._weight, all_segments))
        mine = per_micro_batch[self.rank * self.micro_batches_per_rank:][:self.micro_batches_per_rank]
        mine = [segments for segments in mine if segments]
        weights = self.type_weights
        if not mine:  # the last step of an epoch may be too small for all ranks, but each must join the all-reduce
            mine, weights = [all_segments[:1]], np.zeros_like(weights)
        micro_batches = [make_micro_batch(self.documents, segments, weights) for segments in mine]
        return Step(micro_batches, total_weight or 1.0, all_segments)  # without any target the loss is 0, not 0/0

    def visits(self, epoch_ends: list[int], total_steps: int) -> np.ndarray:
        """How many documents of each source `total_steps` steps begin, (number of sources,)."""
        visits, begin = np.zeros(len(self.documents.names), np.int64), 0
        for epoch, end in enumerate(epoch_ends):
            self._prepare(epoch)
            steps = min(end, total_steps) - begin
            if self._plan is None:
                begun = self._order[self._ends - self.documents.length[self._order] < steps * self.step_tokens]
            else:
                segments = [segment for chosen in self._plan[:steps] for segment in chosen]
                begun = self._order[self._of[segments][self._offset[segments] == 0]]
            visits += np.bincount(self.documents.source[begun], minlength=len(visits))
            begin = end
        return visits

    def _prepare(self, epoch: int) -> None:
        """The order of an epoch, and from it the stream (text) or the plan of steps (chat)."""
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._order, passes = epoch_order(self.documents, self.seed, epoch, self.order)
        length = self.documents.length[self._order]
        if not self.is_chat:
            self._plan, self._ends = None, np.cumsum(length)
            self._steps[epoch] = math.ceil(int(self._ends[-1]) / self.step_tokens)
            return
        # text longer than a row is cut into segments; `_of`: which entry of the order each segment is of
        is_text = np.array([not cache.is_chat for cache in self.documents.caches])[self.documents.source[self._order]]
        n_segments = np.where(is_text, -(-length // self.max_seq_len), 1)
        self._of = np.repeat(np.arange(len(length)), n_segments)
        number = np.arange(len(self._of)) - np.repeat(np.cumsum(n_segments) - n_segments, n_segments)
        self._offset = number * self.max_seq_len
        rest = length[self._of] - self._offset
        self._length = np.where(is_text[self._of], np.minimum(rest, self.max_seq_len), rest)
        self._plan = self._plan_epoch(None if passes is None else passes[self._of])
        self._steps[epoch] = len(self._plan)

    def _plan_epoch(self, passes: np.ndarray | None) -> list[list[int]]:
        """Segments of each step: first those that wait, then the next in order, as long as they fit. A segment never
        overtakes a waiting one of an earlier pass over the same source."""
        lengths, shortest, n = self._length.tolist(), int(self._length.min()), len(self._length)
        source = [0] * n if passes is None else self.documents.source[self._order[self._of]].tolist()
        passes = [0] * n if passes is None else passes.tolist()
        coming, waiting, plan = 0, [], []
        while coming < n or waiting:
            free, chosen, held, waiting = self.step_tokens, [], iter(waiting), []
            first_pass: dict[int, int] = {}  # source -> the earliest pass with a waiting segment
            while True:
                segment = next(held, None)
                if segment is None:
                    if coming == n or free < shortest or len(waiting) >= self.LOOK_AHEAD:
                        break
                    segment, coming = coming, coming + 1
                of, number = source[segment], passes[segment]
                if lengths[segment] <= free and number <= first_pass.get(of, number):
                    chosen.append(segment)
                    free -= lengths[segment]
                else:
                    waiting.append(segment)
                    first_pass.setdefault(of, number)
            plan.append(chosen)
        return plan

    def _share_out(self, chosen: list[int]) -> list[list[Segment]]:
        """Whole segments over the step's micro-batches, the longest first, each to the emptiest so far: their
        sizes differ by at most one segment (Graham 1969, longest processing time first)."""
        shares = [[] for _ in range(self.n_micro_batches)]
        fill = [0] * self.n_micro_batches
        for segment in sorted(chosen, key=lambda s: -self._length[s]):
            emptiest = fill.index(min(fill))
            length = int(self._length[segment])
            shares[emptiest].append((int(self._order[self._of[segment]]), int(self._offset[segment]), length))
            fill[emptiest] += length
        return shares

    def _cut_rows(self, step_in_epoch: int) -> list[list[Segment]]:
        """The stretch of the epoch's stream that is this step, cut at rows, documents and micro-batches."""
        begin = step_in_epoch * self.step_tokens
        end = min(begin + self.step_tokens, int(self._ends[-1]))
        first, last = np.searchsorted(self._ends, [begin, end], side="right")
        rows = np.arange(begin, end, self.max_seq_len)
        inside = self._ends[first:last]
        cuts = np.union1d(np.append(rows, end), inside[inside < end])
        place = np.searchsorted(self._ends, cuts[:-1], side="right")
        documents = self._order[place]
        offsets = cuts[:-1] - (self._ends[place] - self.documents.length[documents])
        micro_batch = (cuts[:-1] - begin) // self.micro_batch_tokens
        shares = [[] for _ in range(self.n_micro_batches)]
        for share, document, offset, length in zip(
                micro_batch.tolist(), documents.tolist(), offsets.tolist(), np.diff(cuts).tolist(), strict=True):
            shares[share].append((document, offset, length))
        return shares

    def _weight(self, segment: Segment) -> float:
        """Sum of the loss weights of a segment's targets."""
        document, offset, length = segment
        cache = self.documents.cache_of(document)
        predicting = min(length, int(self.documents.length[document]) - offset - 1)
        if not cache.is_chat:
            return predicting * float(self.documents.weight[document])
        begin = self.documents.start(document) + offset + 1
        per_type = np.bincount(cache.types[begin:begin + predicting], minlength=4)
        return float(per_type @ self.type_weights.astype(np.float64)) * float(self.documents.weight[document])


def evaluation_batches(documents: Documents, max_seq_len: int, batch_tokens: int,
                       max_tokens: int = 0) -> Iterator[MicroBatch]:
    """Every document alone from its `<s>`, in disjoint windows of max_seq_len tokens, all targets at weight 1.

    Buffers hold up to `batch_tokens` tokens. `max_tokens` > 0 ends after the document that reaches it;
    `evaluated(documents, max_tokens)` says which those are.
    """
    segments, filled = [], 0
    for document in range(evaluated(documents, max_tokens)):
        length = int(documents.length[document])
        for offset in range(0, length, max_seq_len):
            window = min(max_seq_len, length - offset)
            if segments and filled + window > batch_tokens:
                yield make_micro_batch(documents, segments, None)
                segments, filled = [], 0
            segments.append((document, offset, window))
            filled += window
    if segments:
        yield make_micro_batch(documents, segments, None)


def evaluated(documents: Documents, max_tokens: int) -> int:
    """How many of the first documents hold `max_tokens` tokens (0: all)."""
    if not max_tokens:
        return len(documents)
    return min(len(documents), int(np.searchsorted(np.cumsum(documents.length), max_tokens)) + 1)
