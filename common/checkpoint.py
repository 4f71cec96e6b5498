"""Files that survive: atomic save, verified load, the resume state.

A file is written under a temporary name, synced, and renamed, so that a name always stands for a whole
file. A file is read only after every byte of it has been checked against the CRC-32 that torch.save's zip
format stores, and always with weights_only=True.
"""

import contextlib
import hashlib
import os
import re
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from common.runtime import TrainingStopped, autocast
from Config import FLAGS, LLMConfig, UserError
from dataset import make_micro_batch, process_lives
from model import WeakWater


class DamagedFile(UserError):
    """A file that is truncated, damaged, or not what its name says."""


def save(content: dict, path: Path) -> None:
    """Write `content` (plain types and tensors) to `path`, whole or not at all. Raises UserError as `write_whole`."""
    assert _is_plain(content), f"{path}: only plain Python types and tensors can be loaded again"
    write_whole(path, lambda stream: torch.save(content, stream))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: `write` fills a temporary file, which is synced and then renamed to `path`.

    Raises UserError when it cannot be written (a full disk); what `path` held before is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's zip writer, when a write failed under it
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # what torch's writer stumbled over
            error = error.__context__
        raise UserError(f"cannot save {path}: {error}; everything saved before is intact") from None


def _is_plain(content) -> bool:
    if isinstance(content, dict):
        return all(_is_plain(key) and _is_plain(value) for key, value in content.items())
    if isinstance(content, (list, tuple)):
        return all(map(_is_plain, content))
    return isinstance(content, torch.Tensor) or type(content) in (int, float, str, bool, type(None))


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlive a power cut, where the system can sync folders (Windows cannot)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: Path, needed: tuple[str, ...]) -> dict:
    """Read a file written by `save` that holds at least the keys `needed`, tensors on the CPU.

    Raises UserError, naming the file, when it is missing or cannot be read, and DamagedFile when it is truncated,
    damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about a pickle that is none
            broken = archive.testzip()  # torch.load itself does not check
            for entry in archive.infolist():
                if entry.external_attr & 0x10:  # "a folder": torch reads nothing and leaves the tensor as memory was
                    broken = broken or entry.filename
            if broken is not None:
                raise DamagedFile(f"{path}: damaged (wrong checksum in {broken!r})")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (DamagedFile, MemoryError):
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # each damage has an exception of its own: zlib.error, struct.error, KeyError, ...
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedFile(f"{path}: damaged, truncated or not a checkpoint: {reason}") from None
    if not isinstance(content, dict) or not set(needed) <= set(content):
        kind = "the full state of a run, for --resume, and no weights file" if (
            isinstance(content, dict) and "optimizers" in content) else "not a WeakWater checkpoint"
        raise DamagedFile(f"{path}: {kind} (it lacks {', '.join(needed)})")
    return content


# ---------------------------------------------------------------------------------------------
# weights: what a stage hands to the next


def save_weights(path: Path, model: WeakWater, meta: dict) -> None:
    """Write {"model": float32 state dict, "config", "meta"}; meta also gets the weights' SHA-256."""
    tensors = {id(tensor): tensor.detach().cpu() for tensor in model.parameters()}  # tied weights stay one
    state = {name: tensors[id(parameter)] for name, parameter in model.state_dict(keep_vars=True).items()}
    meta = meta | {"weights_sha256": weights_sha256(state)}
    save({"model": state, "config": model.config.to_dict(), "meta": meta}, path)


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """Digest of names and values of a state dict on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode("utf-8"))
        digest.update(state[name].contiguous().numpy().data)
    return digest.hexdigest()


def load_weights(path: Path, hint: str = "") -> tuple[dict[str, torch.Tensor], LLMConfig, dict]:
    """(state dict, config, meta) of a weights file. Raises UserError; `hint` says how the file is made."""
    if hint and not Path(path).is_file():
        raise UserError(f"{path}: no such file ({hint})")
    content = load(path, ("model", "config", "meta"))
    if not all(isinstance(content[key], dict) for key in ("model", "config", "meta")):
        raise UserError(f"{path}: not a WeakWater checkpoint")
    try:
        config = LLMConfig.from_dict(content["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return content["model"], config, content["meta"]


def fill(model: WeakWater, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state dict strictly. Raises UserError, naming the file, when names or shapes differ."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its config: {' '.join(str(error).split())[:300]}") from None


def load_model(path: Path, device="cpu", hint: str = "") -> tuple[WeakWater, dict]:
    """The model in a weights file, in eval mode on `device`, and the file's meta. Raises UserError."""
    state, config, meta = load_weights(path, hint)
    model = WeakWater(config)
    fill(model, state, path)
    return model.to(device).eval(), meta


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
    if not path.exists():  # a step's state is always the same, so a whole file of that number need not be replaced
        save(state, path)
    for _, old in numbered(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


class SaveSchedule:
    """When the full state is due: every `interval` steps; with None every 500, at most once a minute, since a fast GPU
    takes 500 steps in seconds."""

    def __init__(self, interval: int | None):
        self.interval, self.least_seconds = (500, 60.0) if interval is None else (interval, 0.0)
        self.last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether the state after so many steps is to be saved. The clocks of ranks differ: ask on the first."""
        return step % self.interval == 0 and time.monotonic() - self.last >= self.least_seconds

    def mark_saved(self) -> None:
        """Record that the state was saved now."""
        self.last = time.monotonic()


def newest_state(out_dir: str, stage: str, needed: tuple[str, ...]) -> tuple[dict, Path] | None:
    """The newest whole state of a stage and its path, or None where there is none.

    Damaged ones on the way to it are named and set aside as *.damaged. Raises UserError when all are damaged.
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
        for damaged in refused:  # out of the way, so that its step can be saved again
            os.replace(damaged, damaged.with_name(damaged.name + ".damaged"))
            print(f"set aside as {damaged.name}.damaged", flush=True)
        return state, path
    if refused:
        raise UserError(f"{folder}: every checkpoint is damaged; to start again, choose another --out_dir")
    return None


def existing_output(out_dir: str, stage: str) -> Path | None:
    """A file that an earlier run of this stage left in `out_dir`, if there is one."""
    out = Path(out_dir)
    for path in (out / f"{stage}.pth", out / f"{stage}_best.pth", out / "log" / f"{stage}.jsonl"):
        if path.exists():
            return path
    return next((path for _, path in numbered(checkpoint_folder(out_dir, stage))), None)


def clear_temporary(out_dir: str, stage: str) -> None:
    """Remove what a killed run of this stage left half-written."""
    out = Path(out_dir)
    for folder, pattern in ((out, f".{stage}.pth.*.tmp"), (out, f".{stage}_best.pth.*.tmp"),
                            (checkpoint_folder(out_dir, stage), ".*.pth.*.tmp")):
        for leftover in folder.glob(pattern):
            pid = leftover.name.split(".")[-2]
            if pid.isdecimal() and not process_lives(int(pid)):
                leftover.unlink(missing_ok=True)


STATE_KEYS = ("step", "tokens", "best_loss", "val_scores", "val_sha256", "model", "config", "optimizers",
              "scaler", "settings", "start_sha256")


def begin(args, ranks, maker: str) -> dict | None:
    """The state to resume from, or None to start. Before anything else is done in out_dir.

    Raises UserError when an earlier run's output is there and --resume is not given, and when --init_from, which
    `maker` makes, is not there to start from.
    """
    found = None
    weights = Path(args.out_dir) / f"{args.stage}.pth"
    with ranks.main_first():
        if args.resume:
            found = newest_state(args.out_dir, args.stage, STATE_KEYS)
            if found is None and weights.exists() and ranks.is_main:
                raise UserError(f"--resume: {weights} is there, but no checkpoint to go on from in "
                                f"{checkpoint_folder(args.out_dir, args.stage)}; choose another --out_dir")
            print(f"resuming from {found[1]}" if found else
                  f"--resume: no checkpoint of {args.stage} in {args.out_dir}: starting from the beginning", flush=True)
        elif (earlier := existing_output(args.out_dir, args.stage)) is not None and ranks.is_main:
            raise UserError(f"{earlier} is there from an earlier run: add --resume to go on with it, "
                            "or choose another --out_dir")
        if found is None and args.init_from != "none" and not Path(args.init_from).is_file():
            raise UserError(f"{args.init_from}: no such file (--init_from; {maker} makes it)")
        if ranks.is_main:
            clear_temporary(args.out_dir, args.stage)
    return found[0] if found else None


def starting_model(args, resumed: dict | None, encoder) -> tuple[WeakWater, str | None, list[str]]:
    """(model on the CPU, SHA-256 of the weights it starts from, lines that say what was inherited).

    The architecture is that of the state being resumed, else of the weights in --init_from, else (--init_from
    none) of --preset, with random weights and --output_init. `encoder` is the tokenizer's.
    Raises UserError when weights, tokenizer and flags do not fit together.
    """
    from_scratch = args.init_from == "none"
    start_sha256, weights, lines = None, None, []
    if resumed and (from_scratch or not Path(args.init_from).is_file()):
        start_sha256 = resumed["start_sha256"]  # the file it once started from may be gone: it is not needed
    elif not from_scratch:
        weights, config, meta = load_weights(args.init_from)
        start_sha256 = meta.get("weights_sha256")
        if meta.get("tokenizer_sha256") not in (None, encoder.fingerprint):
            raise UserError(f"--init_from {args.init_from} was trained with another tokenizer than "
                            f"--tokenizer_path {args.tokenizer_path}")
        lines.append(f"inherited from {args.init_from} ({meta.get('stage')}, step {meta.get('step')}): weights, "
                     f"{_architecture(config)}")
    if resumed:
        config = LLMConfig.from_dict(resumed["config"])
        weights = resumed["model"]
    elif from_scratch:
        config = LLMConfig.preset(args.preset or "weakwater-30m", vocab_size=encoder.vocab_size)
        lines.append(f"from scratch: {args.preset or 'weakwater-30m'}: {_architecture(config)}; output projections "
                     f"begin at {'zero' if args.output_init == 'zero' else 'random'}")
    if config.vocab_size != encoder.vocab_size:
        raise UserError(f"--tokenizer_path {args.tokenizer_path} has {encoder.vocab_size:,} entries, the weights "
                        f"{config.vocab_size:,}: not the tokenizer they were trained with")
    if args.preset and not from_scratch:
        wanted = LLMConfig.preset(args.preset, vocab_size=config.vocab_size).for_run(config.max_seq_len, config.dropout)
        if wanted != config:
            raise UserError(f"--preset {args.preset} is not the architecture of --init_from {args.init_from}, which "
                            "later stages keep; leave --preset out")
    config = config.for_run(args.max_seq_len, args.dropout)
    model = WeakWater(config)
    if weights is not None:
        fill(model, weights, "the checkpoint" if resumed else args.init_from)
    elif args.output_init == "zero":
        model.zero_init_residual()
    return model, start_sha256, lines


def _architecture(config: LLMConfig) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.to_dict().items() if name != "dropout")


