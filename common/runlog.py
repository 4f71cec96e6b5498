"""What a run leaves to read: console and log file, JSONL metrics, three charts, and wandb if asked."""

import json
import math
import os
from pathlib import Path

from Config import UserError

CHARTS = {"loss": "training loss (and validation loss)", "lr": "learning rate",
          "epoch_time": "minutes left of the epoch"}
DRAWN = ("step", "loss", "lr", "minutes_left")


class RunLog:
    """log/<stage>.log, log/<stage>.jsonl and charts_<stage>/ in out_dir; on ranks other than the first, silent."""

    def __init__(self, out_dir: str, stage: str, is_main: bool = True):
        self.stage, self.is_main, self.wandb = stage, is_main, None
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
        # JSON knows no NaN: the norm of a gradient that overflowed in fp16 is null
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._append(self.jsonl_file, json.dumps(values))
        if self.wandb is not None:
            self._wandb("log", lambda: self.wandb.log(values, step=values["step"]))

    def _append(self, file: Path, line: str) -> None:
        try:
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {file}: {error}; everything saved before is intact") from None

    def read_metrics(self) -> list[dict]:
        """All whole lines of the JSONL so far; a last line that a kill cut short is passed over."""
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
        """Drop the metrics of steps after `step`: the resumed run will write them again."""
        if not self.is_main or not self.jsonl_file.exists():
            return
        lines = [json.dumps(row) + "\n" for row in self.read_metrics() if row["step"] <= step]
        temporary = self.jsonl_file.with_suffix(".tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.writelines(lines)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.jsonl_file)
        except OSError as error:
            raise UserError(f"cannot write {self.jsonl_file}: {error}") from None

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
                figure.savefig(target.with_suffix(".tmp"), format="png", dpi=110)
                plt.close(figure)
                os.replace(target.with_suffix(".tmp"), target)
        except Exception as error:  # a chart can be drawn again from the JSONL: no reason to stop training
            self.print(f"charts not drawn: {type(error).__name__}: {error}")

    def start_wandb(self, project: str, settings: dict) -> None:
        """Begin a wandb run, offline where WANDB_MODE or the lack of a login says so; without wandb, say so."""
        if not self.is_main:
            return

        def start():
            import wandb

            if not os.environ.get("WANDB_MODE") and not wandb.api.api_key:
                os.environ["WANDB_MODE"] = "offline"
            self.wandb = wandb.init(project=project, name=self.stage, config=settings, dir=str(self.out_dir))

        self._wandb("init", start)

    def finish(self) -> None:
        """Close the wandb run, if there is one."""
        if self.wandb is not None:
            self._wandb("finish", lambda: self.wandb.finish())

    def _wandb(self, what: str, action) -> None:
        try:
            action()
        except Exception as error:  # training must not die because wandb does
            self.wandb = None
            self.print(f"wandb {what} failed ({type(error).__name__}: {str(error)[:200]}); going on without it")


def describe_run(net, loader, val, args, world_size: int, total_steps: int) -> list[str]:
    """The physics of a run, as lines: parameters by part, tokens, useful and target share, FLOPs per token."""
    train, tokens = loader.documents, loader.tokens_per_epoch
    parts = net.num_parameters()
    context = min(args.max_seq_len, tokens / len(train))
    steps = loader.steps_in_epoch(0)
    return [
        f"parameters: {sum(parts.values()):,} = " + " + ".join(f"{n:,} {part}" for part, n in parts.items() if n),
        f"a step: {loader.step_tokens:,} tokens = {args.batch_size} rows x {args.max_seq_len} x "
        f"{args.accumulation_steps} micro-batches x {world_size} processes",
        f"an epoch: {tokens:,} tokens in {steps:,} steps; in all {total_steps:,} steps, "
        f"{total_steps / steps:.3g} epochs, about "
        f"{min(tokens * args.epochs, total_steps * loader.step_tokens):,} tokens",
        f"useful share: 100.0% (no position is padding; steps are {tokens / steps / loader.step_tokens:.1%} full), "
        f"target share: {train.targets.sum() / tokens:.1%}",
        f"FLOPs per token: {net.flops_per_token(context):.3g}; validation: {len(val):,} documents, "
        f"{int(val.length.sum()):,} tokens",
    ]


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
