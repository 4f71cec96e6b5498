"""Data files: which files a flag names, their lines, and the records in them."""

import contextlib
import glob
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from Config import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
ROLES = ("system", "user", "assistant")
DATA_FOLDER = Path("data")  # where a bare name is looked up


class MalformedRecord(ValueError):
    """A line that is not a record; the message says why."""


# ---------------------------------------------------------------------------------------------
# which files a flag names


@dataclass(frozen=True)
class Source:
    """Files that are read together as one source. `share` is its part of the tokens, or None without shares."""

    name: str
    share: float | None
    files: list[Path]


def find_sources(arguments: list[str], flag: str = "--data_path") -> list[Source]:
    """The sources that the arguments of --data_path name: each PATH=SHARE is one, scaled so that the shares sum to 1;
    arguments without shares are one source together.

    An argument has a share if what follows its last "=" is a positive number and no file or folder bears the whole
    name. Raises UserError when a file is missing, or when only some arguments have shares.
    """
    split = [_split_share(argument) for argument in arguments]
    if all(share is None for _, share in split):
        files = list(dict.fromkeys(file for path, _ in split for file in find_files(path, flag)))
        return [Source(" ".join(arguments), None, files)]
    if any(share is None for _, share in split):
        bare = next(path for path, share in split if share is None)
        raise UserError(f"{flag} {bare}: all sources or none have a share, a positive number, as in "
                        f"{bare.partition('=')[0]}=0.5")
    if repeated := sorted({path for path, _ in split if [p for p, _ in split].count(path) > 1}):
        raise UserError(f"{flag} {repeated[0]}: named twice; add its shares up")
    total = math.fsum(share for _, share in split)
    return [Source(path, share / total, find_files(path, flag)) for path, share in split]


def _split_share(argument: str) -> tuple[str, float | None]:
    path, _, share = argument.rpartition("=")
    is_share = re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", share) and 0 < float(share) < math.inf
    return (path, float(share)) if path and is_share and not os.path.exists(argument) else (argument, None)


def find_files(path: str, flag: str = "--data_path") -> list[Path]:
    """The data files behind a file, a folder (its *.jsonl, .gz, .xz, .zst), a glob, or the name of files in data/,
    sorted. Raises UserError, naming the `flag`, when there are none, or when a name is ambiguous."""
    is_name = re.fullmatch(r"[\w-]+", path) is not None
    if is_name and (found := _find_by_name(path, flag)):
        return found
    if is_name and not os.path.exists(path) and (DATA_FOLDER / path).is_dir():
        path = str(DATA_FOLDER / path)
    if os.path.isdir(path):
        found = _files_in(Path(path))
        reason = "the folder holds no *.jsonl, *.jsonl.gz, *.jsonl.xz or *.jsonl.zst"
    elif os.path.isfile(path):
        found, reason = [Path(path)], ""
    else:
        found = [Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        reason = "no such file, folder or match"
        if is_name:
            reason = (f"there is no {DATA_FOLDER / path}.jsonl (or .jsonl.gz, .xz, .zst, or shards "
                      f"{DATA_FOLDER / path}-*.jsonl). Make the built-in corpus, python make_demo_data.py --out_dir "
                      f"{DATA_FOLDER}, or download real data (pip install modelscope), modelscope download --dataset "
                      f"Harris/pretrain --local_dir {DATA_FOLDER}, or name a file of your own: {flag} FILE")
        elif re.search(r"=[-+.\d]+$", path):
            reason += " (a share is a positive number, as in PATH=0.5)"
    if not found:
        raise UserError(f"{flag} {path}: {reason}")
    return sorted(found)


def _files_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())


def _find_by_name(name: str, flag: str) -> list[Path]:
    """NAME.jsonl, NAME.jsonl.{gz,xz,zst} or the shards NAME-*.jsonl[.gz|.xz|.zst] in data/, or none of them. Raises
    UserError where two of these forms are there."""
    if not DATA_FOLDER.is_dir():
        return []
    whole = [DATA_FOLDER / f"{name}{suffix}" for suffix in SUFFIXES if (DATA_FOLDER / f"{name}{suffix}").is_file()]
    shards = [file for file in _files_in(DATA_FOLDER) if file.name.startswith(f"{name}-")]
    forms = whole + ([DATA_FOLDER / f"{name}-*.jsonl"] if shards else [])
    if len(forms) > 1:
        raise UserError(f"{flag} {name}: {forms[0]} and {forms[1]} are there: remove one, or name the file")
    stems = [file.name.partition(".jsonl")[0] for file in shards]
    if doubled := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UserError(f"{flag} {name}: {DATA_FOLDER / doubled[0]} is there in two forms: remove one")
    return whole or shards


