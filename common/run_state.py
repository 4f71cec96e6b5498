"""The state of one training run: what it starts from, how far it is, what it saves, and how it resumes exactly."""

import math
import os
import time
from bisect import bisect_right
from pathlib import Path

import torch

from common.checkpoint import checkpoint_folder, existing_output, newest_state, save, save_state
from common.exits import TrainingStopped
from common.files import remove_leftovers
from common.lock import OutDirLock
from common.runtime import autocast
from common.weights import load_strict, load_weights, refuse_int8, save_weights
from Config import FLAGS, LLMConfig, UserError
from dataset import Step, StepLoader, make_micro_batch
from model import WeakWater
from text.tokenizer import TextEncoder, choose_tokenizer, tokenizer_files

STATE_KEYS = ("step", "tokens", "best_loss", "val_scores", "val_sha256", "model", "config", "optimizers",
              "scaler", "settings", "start_sha256")
LEAST_SCALE = 1e-3  # of the fp16 scaler: a gradient that still overflows here is not one of fp16's overflows


class RunState:
    """One training run of a stage. Created first: it finds the state to resume and the starting weights. `restore`
    takes model, optimizers and loader and restores the state. After that it counts steps and saves.

    steps_done, tokens: trained so far, in all ranks · best_loss: lowest validation loss · val_scores: the last ones ·
    epoch_ends: steps done at the end of each epoch · total_steps.
    """

    def __init__(self, args, ranks):
        """Raises UserError when another run is at work in --out_dir, when an earlier run's output is there and --resume
        is not given, and when --init_from is not there to start from."""
        self.args, self.ranks = args, ranks
        with ranks.main_first():
            if ranks.is_main:
                if not os.path.exists(OutDirLock.file(args.out_dir)):  # no run is there: fail before a folder is made
                    check_new_run(args)
                self.lock = OutDirLock.take(args.out_dir, args.command)
                check_new_run(args)
            self.resumed, self.resumed_from = find_resume_state(args, ranks.is_main)
            if ranks.is_main:
                remove_half_written(args.out_dir, args.stage, self.lock.is_held)
        self.steps_done = self.tokens = 0
        self.best_loss, self.val_scores = math.inf, {}
        self.lines: list[str] = []  # for the log
        self.from_scratch = args.init_from == "none"
        self.start = None  # (state dict, config, meta) of the weights in --init_from
        if not self.from_scratch and (self.resumed is None or Path(args.init_from).is_file()):
            try:
                start = load_weights(args.init_from)
                refuse_int8(args.init_from, start[2])
                self.start = start
            except UserError as error:
                if self.resumed is None:
                    raise
                self.lines.append(f"not needed to resume: {error}")
        # a resume does not need the file that the run started from
        self.start_sha256 = self.start[2].get("weights_sha256") if self.start else (
            self.resumed["start_sha256"] if self.resumed else None)

    def choose_tokenizer(self):
        """The tokenizer of --tokenizer_path, else that of the checkpoint or of the starting weights, else that in
        weakwater_tokenizer. Raises UserError when it is not the one they were trained with."""
        owner, files, fingerprint = None, None, None
        if self.resumed:
            owner, files = "the checkpoint", self.resumed.get("tokenizer")
            fingerprint = self.resumed["settings"].get("the tokenizer")
        elif self.start:
            meta = self.start[2]
            owner, files, fingerprint = self.args.init_from, meta.get("tokenizer"), meta.get("tokenizer_sha256")
        self.tokenizer = choose_tokenizer(self.args.tokenizer_path, owner, files, fingerprint)
        self.encoder = TextEncoder.of(self.tokenizer)
        self.tokenizer_files = tokenizer_files(self.tokenizer)  # fail now if it cannot be stored in the weights
        return self.tokenizer

    def build_model(self) -> WeakWater:
        """The model, on the CPU, with the weights to resume or to start from.

        The architecture is that of the state being resumed, else of the weights in --init_from, else (--init_from
        none) of --preset, with random weights and --output_init.
        Raises UserError when weights, tokenizer and flags do not fit together.
        """
        args, vocab_size, weights = self.args, self.encoder.vocab_size, None
        if self.start:
            weights, config, meta = self.start
        if self.start and not self.resumed:
            self.lines.append(f"inherited from {args.init_from} ({meta.get('stage')}, step {meta.get('step')}): "
                              f"weights, {_architecture(config)}")
        if self.resumed:
            weights, config = self.resumed["model"], LLMConfig.from_dict(self.resumed["config"])
        elif self.from_scratch:
            config = LLMConfig.preset(args.preset or "weakwater-30m", vocab_size=vocab_size)
            self.lines.append(f"random weights: {args.preset or 'weakwater-30m'}: {_architecture(config)}; output "
                              f"projections start at {'zero' if args.output_init == 'zero' else 'random'}")
        if config.vocab_size != vocab_size:
            raise UserError(f"the tokenizer has {vocab_size:,} entries, the weights {config.vocab_size:,}: it is not "
                            "the one they were trained with (--tokenizer_path)")
        if args.preset and not self.from_scratch:
            same = LLMConfig.preset(args.preset, vocab_size=vocab_size).for_run(config.max_seq_len, config.dropout)
            if same != config:
                raise UserError(f"--preset {args.preset} is not the architecture of --init_from {args.init_from}, "
                                "which later stages keep; leave --preset out")
        net = WeakWater(config.for_run(args.max_seq_len, args.dropout))
        if weights is not None:
            load_strict(net, weights, self.resumed_from or args.init_from)
        elif args.output_init == "zero":
            net.zero_init_residual()
        self.start = None  # the memory of the weights
        return net

    def restore(self, net, optimizers: list, scaler, loader: StepLoader, val, device, dtype: str,
                computed_by: list[str], log) -> None:
        """Plan the steps and restore the state to resume. Raises UserError when a setting differs from the resumed
        run's that would change the losses that follow."""
        self.net, self.optimizers, self.scaler, self.loader = net, optimizers, scaler, loader
        self.val_sha256, self.device, self.dtype = val.fingerprint(), device, dtype
        self.computed_by, self.log = computed_by, log
        self.meta = {"tokenizer": self.tokenizer_files, "computed_by": computed_by}
        self.settings = run_settings(self.args, dtype, device.type, self.ranks.world_size, loader.documents,
                                     self.encoder.fingerprint, self.start_sha256)
        self.epoch_ends = loader.epoch_ends(self.args.epochs, self.args.max_steps)
        self.total_steps = min(self.epoch_ends[-1], self.args.max_steps or self.epoch_ends[-1])
        self.schedule = SaveSchedule(self.args.save_interval)
        if resumed := self.resumed:
            check_same_run(resumed["settings"], self.settings)
            _restore(resumed, optimizers, scaler)
            self.steps_done, self.tokens = resumed["step"], resumed["tokens"]
            self.best_loss, self.val_scores = resumed["best_loss"], resumed["val_scores"]
            if resumed.get("computed_by") not in (None, computed_by):
                self.lines.append(f"earlier steps were computed with: {'; '.join(resumed['computed_by'])}")
            if resumed["val_sha256"] != self.val_sha256:
                self.lines.append("the validation data changed: the lowest validation loss so far no longer counts")
                self.best_loss = math.inf
        self.resumed = None
        log.cut_back(self.steps_done)

    def finished_before(self) -> bool:
        """True if there is nothing left to train; the weights are then written once more, in case the run was killed
        after saving the state and before writing them."""
        if self.steps_done < self.total_steps:
            return False
        self.save_weights(self.weights_file)
        self.log.charts()
        self.log.print(f"finished before, at step {self.steps_done}: nothing to train; the weights are in "
                       f"{self.weights_file}")
        return True

    # ---- progress

    def epoch_and_step(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of an optimizer step, all from 0."""
        epoch = bisect_right(self.epoch_ends, step)
        return epoch, step - (self.epoch_ends[epoch - 1] if epoch else 0)

    @property
    def is_last(self) -> bool:
        """True after the last step."""
        return self.steps_done == self.total_steps

    def is_due(self, interval: int) -> bool:
        """True after every `interval` steps (0: never) and after the last one."""
        return self.is_last or bool(interval) and self.steps_done % interval == 0

    def synchronize(self, loss_sum: torch.Tensor, grad_norm: torch.Tensor,
                    signal_number: int) -> tuple[float, float, bool, bool]:
        """(loss, gradient norm, stop?, save?) of the step under way over all ranks: its one host synchronization."""
        flags = signal_number, self.ranks.is_main and self.schedule.is_due(self.steps_done + 1)
        summed = self.ranks.sum(torch.stack([loss_sum, *(torch.full_like(loss_sum, flag) for flag in flags)]))
        loss, stop, save_, norm = torch.cat([summed, grad_norm.unsqueeze(0)]).tolist()
        return loss, norm, bool(stop), bool(save_)

    def may_step(self, loss: float, norm: float, batch: Step) -> bool:
        """True if loss and gradient norm are finite. False after a gradient overflow in fp16: the scaler lowers its
        scale, and the step leaves the weights as they are. Else the run stops before the weights are changed, having
        saved the state and the rows to look into (TrainingStopped, exit code 1)."""
        overflow = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() > LEAST_SCALE
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            self.save()
            self._stop_at_non_finite(loss, norm, batch)
        if overflow:
            self.log.print(f"step {self.steps_done + 1}: gradient overflow in fp16, step skipped at scale "
                           f"{self.scaler.get_scale():g}")
        return not overflow

    def advance(self, tokens: int) -> None:
        """Count a step done."""
        self.steps_done, self.tokens = self.steps_done + 1, self.tokens + tokens

    # ---- saving

    @property
    def weights_file(self) -> Path:
        """The last weights, which the next stage starts from."""
        return Path(self.args.out_dir) / f"{self.args.stage}.pth"

    def save_weights(self, path: Path) -> None:
        """Write the weights with what belongs to them, on rank 0."""
        if self.ranks.is_main:
            meta = {"stage": self.args.stage, "step": self.steps_done, "tokens": self.tokens, "val": self.val_scores,
                    "val_sha256": self.val_sha256, "command": self.args.command, "settings": self.settings,
                    "tokenizer_sha256": self.encoder.fingerprint, "init_from_sha256": self.start_sha256}
            save_weights(path, self.net, meta | self.meta)

    def save_if_best(self, val_scores: dict) -> None:
        """Take note of a validation, and write <stage>_best.pth if its loss is the lowest so far."""
        self.val_scores = val_scores
        if val_scores["loss"] < self.best_loss:
            self.best_loss = val_scores["loss"]
            self.save_weights(self.weights_file.with_name(f"{self.args.stage}_best.pth"))

    def save(self) -> None:
        """Write the full state, from which a resume is exact, and the weights."""
        if self.ranks.is_main:
            state = {"step": self.steps_done, "tokens": self.tokens, "best_loss": self.best_loss,
                     "val_scores": self.val_scores, "val_sha256": self.val_sha256,
                     "model": self.net.state_dict(), "config": self.net.config.to_dict(), "settings": self.settings,
                     "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                     "scaler": self.scaler.state_dict(), "start_sha256": self.start_sha256}
            save_state(state | self.meta, self.args.out_dir, self.args.stage, self.args.keep_checkpoints)
            self.schedule.mark_saved()
            self.save_weights(self.weights_file)
        self.ranks.barrier()  # torchrun kills all ranks when one exits: wait until rank 0 has saved

    def _stop_at_non_finite(self, loss: float, norm: float, batch: Step) -> None:
        """Save the rows of a step whose loss or gradient is not finite, name them, and end with exit code 1."""
        step, documents = self.steps_done + 1, self.loader.documents
        if self.ranks.is_main:
            path = checkpoint_folder(self.args.out_dir, self.args.stage) / f"nonfinite_step_{step:08d}.pth"
            buffers = [make_micro_batch(documents, [segment], self.loader.type_weights) for segment in batch.segments]
            names = [f"{documents.name(document)} (tokens {offset} to {offset + length})"
                     for document, offset, length in batch.segments]
            with torch.no_grad(), autocast(self.device, self.dtype):
                guilty = [name for name, buffer in zip(names, buffers, strict=True)
                          if not torch.isfinite(self.net(**buffer.to(self.device)))] or names
            save({"step": step, "loss": loss, "grad_norm": norm, "rows": names, "guilty": guilty,
                  "tokens": [torch.from_numpy(buffer.tokens) for buffer in buffers],
                  "model": self.net.state_dict(), "config": self.net.config.to_dict()}, path)
        self.ranks.barrier()
        if not self.ranks.is_main:
            raise TrainingStopped("stopped with the first process", 1)
        listed = ", ".join(guilty[:5]) + (f" and {len(guilty) - 5} more" if len(guilty) > 5 else "")
        raise TrainingStopped(f"error: step {step}: loss {loss}, gradient norm {norm}: stopped before the weights were "
                              f"changed; rows {listed}; all rows and the weights are in {path}", 1)


class SaveSchedule:
    """When the full state is due: every `interval` steps; with None every 500, at most once a minute, since a fast GPU
    takes 500 steps in seconds."""

    def __init__(self, interval: int | None):
        self.interval, self.least_seconds = (500, 60.0) if interval is None else (interval, 0.0)
        self.last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """True if the state after `step` steps is to be saved. The clocks of ranks differ: ask on rank 0."""
        return step % self.interval == 0 and time.monotonic() - self.last >= self.least_seconds

    def mark_saved(self) -> None:
        """Record that the state was saved now."""
        self.last = time.monotonic()


def check_new_run(args) -> None:
    """Raises UserError when --resume is not given and an earlier run's output is there or --init_from is missing."""
    if args.resume:
        return
    if (earlier := existing_output(args.out_dir, args.stage)) is not None:
        raise UserError(f"{earlier} is there from an earlier run: add --resume to continue it, "
                        "or choose another --out_dir")
    check_init_from(args)


def check_init_from(args) -> None:
    """Raises UserError when the weights to start from are missing."""
    if args.init_from != "none" and not Path(args.init_from).is_file():
        maker = f"; python {args.previous}.py makes it, or name other weights" if args.previous else ""
        raise UserError(f"{args.init_from}: no such file (--init_from{maker})")


def find_resume_state(args, is_main: bool) -> tuple[dict, Path] | tuple[None, None]:
    """The state to resume from and its path; (None, None) to start from the beginning.

    Raises UserError when all states are damaged or missing, and when --init_from is missing.
    """
    found, weights = None, Path(args.out_dir) / f"{args.stage}.pth"
    if args.resume:
        found = newest_state(args.out_dir, args.stage, STATE_KEYS)
        if found is None and weights.exists() and is_main:
            raise UserError(f"--resume: {weights} is there, but there is no checkpoint in "
                            f"{checkpoint_folder(args.out_dir, args.stage)}; choose another --out_dir")
        print(f"resuming from {found[1]}" if found else
              f"--resume: no checkpoint of {args.stage} in {args.out_dir}: starting from the beginning", flush=True)
    if found is None:
        check_init_from(args)
    return found or (None, None)


def remove_half_written(out_dir: str, stage: str, locked: bool) -> None:
    """Remove what killed runs of a stage left half-written in `out_dir`; with `locked`, no other run is there now."""
    out = Path(out_dir)
    for folder, name in ((out, f"{stage}.pth"), (out, f"{stage}_best.pth"), (out / "log", f"{stage}.jsonl"),
                         (checkpoint_folder(out_dir, stage), "*.pth"), (out / f"charts_{stage}", "*.png")):
        remove_leftovers(folder, name, locked)


def _architecture(config: LLMConfig) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.to_dict().items() if name != "dropout")


