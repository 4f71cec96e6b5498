"""How every script ends: exit codes and one line on stderr. Does not import torch."""

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


def run(main: Callable[[], int | None]) -> int:
    """Call a script's `main` and return its exit code: 0 done, 2 a user's error (one line on stderr), 130 after Ctrl-C,
    141 if stdout was closed, 1 with a traceback for a defect; TrainingStopped brings its own."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(encoding="utf-8", errors="replace")  # Windows consoles start in another
    try:
        return main() or 0
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except TrainingStopped as stopped:
        print(str(stopped), file=sys.stderr, flush=True)
        return stopped.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except (RuntimeError, MemoryError) as error:
        reason = out_of_memory(error)
        if reason is None:
            traceback.print_exc()
            return 1
        print(f"error: out of memory ({reason}): a smaller --batch_size needs less (in training with as much more "
              "--accumulation_steps the result is the same), and so does --gradient_checkpointing", file=sys.stderr,
              flush=True)
        return 2
    except BrokenPipeError:  # stdout was closed, e.g. by `| head`: exit quietly
        _close_stdout()
        return 128 + 13
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            traceback.print_exc()
            return 1
        print(f"error: {error}; everything saved before is intact", file=sys.stderr, flush=True)
        _close_stdout()
        return 2
    except Exception:
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


def _close_stdout() -> None:
    """Point stdout at nothing: Python would otherwise flush it again at its end, and exit with 120."""
    with open(os.devnull, "w") as nowhere, contextlib.suppress(AttributeError, OSError):
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