# ---------------------------------------------------------------------------------------------
# lines


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of a plain, .gz, .xz or .zst file; blank lines are skipped.

    Raises UserError, with the number of the last good line, when the file is truncated or damaged.
    """
    number = 0
    try:
        if file.suffix == ".gz":
            stream = gzip.open(file, "rb")
        elif file.suffix == ".xz":
            stream = lzma.open(file, "rb")
        elif file.suffix == ".zst":
            stream = contextlib.closing(_zst_lines(file))
        else:
            stream = open(file, "rb")
        with stream as lines:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip(b"\r\n")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is not text
                if line.strip():
                    yield number, line
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read beyond line {number}: {error}") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise UserError(f"{file}: cannot be read beyond line {number}: {error}") from None
        raise


def _zst_lines(file: Path) -> Iterator[bytes]:
    """Lines of a .zst file. Raises EOFError where it ends inside a frame, which zstandard's own reader ignores."""
    try:
        import zstandard  # only where such a file is read
    except ImportError:
        raise UserError(f"{file}: reading .zst needs a package: pip install zstandard") from None

    frame, rest = None, b""
    with open(file, "rb") as stream:
        while block := stream.read(1 << 16):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from lines
                frame, block = (None, frame.unused_data) if frame.eof else (frame, b"")
    if frame is not None:
        raise EOFError("the file ends inside a compressed frame")
    if rest:
        yield rest


# ---------------------------------------------------------------------------------------------
# records


def _unique_keys(pairs: list) -> dict:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise MalformedRecord("duplicate key in one object")
    return record


def _no_constant(name: str):
    raise MalformedRecord(f"{name} is not JSON")


def parse_object(line: bytes) -> dict:
    """One line as a JSON object without duplicate keys. Raises MalformedRecord with the reason."""
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise MalformedRecord(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise MalformedRecord(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise MalformedRecord("not a record: nested too deeply") from None
    except ValueError as error:  # MalformedRecord from the hooks, or a number Python will not read
        raise MalformedRecord(str(error)) from None
    if not isinstance(record, dict):
        raise MalformedRecord("not an object")
    return record


def parse_record(line: bytes, kind: str) -> dict:
    """One line as a record of `kind` "text" ({"text": …}) or "chat" ({"conversations": […]}).

    Raises MalformedRecord with the reason.
    """
    record = parse_object(line)
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 3e38:
        raise MalformedRecord(f'"weight" must be a finite number of at least 0, not {weight!r}')
    if kind == "text":
        if "text" not in record:
            hint = ' (a conversation? chat stages read those)' if "conversations" in record else ""
            raise MalformedRecord(f'no "text"{hint}')
        check_text(record["text"], '"text"')
        record.pop("conversations", None)  # another key is ignored, whatever it holds
    else:
        if "conversations" not in record:
            hint = ' (plain text? pretrain.py reads that)' if "text" in record else ""
            raise MalformedRecord(f'no "conversations"{hint}')
        check_conversation(record["conversations"])
        record.pop("text", None)
    return record


def check_text(text, name: str) -> None:
    """Raises MalformedRecord when `text`, called `name`, is not a string or has a lone surrogate."""
    if not isinstance(text, str):
        raise MalformedRecord(f"{name} is not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MalformedRecord(f"{name} has a lone surrogate at character {error.start}, which is no text") from None


def check_conversation(conversation) -> None:
    """Raises MalformedRecord when `conversation` is not a list of {"role", "content"} messages."""
    if not isinstance(conversation, list):
        raise MalformedRecord('"conversations" is not a list')
    for index, message in enumerate(conversation):
        name = f"message {index + 1}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise MalformedRecord(f'{name} is not an object with "role" and "content"')
        if message["role"] not in ROLES:
            raise MalformedRecord(f'{name}: role {message["role"]!r} is not one of {", ".join(ROLES)}')
        if message["role"] == "system" and index:
            raise MalformedRecord(f"{name}: a system message may only come first")
        check_text(message["content"], f'{name}: "content"')


KINDS = {"question": {"question", "answer"}, "chat": {"conversations"}, "text": {"text"}}


def kind_of(files: list[Path], among: tuple[str, ...] = tuple(KINDS)) -> str:
    """The first of the kinds `among` whose keys the first record has that has any of them. Raises UserError."""
    for file in files:
        for _, line in read_lines(file):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            keys = set(record) if isinstance(record, dict) else set()
            for kind in among:
                if KINDS[kind] <= keys:
                    return kind
    keys = " or ".join(" and ".join(f'"{key}"' for key in sorted(KINDS[kind])) for kind in among)
    raise UserError(f"{files[0]}: no record with {keys}")


def text_hash(record: dict) -> int:
    """64 bits that identify the text of a record as `parse_record` gives it, whatever its file and its weight.

    Decides what is validation: both copies of a duplicate fall on the same side.
    """
    if "text" in record:
        content = record["text"]
    else:
        content = json.dumps([[m["role"], m["content"]] for m in record["conversations"]], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8"), digest_size=8).digest(), "little")


def is_held_out(hashes):
    """True where a text hash (int or array) falls in the 0.5 % that validate when no --val_path is given."""
    return hashes % 200 == 0
