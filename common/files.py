"""Atomic writes: under a name there is always a whole file or folder, the old one or the new. Does not import torch.

A file is written under a temporary name, synced to the disk and renamed. Whatever a name held before stays until the
new content is whole.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from Config import UserError

HOST = re.sub(r"[^\w-]", "-", socket.gethostname())[:40] or "host"
UTF8 = ("utf-8", "backslashreplace")  # in JSON this is how a lone surrogate is written
DAY = 86_400  # seconds
NOT_SAVED = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # a sync that fails with these has lost something


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
            _sync(stream.fileno())
        rename(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # RuntimeError: torch's zip writer, when a write failed under it
            raise cannot_save(path, error) from None
        raise


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text in UTF-8 atomically, each ended by a line feed; a lone surrogate, as in the name of a file
    that is not UTF-8, is written escaped. Raises UserError as `write_whole`."""
    write_whole(path, lambda stream: stream.writelines((line + "\n").encode(*UTF8) for line in lines))


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
                _sync(stream.fileno())
        sync_folder(temporary)
        try:
            _retry(os.rename, temporary, folder)
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
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, name: str, locked: bool = False) -> None:
    """Remove what killed processes left half-written in `folder` for names that match the glob `name`.

    `locked`: no other run can be writing there. Else a leftover of this machine goes if its process is dead, and one of
    another machine, whose processes cannot be seen from here, if nothing was written into it for a day.
    """
    for leftover in folder.glob(f".{name}.*.tmp"):
        if not (locked or _is_abandoned(leftover)):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _is_abandoned(leftover: Path) -> bool:
    host, process = leftover.name.split(".")[-3:-1]
    if host == HOST and process.isdecimal():
        return int(process) == os.getpid() or not process_lives(int(process))
    files = [leftover, *(leftover.iterdir() if leftover.is_dir() else ())]
    return time.time() - max(file.stat().st_mtime for file in files) > DAY


def rename(source: Path, target: Path) -> None:
    """Rename a file over another one, if need be."""
    _retry(os.replace, source, target)


def _retry(operation: Callable, *arguments) -> None:
    """Call `operation`; again, up to a second, if it is refused: on Windows a virus scanner or an indexer may have the
    file open."""
    for wait in (0.05, 0.1, 0.2, 0.4, 0):
        try:
            return operation(*arguments)
        except PermissionError:
            if not wait:
                raise
            time.sleep(wait)


def cannot_save(path: Path, error: Exception) -> UserError:
    """The message for a write that failed."""
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):  # under torch's zip writer
        error = error.__context__
    return UserError(f"cannot save {path}: {error}; everything saved before is intact")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where folders can be opened (not on Windows) and synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Sync a file or folder to the disk. Some file systems (CIFS, VirtualBox, FUSE) cannot sync folders, or anything:
    what was written there is written all the same."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in NOT_SAVED:
            raise


def lfs_pointer(path: Path) -> bool:
    """True if a file is a Git LFS pointer: git has not fetched what it stands for."""
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        return stream.read(64).startswith(b"version https://git-lfs.github.com/spec/")
    return False


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
