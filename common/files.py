"""Atomic writes: under a name there is always a whole file or folder, the old one or the new. Does not import torch.

A file is written under a temporary name, synced to the disk and renamed. Whatever a name held before stays until the
new content is whole.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from Config import UserError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: `write` fills a temporary file, which is synced and renamed to `path`.

    Raises UserError when it cannot be written (a full disk, say).
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # RuntimeError: torch's zip writer, when a write failed under it
            raise cannot_save(path, error) from None
        raise


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text in UTF-8 atomically, each ended by a line feed. Raises UserError as `write_whole`."""
    write_whole(path, lambda stream: stream.writelines((line + "\n").encode("utf-8") for line in lines))


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSON lines atomically. Raises UserError as `write_whole`."""
    write_lines(path, (json.dumps(record, ensure_ascii=False) for record in records))


def write_folder(folder: Path, fill: Callable[[Path], object]) -> bool:
    """Write a folder of files atomically: `fill` writes into a temporary folder, which is synced and renamed to
    `folder`. Returns False if another process made `folder` first. Raises UserError as `write_whole`."""
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same number
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        for file in temporary.iterdir():
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
        sync_folder(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
            return False
        sync_folder(folder.parent)
        return True
    except OSError as error:
        raise cannot_save(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """The name beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed processes left half-written in `folder` for names that match the glob `name`."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        process = leftover.name.split(".")[-2]
        if process.isdecimal() and (int(process) == os.getpid() or not process_lives(int(process))):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def cannot_save(path: Path, error: Exception) -> UserError:
    """The message for a write that failed."""
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):  # under torch's zip writer
        error = error.__context__
    return UserError(f"cannot save {path}: {error}; everything saved before is intact")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can sync folders (Windows cannot)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def process_lives(pid: int) -> bool:
    """True if a process of this number runs on this machine, or if that cannot be known."""
    try:
        if os.name == "posix":  # on Windows this would be a signal
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
