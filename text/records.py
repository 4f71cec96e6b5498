"""Data files: their lines and the records in them."""

import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from common.files import refuse_lfs_pointer
from Config import UserError

PACKINGS = (".gz", ".xz", ".zst")
ROLES = ("system", "user", "assistant")
TOOL_ROLES = ("tool", "function")  # what a tool returned: no part of our chat format
TOOL_CALLS = ("tool_calls", "function_call")  # keys of a reply that calls a tool


class MalformedRecord(ValueError):
    """A line that is not a record; the message says why."""


# ---------------------------------------------------------------------------------------------
# lines


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of a plain, .gz, .xz or .zst file; blank lines are skipped.

    Raises UserError, with the number of the last good line, when the file is truncated or damaged.
    """
    refuse_lfs_pointer(file)
    number = 0
    try:
        with open(file, "rb") as packed, unpack(packed, file.suffix) as lines:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip(b"\r\n")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is not text
                if line.strip():
                    yield number, line
    except ImportError:
        raise UserError(f"{file}: reading .zst needs a package: pip install zstandard") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read beyond line {number}: {error}") from None


def unpack(packed: BinaryIO, suffix: str) -> BinaryIO:
    """The content of an open file whose packing has this suffix (one of PACKINGS; any other: not packed).

    Raises ImportError where .zst needs a package; reading raises OSError, EOFError or zlib.error when it is damaged.
    """
    if suffix == ".gz":
        return gzip.open(packed, "rb")
    if suffix == ".xz":
        frames = _Frames(packed, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ), lzma.LZMAError, padding=b"\0")
    elif suffix == ".zst":
        import zstandard  # only where such a file is read

        # the largest window of `zstd --long=31`: the default limit refuses such files
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        frames = _Frames(packed, decompressor.decompressobj, zstandard.ZstdError)
    else:
        return packed
    return io.BufferedReader(frames, 1 << 16)


class _Frames(io.RawIOBase):
    """What the frames of a .zst file, or the streams of a .xz file, hold one after another. The libraries' own readers
    take an end inside a frame, or zeros between two streams, for the end of the file.

    Reading raises EOFError where the file ends inside a frame, and OSError where it is damaged.
    """

    def __init__(self, packed: BinaryIO, new_frame: Callable, damaged: type[Exception], padding: bytes = b""):
        self.packed, self.new_frame, self.damaged, self.padding = packed, new_frame, damaged, padding
        self.frame, self.block, self.content = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.content:
            self.block = self.block or self.packed.read(1 << 16)
            if not self.block:
                if self.frame is not None:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            if self.frame is None:
                self.block = self.block.lstrip(self.padding)
                if not self.block:
                    continue
                self.frame = self.new_frame()
            try:
                self.content = memoryview(self.frame.decompress(self.block))
            except self.damaged as error:
                raise OSError(str(error)) from None
            self.frame, self.block = (None, self.frame.unused_data) if self.frame.eof else (self.frame, b"")
        size = min(len(buffer), len(self.content))
        buffer[:size], self.content = self.content[:size], self.content[size:]
        return size


# ---------------------------------------------------------------------------------------------
# records


def unique_keys(pairs: list) -> dict:
    """The object of JSON that has these pairs. Raises MalformedRecord when a key is there twice."""
    record = dict(pairs)
    if len(record) != len(pairs):
        raise MalformedRecord("duplicate key in one object")
    return record


def _no_constant(name: str):
    raise MalformedRecord(f"{name} is not JSON")


def parse_object(line: bytes) -> dict:
    """One line as a JSON object without duplicate keys. Raises MalformedRecord with the reason."""
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_constant)
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
    key, hint = ("text", "conversations") if kind == "text" else ("conversations", "text")
    if key not in record:
        reader = "chat stages read those" if kind == "text" else "pretrain.py reads that"
        raise MalformedRecord(f'no "{key}"' + (f' (it has "{hint}": {reader})' if hint in record else ""))
    if kind == "text":
        check_text(record["text"], '"text"')
    else:
        check_conversation(record["conversations"], with_tools=True)
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


def check_conversation(conversation, with_tools: bool = False) -> None:
    """Raises MalformedRecord when `conversation` is not a list of {"role", "content"} messages; `with_tools` also
    allows calls of tools and their results, which text/content.py leaves out."""
    if not isinstance(conversation, list):
        raise MalformedRecord('"conversations" is not a list')
    for index, message in enumerate(conversation):
        name = f"message {index + 1}"
        if not isinstance(message, dict) or "role" not in message:
            raise MalformedRecord(f'{name} is not an object with "role" and "content"')
        if with_tools and message["role"] in TOOL_ROLES:
            continue
        if with_tools and calls_tool(message) and message.get("content") is None:
            message["content"] = ""
        if "content" not in message:
            raise MalformedRecord(f'{name} is not an object with "role" and "content"')
        if message["role"] not in ROLES:
            raise MalformedRecord(f'{name}: role {message["role"]!r} is not one of {", ".join(ROLES)}')
        if message["role"] == "system" and index:
            raise MalformedRecord(f"{name}: a system message may only come first")
        check_text(message["content"], f'{name}: "content"')
        if message.get("reasoning_content") is not None:
            check_text(message["reasoning_content"], f'{name}: "reasoning_content"')


def calls_tool(message: dict) -> bool:
    """True if a message calls a tool."""
    return any(message.get(key) for key in TOOL_CALLS)


def text_hash(record: dict) -> int:
    """64 bits that identify the text of a record as `parse_record` gives it, whatever its file and its weight.

    Decides what is validation: both copies of a duplicate fall on the same side.
    """
    if "conversations" in record:
        content = json.dumps([[m["role"], m.get("content")] for m in record["conversations"]], ensure_ascii=False)
    else:
        content = record["text"]
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def is_held_out(hashes):
    """True where a text hash (int or array) falls in the 0.5 % that validate when no --val_path is given."""
    return hashes % 200 == 0
