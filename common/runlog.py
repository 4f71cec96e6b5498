"""Logs of a run: console and log file, JSONL metrics, three charts, and wandb if asked."""

import json
import math
import os
from functools import partial
from pathlib import Path

from common.files import write_lines, write_whole
from common.runtime import peak_flops
from Config import UserError

CHARTS = {"loss": "training loss (and validation loss)", "lr": "learning rate",
          "epoch_time": "minutes left of the epoch"}
DRAWN = ("step", "loss", "lr", "minutes_left")


class RunLog:
    """log/<stage>.log, log/<stage>.jsonl and charts_<stage>/ in out_dir; silent on ranks other than the first."""

    def __init__(self, out_dir: str, stage: str, is_main: bool = True):
        self.stage, self.is_main, self.wandb = stage, is_main, None
        self.meter = Meter()
        self.out_dir = Path(out_dir)
        self.log_file = self.out_dir / "log" / f"{stage}.log"
        self.jsonl_file = self.out_dir / "log" / f"{stage}.jsonl"
        if is_main:
            try:
                self.log_file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out_dir {out_dir}: {error}") from None

    def print(self, line: str) -> None:
        """One line on the console and in the log file."""
        if self.is_main:
            print(line, flush=True)
            self._append(self.log_file, line)

    def metrics(self, **values) -> None:
        """One line of JSONL, and the same to wandb."""
        if not self.is_main:
            return
        # JSON has no NaN: the norm of a gradient that overflowed in fp16 becomes null
        values = _without_nan(values)
        self._append(self.jsonl_file, json.dumps(values))
        if self.wandb is not None:
            self._wandb("log", lambda: self.wandb.log(values, step=values["step"]))

    def _append(self, file: Path, line: str) -> None:
        try:
            with open(file, "a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {file}: {error}; everything saved before is intact") from None

    def read_metrics(self) -> list[dict]:
        """All whole lines of the JSONL so far; a last line cut short by a kill is skipped."""
        rows = []
        if self.jsonl_file.is_file():
            for line in self.jsonl_file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and all(isinstance(row.get(key), (int, float)) for key in DRAWN):
                    rows.append(row)
        return rows

    def cut_back(self, step: int) -> None:
        """Drop the metrics of steps after `step`: the resumed run writes them again."""
        if self.is_main and self.jsonl_file.exists():
            write_lines(self.jsonl_file, [json.dumps(row) for row in self.read_metrics() if row["step"] <= step])

    # ---- what a stage prints

    def describe(self, run, net, loader) -> None:
        """Print what the run will be: parameters by part, tokens, sources, useful and target share, FLOPs per token."""
        args = run.args
        for line in run.computed_by + run.lines + describe_run(net, loader, run):
            self.print(line)
        self.print(f"{args.optimizer}, {args.lr_schedule} schedule, peak learning rate {args.learning_rate}")
        self.flops_per_token = net.flops_per_token(min(run.args.max_seq_len, loader.mean_length))
        self.peak = peak_flops(run.device, run.dtype)
        if self.peak:
            self.print(f"mfu: share of the data sheet's {self.peak / 1e12:,.0f} TFLOP/s in {run.dtype}")

    def step(self, run, loss: float, lr: float, norm: float, scores: dict | None) -> None:
        """Print a line about the last step, with the `scores` of a validation if there was one; the same as JSONL."""
        epoch, step_in_epoch = run.epoch_and_step(run.steps_done - 1)
        steps_left = min(run.epoch_ends[epoch], run.total_steps) - run.steps_done
        rate, minutes = self.meter.rate(), self.meter.minutes(steps_left)
        line = (f"Epoch:[{epoch + 1}/{len(run.epoch_ends)}]({step_in_epoch + 1}/{step_in_epoch + 1 + steps_left}) "
                f"loss:{loss:.3f} lr:{lr:.12f} epoch_Time:{minutes:.1f}min tokens/s:{rate:,.0f} grad_norm:{norm:.3f}")
        if self.peak:
            line += f" mfu:{rate * self.flops_per_token / self.peak / run.ranks.world_size:.1%}"
        values = {}
        if scores:
            values = {"val_loss": scores["loss"], "val_ppl": scores["ppl"], "val_bpb": scores["bpb"]}
            line += "".join(f" {name}:{value:.4f}" for name, value in values.items())
            if sources := scores.get("sources"):
                values["val_loss_by_source"] = {name: own["loss"] for name, own in sources.items()}
                line += "".join(f" val_loss[{name}]:{own['loss']:.4f}" for name, own in sources.items())
        self.print(line)
        self.metrics(step=run.steps_done, epoch=epoch + 1, loss=loss, lr=lr, tokens=run.tokens, tokens_per_second=rate,
                     grad_norm=norm, minutes_left=minutes, **values)

    def summary(self, run) -> None:
        """Print the line that ends a run, and close wandb."""
        scores = run.val_scores
        self.print(f"done: {run.steps_done:,} steps, {run.tokens:,} tokens, {self.meter.all_seconds / 60:.1f} min of "
                   f"training; validation loss {scores['loss']:.4f}, PPL {scores['ppl']:.2f}, bits per byte "
                   f"{scores['bpb']:.4f}; weights in {run.weights_file}")
        if self.wandb is not None:
            self._wandb("finish", lambda: self.wandb.finish())

    def charts(self) -> None:
        """Draw charts_<stage>/{loss,lr,epoch_time}_<stage>.png from the JSONL."""
        if not self.is_main:
            return
        rows = self.read_metrics()
        folder = self.out_dir / f"charts_{self.stage}"
        keys = {"loss": "loss", "lr": "lr", "epoch_time": "minutes_left"}
        try:
            import matplotlib  # half a second: only when a chart is drawn

            matplotlib.use("Agg")
            import matplotlib.pyplot as plt

            folder.mkdir(exist_ok=True)
            for name, title in CHARTS.items():
                figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
                axes.plot([r["step"] for r in rows], [r[keys[name]] for r in rows], linewidth=1, label=name)
                if name == "loss":
                    scored = [r for r in rows if "val_loss" in r]
                    axes.plot([r["step"] for r in scored], [r["val_loss"] for r in scored], "o-", markersize=3,
                              label="validation")
                    axes.legend()
                axes.set(title=f"{self.stage}: {title}", xlabel="optimizer step", ylabel=keys[name])
                axes.grid(alpha=0.3)
                target = folder / f"{name}_{self.stage}.png"
                write_whole(target, partial(figure.savefig, format="png", dpi=110))
                plt.close(figure)
        except Exception as error:  # charts can be drawn again from the JSONL, so training continues
            self.print(f"charts not drawn: {type(error).__name__}: {error}")

    def start_wandb(self, project: str, settings: dict) -> None:
        """Start a wandb run, offline if WANDB_MODE says so or nobody is logged in. A failure is logged, not raised."""
        if not self.is_main:
            return

        def start():
            import wandb

            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
            self.wandb = wandb.init(project=project, name=self.stage, config=settings, dir=str(self.out_dir), mode=mode)

        self._wandb("init", start)

    def _wandb(self, what: str, action) -> None:
        try:
            action()
        except Exception as error:  # a failure of wandb must not stop training
            self.wandb = None
            self.print(f"wandb {what} failed ({type(error).__name__}: {str(error)[:200]}); continuing without it")


