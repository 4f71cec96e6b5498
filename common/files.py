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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from Config import UserError

# what a file system answers that cannot sync: CIFS, VirtualBox and some FUSE; Windows, for folders
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
HOST = re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname())[:40] or "host"  # in temporary names
RETRY_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.4)  # between attempts to rename
ABANDONED_SECONDS = 24 * 3600  # without a write: the process on another host has ended
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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


def write_file(path: Path, fill: Callable[[Path], object]):
    """The same for a library that opens a file by its name: `fill` gets the path of the temporary file. Returns what
    `fill` does."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = fill(temporary)
        with open(temporary, "rb+") as stream:
            _sync(stream.fileno())
        rename(temporary, path)
        sync_folder(path.parent)
        return result
    except OSError as error:
        raise cannot_save(path, error) from None
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(path))) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text in UTF-8 atomically, each ended by a line feed. Raises UserError as `write_whole`.

    A lone surrogate, from a file name that is not UTF-8, is written as \\udcXX, which in JSON means the same.
    """
    encoded = ((line + "\n").encode("utf-8", "backslashreplace") for line in lines)
    write_whole(path, lambda stream: stream.writelines(encoded))


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSON lines atomically. Raises UserError as `write_whole`."""
    write_lines(path, (json.dumps(record, ensure_ascii=False) for record in records))


def write_folder(folder: Path, fill: Callable[[Path], object], over: bool = False) -> bool:
    """Write a folder of files atomically: `fill` writes into a temporary folder, which is synced and renamed to
    `folder`. With `over`, a folder of that name is deleted once the new one has its name. Returns False if another
    process made `folder` first. Raises UserError as `write_whole`."""
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same number
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        for file in temporary.iterdir():
            with open(file, "rb+") as stream:
                _sync(stream.fileno())
        sync_folder(temporary)
        old = temporary_name(folder.with_name(f"{folder.name}.old"))
        if over and folder.exists():
            rename(folder, old, over=False)
        try:
            rename(temporary, folder, over=False)
        except OSError:
            if old.exists():
                rename(old, folder, over=False)
            if not folder.is_dir() or over:
                raise
            return False
        shutil.rmtree(old, ignore_errors=True)
        sync_folder(folder.parent)
        return True
    except OSError as error:
        raise cannot_save(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """Write a file or folder through to the disk. A file system that cannot do that has written it all the same."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def rename(source: Path, target: Path, over: bool = True) -> None:
    """Rename a file or folder; with `over`, a file of the new name is replaced.

    A refusal is tried again for about a second: on Windows a virus scanner or an indexer may hold the file.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            return os.replace(source, target) if over else os.rename(source, target)
        except PermissionError:
            if seconds is None:
                raise
        time.sleep(seconds)


def cannot_save(path: Path, error: Exception) -> UserError:
    """The message for a write that failed."""
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):  # under torch's zip writer
        error = error.__context__
    return UserError(f"cannot save {path}: {error}; everything saved before is intact")


def lfs_pointer(path: Path) -> bool:
    """True if the file is a Git LFS pointer: a few lines of text that stand for a file that is not downloaded yet."""
    path = Path(path)
    if not path.is_file():  # a pipe must not be read twice
        return False
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER
    return False


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError when the file is a Git LFS pointer."""
    if lfs_pointer(path):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself: git lfs pull")


# ---------------------------------------------------------------------------------------------
# temporary names, and what killed processes left under them


def temporary_name(path: Path) -> Path:
    """The name beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, name: str, locked: bool = False) -> None:
    """Remove what killed processes left half-written in `folder` for names that match the glob `name`; with `locked`,
    no other process writes there, and all of it is left over."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        owner = _owner(leftover.name, name)
        if owner is not None and (locked or _is_abandoned(leftover, *owner)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # it only takes space
                    leftover.unlink()


def _owner(temporary: str, name: str) -> tuple[str | None, int] | None:
    """(host, process) in the temporary name of a file that matches the glob `name`; None if it is no such name. Earlier
    versions wrote no host."""
    rest, _, process = temporary.removeprefix(".").removesuffix(".tmp").rpartition(".")
    if not process.isdecimal():
        return None
    if fnmatchcase(rest, name):
        return None, int(process)
    rest, _, host = rest.rpartition(".")
    return (host, int(process)) if fnmatchcase(rest, name) else None


def _is_abandoned(leftover: Path, host: str | None, process: int) -> bool:
    """True if the process has ended. Where it cannot be asked for, on another host or on Windows, it has if it wrote
    nothing for a day."""
    if host in (HOST, None):
        if process == os.getpid() or not process_lives(process):  # in a container every run may have the same number
            return True
        if host and os.name == "posix":
            return False
    try:
        written = max(file.stat().st_mtime for file in (leftover, *leftover.rglob("*")))
    except OSError:  # files come and go there
        return False
    return time.time() - written > ABANDONED_SECONDS


def process_lives(pid: int) -> bool:
    """True if a process of this number runs on this machine, or if that cannot be known."""
    try:
        if os.name == "posix":  # on Windows this would be a signal
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True
