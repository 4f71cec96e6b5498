"""Data: JSONL files → token cache (made once) → packed buffers → optimizer steps.

Read from top to bottom it follows one document on its way into the loss:

1. files and records   a line of JSON becomes a record, or is counted as malformed
2. encoding            a record becomes token ids, and for each token what it is (loss mask)
3. the token cache     all ids of a data set in flat, memory-mapped arrays
4. selection           which documents train and which validate; what is cut or skipped
5. steps               documents become micro-batches without padding, in a seeded order
"""

import glob
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import sys
import time
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from Config import UserError

# ---------------------------------------------------------------------------------------------
# 1. files and records

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
ROLES = ("system", "user", "assistant")


class MalformedRecord(ValueError):
    """A line that is not a record; the message says why."""


def find_files(path: str) -> list[Path]:
    """The data files behind a path, a folder (its *.jsonl, .gz, .xz, .zst) or a glob, sorted.

    Raises UserError when there are none.
    """
    if os.path.isdir(path):
        found = [p for p in Path(path).iterdir() if p.name.endswith(SUFFIXES) and p.is_file()]
        reason = f"the folder {path} holds no *.jsonl, *.jsonl.gz, *.jsonl.xz or *.jsonl.zst"
    elif os.path.isfile(path):
        found, reason = [Path(path)], ""
    else:
        found = [Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        reason = f"no such file, folder or match: {path}"
    if not found:
        raise UserError(reason)
    return sorted(found)


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of a plain, .gz, .xz or .zst file; blank lines are passed over.

    Raises UserError, with the number of the last good line, when the file is truncated or damaged.
    """
    number = 0
    try:
        if file.suffix == ".gz":
            stream = gzip.open(file, "rb")
        elif file.suffix == ".xz":
            stream = lzma.open(file, "rb")
        elif file.suffix == ".zst":
            import zstandard  # only where such a file is read

            stream = zstandard.open(file, "rb")
        else:
            stream = open(file, "rb")
        with stream:
            for number, line in enumerate(stream, start=1):
                line = line.rstrip(b"\r\n")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is no text
                if line.strip():
                    yield number, line
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read beyond line {number}: {error}") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise UserError(f"{file}: cannot be read beyond line {number}: {error}") from None
        raise


def _unique_keys(pairs: list) -> dict:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise MalformedRecord("a key stands twice in one object")
    return record


def _no_constant(name: str):
    raise MalformedRecord(f"{name} is not JSON")


def parse_record(line: bytes, kind: str) -> dict:
    """One line as a record of `kind` "text" ({"text": …}) or "chat" ({"conversations": […]}).

    Raises MalformedRecord with the reason, in words for the user.
    """
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
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 3e38:
        raise MalformedRecord(f'"weight" must be a finite number of at least 0, not {weight!r}')
    if kind == "text":
        if "text" not in record:
            hint = ' (a conversation? chat stages read those)' if "conversations" in record else ""
            raise MalformedRecord(f'no "text"{hint}')
        _check_text(record["text"], '"text"')
    else:
        if "conversations" not in record:
            hint = ' (plain text? pretrain.py reads that)' if "text" in record else ""
            raise MalformedRecord(f'no "conversations"{hint}')
        _check_conversation(record["conversations"])
    return record


def _check_text(text, name: str) -> None:
    if not isinstance(text, str):
        raise MalformedRecord(f"{name} is not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MalformedRecord(f"{name} has a lone surrogate at character {error.start}, which is no text") from None


def _check_conversation(conversation) -> None:
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
        _check_text(message["content"], f'{name}: "content"')


def text_hash(record: dict) -> int:
    """64 bits that identify a record's text, whatever file it stands in (roles and weights count not).

    Decides what is validation: both copies of a double always fall on the same side.
    """
    if "text" in record:
        content = record["text"]
    else:
        content = json.dumps([[m["role"], m["content"]] for m in record["conversations"]], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8"), digest_size=8).digest(), "little")


def is_held_out(hashes):
    """True where a text hash (int or array) falls in the 0.5 % that validate when no --val_path is given."""
    return hashes % 200 == 0
