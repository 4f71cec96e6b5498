"""How every script ends: exit codes and one line on stderr. Does not import torch."""

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable

from Config import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TrainingStopped(Exception):
    """Training ended early; `code` is the exit code and the message is for the user."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class StdoutError(Exception):
    """stdout cannot be written: closed, e.g. by `| head`, or a full disk. It is no OSError, because code that handles
    the errors of a file also prints, and would blame the file."""

    def __init__(self, error: OSError):
        super().__init__(f"stdout: {error.strerror}")
        self.code = 128 + 13 if error.errno == errno.EPIPE else 2


class _GuardedStdout:
    """stdout as it is, but its failures are StdoutErrors."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise StdoutError(error) from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise StdoutError(error) from None


def run(main: Callable[[], int | None]) -> int:
    """Call a script's `main` and return its exit code: 0 done, 2 a user's error (one line on stderr), 130 after Ctrl-C,
    141 if stdout was closed, 1 with a traceback for a defect; TrainingStopped brings its own."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            # consoles of Windows start in another encoding; a file's name that is not UTF-8 is printed escaped
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    stdout, sys.stdout = sys.stdout, _GuardedStdout(sys.stdout)
    code = 0
    try:
        try:
            code = _run(main)
        finally:  # also after SystemExit, from argparse
            sys.stdout.flush()
    except StdoutError as error:
        _discard(stdout)
        code = code or error.code
        if code == 2:
            _say(f"error: {error}")
    finally:
        sys.stdout = stdout
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    return code


def _run(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except StdoutError:
        raise
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except TrainingStopped as stopped:
        _say(str(stopped))
        return stopped.code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except (RuntimeError, MemoryError) as error:
        reason = out_of_memory(error)
        if reason is None:
            _say(traceback.format_exc().rstrip())
            return 1
        _say(f"error: out of memory ({reason}): a smaller --batch_size needs less (in training with as much more "
             "--accumulation_steps the result is the same), and so does --gradient_checkpointing")
        return 2
    except BrokenPipeError:  # stderr was closed
        _discard(sys.stderr)
        return 128 + 13
    except OSError as error:
        if error.errno not in FULL:
            _say(traceback.format_exc().rstrip())
            return 1
        _say(f"error: {error}; everything saved before is intact")
        return 2
    except Exception:
        _say(traceback.format_exc().rstrip())
        return 1


def out_of_memory(error: BaseException | None) -> str | None:
    """The first line of the message if `error` is out of memory, else None. Out of memory on CPU, on MPS and in cuBLAS
    raises a plain RuntimeError."""
    reason = (str(error).splitlines() or [""])[0]
    known = re.search(r"out of memory|allocate memory|STATUS_ALLOC_FAILED", reason)
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return reason if named or (isinstance(error, RuntimeError) and known) else None


def _say(text: str) -> None:
    """Print to stderr, after what stdout still holds; there is nobody to tell if stderr fails too."""
    with contextlib.suppress(StdoutError):  # met again at the end
        sys.stdout.flush()
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream) -> None:
    """Point a stream at nothing: Python would otherwise flush it again at its end, and exit with 120."""
    with open(os.devnull, "w") as nowhere, contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(nowhere.fileno(), stream.fileno())
