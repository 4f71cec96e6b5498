"""How many threads torch computes with, for each thread of this program."""

import torch


def compute_with(threads: int) -> None:
    """Let this thread compute with so many. A thread's first question copies what is set for the process then, which is
    1 while a load compares replacements (fastpath/twin.py): ask first, so that this does not undo the setting later."""
    torch.get_num_threads()
    torch.set_num_threads(threads)
