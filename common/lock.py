"""One training run at a time in an --out_dir: a lock of the operating system on out_dir/run.lock.

The lock ends with its process, however that ends, so the file may stay; it says who holds the lock.
"""

import contextlib
import errno
import json
import os
import socket
import time
import weakref
from pathlib import Path

from common.files import cannot_save, process_lives
from Config import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

IN_USE = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}  # EACCES and EDEADLK: Windows, NFS
FAR = 1 << 30  # on Windows a locked byte cannot be read: one far behind the text
READ_ATTEMPTS, READ_SECONDS = 20, 0.05  # for the holder to write who it is


class OutDirLock:
    """The lock of an --out_dir, held until nothing refers to this object any more; `is_held` is False where the volume
    has no locks. Its file, run.lock, stays and says who holds it."""

    # the open ones of this process, by (device, inode): it may enter a folder again, which through a second open file
    # would be refused; a folder that was made anew has another lock file
    _open = weakref.WeakValueDictionary()

    @staticmethod
    def file(out_dir: str) -> Path:
        """The file that is locked."""
        return Path(out_dir) / "run.lock"

    @classmethod
    def take(cls, out_dir: str, command: str) -> "OutDirLock":
        """Make `out_dir` and lock it for the training run `command`.

        Raises UserError when another process has the lock, naming it, and when the folder cannot be made or written.
        Prints a line where the volume has no locks.
        """
        path = cls.file(out_dir)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = cls(path)
        except OSError as error:
            raise UserError(f"--out_dir {out_dir}: {error}") from None
        lock = cls._open.setdefault(lock.key, lock)
        try:
            if not lock.is_held:
                lock.acquire()
        except OSError as error:
            if error.errno in IN_USE:
                raise UserError(f"--out_dir {out_dir}: in use by {_holder(path)}; wait for it, or choose another "
                                "--out_dir") from None
            print(f"--out_dir {out_dir}: this volume knows no file locks ({error.strerror}): do not start two runs "
                  "there", flush=True)
        try:
            lock.write(command)
        except OSError as error:
            raise cannot_save(path, error) from None
        return lock

    def __init__(self, path: Path):
        self.stream, self.is_held = open(path, "a+b", buffering=0), False  # "a": the holder's text stays
        status = os.fstat(self.stream.fileno())
        self.key = status.st_dev, status.st_ino

    def acquire(self) -> None:
        """Take the lock, without waiting. Raises OSError, with one of IN_USE where another process has it."""
        if os.name == "nt":
            self.stream.seek(FAR)
            msvcrt.locking(self.stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(self.stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.is_held = True

    def write(self, command: str) -> None:
        """Write who holds the lock."""
        holder = {"host": socket.gethostname(), "process": os.getpid(), "command": command}
        self.stream.truncate(0)
        self.stream.write((json.dumps(holder, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))

    def __del__(self):
        if hasattr(self, "stream"):
            self.stream.close()

    @classmethod
    def close_in_child(cls) -> None:
        """Close a forked child's copies of the open files, which would keep the locks when the parent has ended."""
        for lock in list(cls._open.values()):
            lock.stream.close()
        cls._open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OutDirLock.close_in_child)


def _holder(path: Path) -> str:
    """Who has the lock. The holder writes it just after taking the lock; until then there is nothing in the file, or
    what a process left that has ended."""
    holder = "another process"
    for _ in range(READ_ATTEMPTS):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(path.read_text(encoding="utf-8"))
            holder = f"process {found['process']} on {found['host']}: {found['command']}"
            if found["host"] != socket.gethostname() or process_lives(int(found["process"])):
                break
        time.sleep(READ_SECONDS)
    return holder
