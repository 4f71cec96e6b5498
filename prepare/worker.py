"""Imported by the processes that others are forked from: the main process of a run, and that of the workers, which then
have all they need. On Linux the children are killed when their parent ends, however it ends."""

import ctypes
import os
import signal
import sys

import prepare.categories
import prepare.outputs  # noqa: F401  and with it all other phases

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if sys.platform == "linux":  # a child that waits for a task would else outlive a parent that was killed
    os.register_at_fork(after_in_child=_end_with_parent)