def steering_settings(args, dtype: str, device_type: str, world_size: int, data: str, tokenizer: str,
                      start_sha256: str | None) -> dict:
    """Everything that decides the course of a run, to be compared when it is resumed."""
    settings = {name: getattr(args, name) for name, flag in FLAGS.items() if flag.steers and hasattr(args, name)}
    return settings | {"dtype": dtype, "device": device_type, "the number of processes": world_size,
                       "the training data": data, "the tokenizer": tokenizer,
                       "the weights in --init_from": start_sha256}


def compare_settings(before: dict, now: dict) -> None:
    """Raises UserError, naming each setting, where a run about to be resumed would take another course.

    A larger `max_steps` (0: no limit) only goes further, and is allowed.
    """
    differing, start = [], "the weights in --init_from"
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if name == "decay_ratio" and now.get("lr_schedule") != "trapezoid":  # which alone uses it
            continue
        if name == "output_init" and before.get(start) and now.get(start):  # nothing was drawn
            continue
        if old == new or (name == "max_steps" and (not new or (old and new > old))):
            continue
        differing.append(f"--{name} (was {old}, is {new})" if not name.startswith("the ") else f"{name} changed")
    if differing:
        raise UserError(f"--resume with other settings: {', '.join(differing)}; "
                        "set them back, or start anew in another --out_dir")


