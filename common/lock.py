"""One training run at a time in an --out_dir: a lock of the operating system, which ends with its process.

Does not import torch.
"""

import errno
import json
import os
import socket
import time
import weakref
from pathlib import Path

from Config import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

TAKEN = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
FAR = 1 << 30  # on Windows a locked byte cannot be read: one far behind the text


class OutDirLock:
    """The lock of an --out_dir, held as long as this object lives. Its file, run.lock, says who holds it, and stays."""

    _held = weakref.WeakValueDictionary()  # by the file's identity: a process may enter its own folder again

    @classmethod
    def take(cls, out_dir: str, command: str) -> "OutDirLock":
        """Lock `out_dir`, made if it is not there, for the run of `command`. Where the volume knows no locks, it says
        so and goes on with `is_held` False. Raises UserError, naming the other run, when the folder is in use, or when
        it cannot be written."""
        path = Path(out_dir) / "run.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            status = path.stat()
            held = cls._held.get((status.st_dev, status.st_ino))
            if held is None:
                held = cls(path, command)
                cls._held[status.st_dev, status.st_ino] = held
            return held
        except OSError as error:
            raise UserError(f"--out_dir {out_dir}: {error}") from None

    def __init__(self, path: Path, command: str):
        self.is_held = True
        self.stream = open(path, "rb+", buffering=0)
        try:
            if fcntl:
                fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                self.stream.seek(FAR)
                msvcrt.locking(self.stream.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in TAKEN:
                raise UserError(f"--out_dir {path.parent}: in use by {_holder(path)}; wait until it has ended, or "
                                "choose another --out_dir") from None
            self.is_held = False
            print(f"--out_dir {path.parent}: this volume knows no file locks ({error.strerror}): start no second run "
                  "there", flush=True)
        text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "command": command})
        self.stream.seek(0)
        self.stream.truncate()
        self.stream.write(text.encode() + b"\n")


def _holder(path: Path) -> str:
    """Who holds the lock, from its file, which its holder may be about to write."""
    for _ in range(20):
        try:
            held = json.loads(path.read_bytes())
            return f"process {held['process']} on {held['host']}: {held['command']}"
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "another run"