def _without_nan(value):
    """`value` with null for each number that JSON does not have, also inside dicts."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_run(net, loader, run) -> list[str]:
    """What a run is, as lines: parameters by part, tokens, sources, useful and target share, FLOPs per token."""
    args, train, tokens = run.args, loader.documents, loader.tokens_per_epoch
    parts = net.num_parameters()
    steps = loader.steps_in_epoch(0)
    fills_up = next(net.parameters()).device.type == "cpu"  # MicroBatch.to
    lines = [
        f"parameters: {sum(parts.values()):,} = " + " + ".join(f"{n:,} {part}" for part, n in parts.items() if n),
        f"a step: {loader.step_tokens:,} tokens = {args.batch_size} rows x {args.max_seq_len} x "
        f"{args.accumulation_steps} micro-batches x {run.ranks.world_size} processes",
        f"an epoch: {tokens:,} tokens in {steps:,} steps; in all {run.total_steps:,} steps, "
        f"{run.total_steps / steps:.3g} epochs, about "
        f"{min(tokens * args.epochs, run.total_steps * loader.step_tokens):,} tokens",
        f"no padding tokens{' but those that fill a buffer up to a multiple of 64' if fills_up else ''}; "
        f"steps are {tokens / steps / loader.step_tokens:.1%} full; "
        f"target share: {loader.target_share:.1%}",
        f"FLOPs per token: {net.flops_per_token(min(args.max_seq_len, loader.mean_length)):.3g}",
    ]
    if train.shares is not None:
        visits = loader.visits(run.epoch_ends, run.total_steps)
        for number, (name, share) in enumerate(zip(train.names, train.shares, strict=True)):
            n = int((train.source == number).sum())
            seen = min(n, int(visits[number]))
            lines.append(f"source {name}: share {share:.1%} of all tokens, {n:,} documents; in this run {seen:,} seen, "
                         f"{int(visits[number]) - seen:,} repeats, {n - seen:,} unseen")
    return lines


class Meter:
    """Counts tokens and seconds of training steps (not of validation and saving) between log lines."""

    def __init__(self):
        self.tokens = self.seconds = 0.0
        self.all_seconds = self.all_steps = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One optimizer step."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.all_seconds, self.all_steps = self.all_seconds + seconds, self.all_steps + 1

    def rate(self) -> float:
        """Tokens per second since the last call."""
        rate = self.tokens / max(self.seconds, 1e-9)
        self.tokens = self.seconds = 0.0
        return rate

    def minutes(self, steps: int) -> float:
        """How long `steps` more should take, at the mean so far."""
        return steps * self.all_seconds / max(self.all_steps, 1) / 60
