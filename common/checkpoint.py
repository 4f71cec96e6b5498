"""Checkpoints: atomic save, verified load, the resume states of a stage.

A file is read only after every byte of it has been checked against the CRC-32 that torch.save's zip format stores, and
always with weights_only=True.
"""

import contextlib
import os
import re
import warnings
import zipfile
from pathlib import Path

import torch

from common.files import refuse_lfs_pointer, rename, write_whole
from Config import UserError


class DamagedFile(UserError):
    """A file that is truncated, damaged, or not what its name says."""


def save(content: dict, path: Path) -> None:
    """Write `content` (plain types and tensors) to `path` atomically. Raises UserError as `write_whole`."""
    assert _is_plain(content), f"{path}: only plain Python types and tensors can be loaded again"
    write_whole(path, lambda stream: torch.save(content, stream))


def _is_plain(content) -> bool:
    if isinstance(content, dict):
        return all(_is_plain(key) and _is_plain(value) for key, value in content.items())
    if isinstance(content, (list, tuple)):
        return all(map(_is_plain, content))
    return isinstance(content, torch.Tensor) or type(content) in (int, float, str, bool, type(None))


def load(path: Path, needed: tuple[str, ...]) -> dict:
    """Read a file written by `save` that holds at least the keys `needed`, tensors on the CPU.

    Raises UserError, naming the file, when it is missing, not downloaded or cannot be read, and DamagedFile when it is
    truncated, damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    refuse_lfs_pointer(path)
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about files that are not pickles
            broken = archive.testzip()  # torch.load itself does not check
            for entry in archive.infolist():
                if entry.external_attr & 0x10:  # a folder: torch would leave the tensor uninitialized
                    broken = broken or entry.filename
            if broken is not None:
                raise DamagedFile(f"{path}: damaged (wrong checksum in {broken!r})")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (DamagedFile, MemoryError):
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # each kind of damage raises its own type: zlib.error, struct.error, KeyError, ...
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedFile(f"{path}: damaged, truncated or not a checkpoint: {reason}") from None
    if not isinstance(content, dict) or not set(needed) <= set(content):
        kind = "the full state of a run, for --resume, and no weights file" if (
            isinstance(content, dict) and "optimizers" in content) else "not a WeakWater checkpoint"
        raise DamagedFile(f"{path}: {kind} (it lacks {', '.join(needed)})")
    return content


# ---------------------------------------------------------------------------------------------
# the resume state


def checkpoint_folder(out_dir: str, stage: str) -> Path:
    """Where the full states of a stage are kept."""
    return Path(out_dir) / "checkpoints" / stage


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the checkpoints in a folder, the newest first."""
    found = [(int(match.group(1)), file) for file in folder.glob("step_*.pth")
             if (match := re.fullmatch(r"step_(\d+)\.pth", file.name))]
    return sorted(found, reverse=True)


def save_state(state: dict, out_dir: str, stage: str, keep: int) -> Path:
    """Write the full state at state["step"] and then drop all but the `keep` newest. Returns its path."""
    folder = checkpoint_folder(out_dir, stage)
    path = folder / f"step_{state['step']:08d}.pth"
    if not path.exists():  # the state of a step is always the same: a whole file of that number is kept
        save(state, path)
    for _, old in numbered(folder)[keep:]:
        with contextlib.suppress(OSError):  # on Windows another program may hold it; the next save tries again
            old.unlink()
    return path


def newest_state(out_dir: str, stage: str, needed: tuple[str, ...]) -> tuple[dict, Path] | None:
    """The newest whole state of a stage and its path, or None.

    Newer damaged ones are named and renamed to *.damaged. Raises UserError when all are damaged.
    """
    folder = checkpoint_folder(out_dir, stage)
    refused = []
    for _, path in numbered(folder):
        try:
            state = load(path, needed)
        except DamagedFile as error:
            print(f"checkpoint refused: {error}", flush=True)
            refused.append(path)
            continue
        for damaged in refused:  # so that its step can be saved again
            rename(damaged, damaged.with_name(damaged.name + ".damaged"))
            print(f"set aside as {damaged.name}.damaged", flush=True)
        return state, path
    if refused:
        raise UserError(f"{folder}: every checkpoint is damaged; to start again, choose another --out_dir")
    return None


def existing_output(out_dir: str, stage: str) -> Path | None:
    """A file that an earlier run of this stage left in `out_dir`, if there is one."""
    out = Path(out_dir)
    for path in (out / f"{stage}.pth", out / f"{stage}_best.pth", out / "log" / f"{stage}.jsonl"):
        if os.path.exists(path):  # False, unlike that of Path, in a folder that may not be read
            return path
    return next((path for _, path in numbered(checkpoint_folder(out_dir, stage))), None)