def run_settings(args, dtype: str, device_type: str, world_size: int, documents, tokenizer: str,
                 start_sha256: str | None) -> dict:
    """Everything that decides the losses of a run, to be compared when it is resumed."""
    settings = {name: getattr(args, name) for name, flag in FLAGS.items() if flag.trajectory and hasattr(args, name)}
    return settings | {"dtype": dtype, "device": device_type, "the number of processes": world_size,
                       "the training data": documents.fingerprint(), "the shares of the sources": documents.shares,
                       "the tokenizer": tokenizer, "the weights in --init_from": start_sha256}


def check_same_run(before: dict, now: dict) -> None:
    """Raises UserError, naming each setting, where a run about to be resumed would have other losses.

    A larger `max_steps` (0: no limit) only goes further, and is allowed.
    """
    differing, start = [], "the weights in --init_from"
    for name in sorted(set(before) | set(now)):
        old, new = (settings.get(name, FLAGS[name].default if name in FLAGS else None) for settings in (before, now))
        if name == "decay_ratio" and now.get("lr_schedule") != "trapezoid":  # which alone uses it
            continue
        if name == "output_init" and before.get(start) and now.get(start):  # nothing was drawn
            continue
        if old == new or (name == "max_steps" and (not new or (old and new > old))):
            continue
        shown = f"{name} changed" if name.startswith("the ") else f"--{name}"
        differing.append(f"{shown} (was {old}, is {new})" if "shares" in name or "--" in shown[:2] else shown)
    if differing:
        raise UserError(f"--resume with other settings: {', '.join(differing)}; "
                        "set them back, or start again in another --out_dir")


def _restore(state: dict, optimizers: list, scaler) -> None:
    """Put optimizers and the fp16 scaler back where `state` left them. Raises UserError when they do not fit."""
    try:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the checkpoint's optimizer state does not fit: {error}") from None
