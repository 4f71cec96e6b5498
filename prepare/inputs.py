"""Raw files: which there are, and the records in them, in our forms.

A file is a path, or an address that fsspec knows (s3://…, hf://…, https://…). What it is, is detected from its first
bytes.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import fsspec

from Config import UserError
from text.convert import HEAD, as_record, is_list_of_records, read_json_lines, sniff
from text.records import TOOL_ROLES, MalformedRecord, calls_tool, check_text, unpack
from text.shapes import convert_record, parse_value, shape_of

DATA_FILE = re.compile(r"\.(jsonl?|ndjson|parquet|txt|csv|tsv)(\.(gz|xz|zst))?$", re.IGNORECASE)
SOURCE_KEYS = ("source", "data_source")  # of a record
LONGEST_SOURCE, MOST_SOURCES = 60, 200  # a longer name, or one more in a file, is no source but an address, say
MOST_EXAMPLES, MOST_REASONS = 5, 20
MESSAGE_KEYS = ("role", "content", "reasoning_content")
PARQUET = b"PAR1"
NO_TURN = ("no reply", "no question")  # why text/shapes.py refuses a chat with an empty question or reply


class RawFile(NamedTuple):
    """One file of the input. `path` as the user wrote it, or as its folder lists it; `changed`: when it was last."""

    path: str
    size: int
    is_val: bool
    changed: str = ""

    @property
    def source(self) -> str:
        """The name that its records are counted under where they have none of their own."""
        return DATA_FILE.sub("", self.path.rstrip("/").rpartition("/")[2]) or self.path

    def open(self):
        """The file, to be read as bytes."""
        return fsspec.open(self.path, "rb").open() if "://" in self.path else open(self.path, "rb")


def find_raw_files(paths: list[str], flag: str) -> tuple[list[RawFile], list[str]]:
    """The files that the arguments of a flag name, each once, in the order of the arguments and by name within one; and
    the files of named folders that are left alone, for their names are not those of data.

    Raises UserError, naming the `flag`, where there are none, and where an address cannot be read.
    """
    files: dict[str, RawFile] = {}
    others = []
    for path in paths:
        try:
            found, more = _find(path)
            described = [(name, *_size_and_time(name)) for name in found]
        except ImportError as error:
            raise UserError(f"{flag} {path}: {error}: install that package") from None
        except Exception as error:  # each file system has errors of its own
            raise UserError(f"{flag} {path}: {' '.join(str(error).split()) or type(error).__name__}") from None
        if not found:
            left = f" ({', '.join(more[:3])}: name a file to read it)" if more else ""
            raise UserError(f"{flag} {path}: no such file, or no data files in the folder{left}")
        for name, size, changed in described:
            key = os.path.realpath(name) if "://" not in name else name
            if "://" not in name and not os.access(name, os.R_OK):
                raise UserError(f"{flag} {name}: permission denied")
            files.setdefault(key, RawFile(name, size, flag == "--val_path", changed))
        others += more
    return list(files.values()), others


def _find(path: str) -> tuple[list[str], list[str]]:
    """(data files, other files) behind a path, an address, a folder or a glob."""
    system, root = fsspec.core.url_to_fs(path) if "://" in path else (fsspec.filesystem("file"), path)
    shown = system.unstrip_protocol if "://" in path else lambda name: os.path.join(path, os.path.relpath(name, path))
    if system.isdir(root):
        names = sorted(name for name in system.find(root) if not re.search(r"(^|/)\.", os.path.relpath(name, root)))
        is_data = {name: bool(DATA_FILE.search(name)) and ("://" in path or os.path.isfile(name)) for name in names}
        return [shown(n) for n in names if is_data[n]], [shown(n) for n in names if not is_data[n]]
    if system.isfile(root):
        return [path], []
    if "://" in path:
        return sorted(shown(name) for name in system.glob(root) if system.isfile(name)), []
    return sorted(name if path.startswith("/") else os.path.relpath(name) for name in system.glob(root)
                  if system.isfile(name) and not re.search(r"/\.[^/]*$", name)), []


def _size_and_time(path: str) -> tuple[int, str]:
    if "://" not in path:
        status = os.stat(path)
        return status.st_size, str(status.st_mtime_ns)
    system, root = fsspec.core.url_to_fs(path)
    info = system.info(root)
    return info.get("size") or 0, str(next((info[key] for key in ("ETag", "LastModified", "mtime") if key in info), ""))


class _Damaged(Exception):
    """A file is not whole."""


class _Hashed(io.RawIOBase):
    """A file that is read from its beginning to its end, hashed as it is read."""

    def __init__(self, raw):
        self.raw, self.sha256, self.n_read = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block = self.raw.read(len(buffer))
        buffer[:len(block)] = block
        self.sha256.update(block)
        self.n_read += len(block)
        return len(block)

    def read_rest(self) -> str:
        """The hash of the whole file."""
        while self.read(1 << 20):
            pass
        return self.sha256.hexdigest()


@dataclass
class RawReader:
    """Reads the records of one raw file, and counts what it met.

    form: how the file is laid out · shapes: records by shape (text/shapes.py), before they were converted · reasons,
    examples: what was malformed · unreadable: why the file was not read to its end · notes: what conversion left out ·
    n_read: bytes read so far.
    """

    file: RawFile
    rename_field: tuple[tuple[str, str], ...] = ()
    form: str = ""
    shapes: Counter = field(default_factory=Counter)
    records: int = 0
    malformed: int = 0
    reasons: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)
    sources: set[str] = field(default_factory=set)
    unreadable: str | None = None
    sha256: str | None = None
    n_read: int = 0

    def read(self, limit: int | None = None) -> Iterator[tuple[str, dict]]:
        """(number of the line or record, record): {"text"} or {"conversations"}, with "source" and perhaps "weight".
        With a `limit`, that many records at most, malformed ones counted, and no hash.

        Raises UserError where the file cannot be read now: it may be another time.
        """
        line, within = None, 0
        for number, value in self._values(limit is None):
            line, within = number, within + 1 if number == line else 0
            name = f"{number}.{within}" if within else str(number)  # several records on one line
            try:
                record = self._convert(value)
            except MalformedRecord as error:
                self._refuse(name, str(error))
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # a record can hold anything
                self._refuse(name, f"unusual: {type(error).__name__}: {error}")
            else:
                self.records += 1
                yield name, record
            if self.records + self.malformed == limit:
                return

    def summary(self) -> dict:
        """What was met, for the manifest."""
        return {"path": self.file.path, "role": "val" if self.file.is_val else "train", "source": self.file.source,
                "bytes": self.file.size, "sha256": self.sha256, "form": self.form,
                "shape": ", ".join(name for name, _ in self.shapes.most_common(3)), "records": self.records,
                "malformed": self.malformed, "reasons": self._most_reasons(), "examples": self.examples,
                "unreadable": self.unreadable, "notes": dict(self.notes)}

    def _most_reasons(self) -> dict[str, int]:
        most = dict(self.reasons.most_common(MOST_REASONS))
        others = self.reasons.total() - sum(most.values())
        return most | ({"other reasons": others} if others else {})

    def _refuse(self, number: str | int, reason: str) -> None:
        self.malformed += 1
        self.reasons[re.sub(r"(?<![\w-])\d+", "N", reason)] += 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(f"{self.file.path} line {number}: {reason}"[:300])

    def _values(self, with_hash: bool) -> Iterator[tuple[int, object]]:
        """(number, value) of the file; what it cannot give is said in `unreadable`."""
        number = 0
        try:
            with self.file.open() as raw:
                start = raw.read(HEAD)
            if start.startswith(PARQUET):
                self.form = "Parquet"
                if with_hash:
                    with self.file.open() as raw:
                        self.sha256 = _Hashed(raw).read_rest()
                for number, row in enumerate(self._parquet_rows(), start=1):
                    yield number, row
                return
            sniffed = sniff(start, Path(self.file.path))
            if sniffed.reader is not None and b"\n" not in start and re.search(r"\.jsonl\b", self.file.path):
                sniffed = sniffed._replace(reader=read_json_lines, layout="")  # of a line that long the end is not seen
            self.form = sniffed.layout or ("JSON lines" if sniffed.reader else "")
            if sniffed.reader is None:
                self.unreadable = sniffed.problem or "its form is not known"
                self._refuse(0, self.unreadable)
            with self.file.open() as raw:
                hashed = _Hashed(raw)
                try:
                    if sniffed.reader is not None:
                        buffered = io.BufferedReader(hashed, 1 << 16)
                        for number, value in self._parsed(unpack(buffered, sniffed.packing), sniffed):
                            self.n_read = hashed.n_read
                            yield number, value
                finally:
                    if with_hash:
                        self.sha256 = hashed.read_rest()
        except (EOFError, zlib.error, UnicodeError, _Damaged) as error:
            self._end(number, error)
        except OSError as error:
            if error.errno is not None or isinstance(error, (ConnectionError, TimeoutError)):
                raise UserError(f"{self.file.path}: cannot be read now: {error}; go on with --resume") from None
            self._end(number, error)  # what the libraries of .gz, .xz and .zst raise on damage
        except Exception as error:
            if "://" not in self.file.path:
                raise
            raise UserError(f"{self.file.path}: cannot be read now: {type(error).__name__}: {error}; go on with "
                            "--resume") from None

    def _end(self, number: int, error: Exception) -> None:
        self.unreadable = f"not read beyond record {number}: {' '.join(str(error).split()) or type(error).__name__}"
        self._refuse(number, self.unreadable)

    def _parsed(self, stream, sniffed) -> Iterator[tuple[int, object]]:
        if sniffed.reader is read_json_lines and not sniffed.encoding.startswith(("utf-16", "utf-32")):
            yield from _json_lines(stream, sniffed.encoding)
            return
        strict = sniffed.encoding.startswith(("utf-16", "utf-32"))
        text = io.TextIOWrapper(stream, sniffed.encoding, "strict" if strict else "surrogateescape")
        try:
            for where, value in sniffed.reader(text):
                yield int(re.search(r"\d+", where)[0]), value
        finally:
            text.detach()  # else it would close the file, whose rest is to be hashed

    def _parquet_rows(self) -> Iterator[dict]:
        import pyarrow
        import pyarrow.parquet

        try:
            with self.file.open() as raw:
                table = pyarrow.parquet.ParquetFile(raw)
                n_rows = max(1, table.metadata.num_rows)
                for batch in table.iter_batches(batch_size=256):
                    self.n_read += self.file.size * batch.num_rows // n_rows
                    yield from map(_as_text, batch.to_pylist())
        except pyarrow.ArrowException as error:
            raise _Damaged(str(error)) from None

    def _convert(self, value) -> dict:
        original = as_record(value)
        if self.rename_field:
            original = _renamed(original, dict(self.rename_field))
        shape = shape_of(original)
        try:
            record = convert_record(original, self.notes)
        except MalformedRecord as error:
            if str(error) not in NO_TURN:
                raise
            # a chat in every other way: the steps drop it, as they drop others without a reply
            content = json.dumps(original, ensure_ascii=False, default=str)
            record = {"conversations": [{"role": "user", "content": content}]}
        kinds = [key for key in ("conversations", "question", "text") if record.get(key) is not None]
        kind = shape if shape in ("question", "text") else kinds[0]  # an empty "conversations" may stand beside a text
        if kind == "conversations":
            made = {"conversations": self._messages(record["conversations"])}
        elif kind == "question":
            made = {"conversations": self._question(record)}
        else:
            check_text(record["text"], '"text"')
            made = {"text": record["text"]}
        self.shapes[{"chat": "conversations", "question": "question and answer"}.get(shape, shape)] += 1
        weight = original.get("weight")
        if isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 <= weight < 3e38:
            made["weight"] = weight
        return made | {"source": self._source(original)}

    def _messages(self, messages: list[dict]) -> list[dict]:
        """Messages before the first call of a tool, with the keys that count."""
        kept = []
        for message in messages:
            if message["role"] in TOOL_ROLES or calls_tool(message):
                self.notes["conversations end before their first tool call or tool result"] += 1
                break
            for key in MESSAGE_KEYS[1:]:
                if message.get(key) is not None:
                    check_text(message[key], f'"{key}"')
            kept.append({key: message[key] for key in MESSAGE_KEYS if message.get(key) is not None})
        if not kept:
            raise MalformedRecord("no message before a tool call")
        return kept

    def _question(self, record: dict) -> list[dict]:
        if "answer" not in record and not self.file.is_val:
            raise MalformedRecord("a question without an answer")
        messages = [{"role": "user", "content": record["question"]}]
        if not self.file.is_val:  # of a test set, the question alone must not be in training
            messages.append({"role": "assistant", "content": str(record["answer"])})
        for message in messages:
            check_text(message["content"], "a question or answer")
        return messages

    def _source(self, record: dict) -> str:
        for key in SOURCE_KEYS:
            name = record.get(key)
            if (isinstance(name, str) and 0 < len(name) <= LONGEST_SOURCE and "://" not in name and name.isprintable()
                    and (name in self.sources or len(self.sources) < MOST_SOURCES)):
                self.sources.add(name)
                return name
        return self.file.source


def _as_text(value):
    """A value of a Parquet file with its bytes as text, where they are UTF-8."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _as_text(each) for key, each in value.items()}
    return [_as_text(each) for each in value] if isinstance(value, list) else value


def _json_lines(stream, encoding: str) -> Iterator[tuple[int, object]]:
    """(line number, value) of JSON lines; one that is not in the encoding is malformed, and those after it are read."""
    for number, line in enumerate(stream, start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            text = line.decode(encoding).strip().removesuffix(",")
        except UnicodeDecodeError as error:
            yield number, MalformedRecord(f"not {error.encoding} at byte {error.start}")
            continue
        if text not in ("", "[", "]"):
            value = parse_value(text)
            yield from ((number, each) for each in (value if is_list_of_records(value) else [value]))


def _renamed(value, names: dict[str, str]):
    """A record with its keys renamed, those of its messages too, unless the new name is there already."""
    if isinstance(value, list):
        return [_renamed(each, names) for each in value]
    if not isinstance(value, dict):
        return value
    renamed = {}
    for key, each in value.items():
        new = names.get(key, key)
        renamed[key if new in value or new in renamed else new] = _renamed(each, names)
    return renamed