def restore(state: dict, optimizers: list, scaler) -> None:
    """Put optimizers and the fp16 scaler back where `state` left them. Raises UserError when they do not fit."""
    try:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the checkpoint's optimizer state does not fit: {error}") from None


LEAST_SCALE = 1e-3  # of the fp16 scaler: a gradient that still overflows here is not one of fp16's overflows


def stop_at_non_finite(args, step: int, loss: float, norm: float, batch, loader, net, device, dtype: str,
                       ranks) -> None:
    """Save the rows of a step whose loss or gradient is not finite, name them, and end with exit code 1.

    The optimizer has not touched the weights: `net` is as it was before the step, and so is the state saved beside.
    """
    if ranks.is_main:
        path = checkpoint_folder(args.out_dir, args.stage) / f"nonfinite_step_{step + 1:08d}.pth"
        buffers = [make_micro_batch(loader.documents, [piece], loader.kind_weights) for piece in batch.pieces]
        names = [f"{loader.documents.name(document)} (tokens {offset} to {offset + length})"
                 for document, offset, length in batch.pieces]
        with torch.no_grad(), autocast(device, dtype):
            guilty = [name for name, buffer in zip(names, buffers, strict=True)
                      if not torch.isfinite(net(**buffer.to(device)))] or names
        save({"step": step + 1, "loss": loss, "grad_norm": norm, "rows": names, "guilty": guilty,
              "tokens": [torch.from_numpy(buffer.tokens) for buffer in buffers],
              "model": net.state_dict(), "config": net.config.to_dict()}, path)
    ranks.barrier()
    if not ranks.is_main:
        raise TrainingStopped("stopped with the first process", 1)
    listed = ", ".join(guilty[:5]) + (f" and {len(guilty) - 5} more" if len(guilty) > 5 else "")
    raise TrainingStopped(f"error: step {step + 1}: loss {loss}, gradient norm {norm}: stopped before the weights were "
                          f"changed; rows {listed}; all rows and the weights are in {path}", 1)
