"""How every script ends: exit codes and one line on stderr. Does not import torch."""

import atexit
import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable

from Config import UserError


class TrainingStopped(Exception):
    """Training ended early; `code` is the exit code and the message is for the user."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class StdoutError(BaseException):
    """stdout cannot be written. No OSError and no Exception: code that prints while it writes a file would take it for
    a failure of the file."""

    def __init__(self, error: OSError):
        super().__init__(f"stdout: {error.strerror or error}")
        # EPIPE: closed, e.g. by `| head`; Windows calls that EINVAL
        self.closed = error.errno == errno.EPIPE or os.name == "nt" and error.errno == errno.EINVAL


class GuardedStream:
    """A text stream whose OSErrors in write and flush go to `failed`; all else is that of the stream."""

    def __init__(self, stream, failed: Callable[[OSError], None]):
        self._stream, self._failed = stream, failed

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of a text stream."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines) -> None:
        """As of a text stream."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As of a text stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)


def run(main: Callable[[], int | None]) -> int:
    """Call a script's `main` and return its exit code: 0 done, 2 an error the user can fix, a stdout that cannot be
    written included (one line on stderr), 130 after Ctrl-C, 141 if stdout was closed, 1 with a traceback for a defect;
    TrainingStopped and SystemExit bring their own."""
    before = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            # Windows consoles start in another encoding; a name that is not UTF-8 is shown escaped
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    with open(os.devnull, "w") as nowhere:  # in the place of a stream that was closed before Python started
        sys.stdout = GuardedStream(before[0] or nowhere, _raise_stdout_error)
        sys.stderr = GuardedStream(before[1] or nowhere, lambda error: None)  # it could not be told anywhere
        code = 0
        try:
            code = _exit_code(main)
            sys.stdout.flush()
        except StdoutError as error:
            if not error.closed and code == 0:
                _tell(f"error: {error}")
            code = code or (128 + 13 if error.closed else 2)
        finally:
            sys.stdout, sys.stderr = before
            for stream in before:
                _drop_unwritten(stream)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A rank of torchrun. Some ranks aborted after a whole run, and torchrun then stopped the others (docs/LOG.md).
        # All is saved and printed, so nothing is lost by ending here.
        atexit._run_exitfuncs()  # wandb's and logging's
        os._exit(code)
    return code


def _exit_code(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except SystemExit as stop:  # from argparse
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        _tell(str(stop.code))
        return 1
    except UserError as error:
        _tell(f"error: {error}")
        return 2
    except TrainingStopped as stopped:
        _tell(str(stopped))
        return stopped.code
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except Exception as error:
        if (reason := out_of_memory(error)) is not None:
            _tell(f"error: out of memory ({reason}): a smaller --batch_size needs less (in training with as much more "
                  "--accumulation_steps the result is the same), and so does --gradient_checkpointing")
            return 2
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _tell(f"error: {error}; everything saved before is intact")
            return 2
        traceback.print_exc()
        return 1
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def out_of_memory(error: BaseException | None) -> str | None:
    """The first line of the message if `error` is out of memory, else None. Out of memory on CPU, on MPS and in cuBLAS
    raises a plain RuntimeError."""
    reason = (str(error).splitlines() or [""])[0]
    known = re.search(r"out of memory|allocate memory|STATUS_ALLOC_FAILED", reason)
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return reason if named or (isinstance(error, RuntimeError) and known) else None


def _tell(line: str) -> None:
    """Print a line on stderr, after all that stdout holds back."""
    with contextlib.suppress(StdoutError):
        sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)


def _raise_stdout_error(error: OSError) -> None:
    raise StdoutError(error) from None


def _drop_unwritten(stream) -> None:
    """Point a stream that cannot be flushed at nothing: Python would try again at its end, and exit with 120."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        with open(os.devnull, "w") as nowhere, contextlib.suppress(AttributeError, OSError, ValueError):
            os.dup2(nowhere.fileno(), stream.fileno())
