"""Which recipe learns most from a token, and from a second? Held-out bits per byte, recipes side by side.

    python experiments/recipe.py --data_path data/pretrain.jsonl --jobs 2
    python experiments/recipe.py --data_path data/pretrain.jsonl --recipes original default_half     only these
    python experiments/recipe.py --data_path data/pretrain.jsonl --time       how long a step of each takes
    python experiments/recipe.py --stage SFT --data_path data/sft.jsonl --init_from out/pretrain.pth --out_dir out/sft
    python experiments/recipe.py --recipes                                    only the table

A recipe is a stage script with other flags, but for `original`, what this project came from: Config.ORIGINAL with a
document a row, cut at --max_seq_len and padded, 168 rows a step (`original_8`: 8). What it learns is computed from
packed documents, which give the same gradients (law 4) in less time. `default` is pretrain.py's recipe at 8 rows a
step; `muon_...` and `adamw_...` differ from it and from one another as their names say, and begin with random output
projections. `..._half`, `..._35`, `..._third`, `..._quarter` and `..._15` run their whole schedule on a half, 35 %, a
third, a quarter and 15 % of the tokens; `original_8_15` takes about as long as `default_35`.

--tokens are real ones, padding not counted. --jobs recipes run side by side and share the cores; how long a step takes
alone is measured by --time on a quiet machine, in turns with the original's as it would run there: transformers' Llama,
padded rows, fp32, 8 rows at once.
Runs lie in --out_dir, with the settings they were made with, and are not made twice. Without --data_path the text is
generated.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.measure import print_table, run_script, take_turns
from benchmarks.train_throughput import Transformers
from common import runtime
from common.optim import learning_rate, make_optimizers, set_learning_rate
from common.scoring import score
from Config import ORIGINAL, PRESETS, LLMConfig, OneLineParser, UserError, number
from dataset import (
    StepLoader,
    TextEncoder,
    evaluated,
    evaluation_batches,
    find_files,
    load_splits,
    load_tokenizer,
    make_micro_batch,
    write_jsonl,
)
from fastpath import accelerate
from model import WeakWater

CPU = torch.device("cpu")
COSINE = "--lr_schedule cosine --min_lr_ratio 0.1"
ADAMW = f"--optimizer adamw {COSINE} --learning_rate"
MUON = "--optimizer muon --lr_schedule trapezoid --decay_ratio 0.4 --min_lr_ratio 0 --learning_rate"
DEFAULT = f"{MUON} 4e-3 --output_init zero"
NORMAL = "--output_init normal"
RECIPES = {  # of a stage: {name: (flags, share of the tokens)}
    "pretrain": {
        "original": (None, 1),
        "original_8": (None, 1),
        "original_8_15": (None, 0.15),
        **{f"adamw_{rate}": (f"{ADAMW} {rate} {NORMAL}", 1) for rate in ("5e-4", "1e-3", "2e-3", "4e-3")},
        "default_adamw": (DEFAULT.replace("muon", "adamw").replace("4e-3", "2e-3"), 1),
        "default": (DEFAULT, 1),
        "default_half": (DEFAULT, 0.5),
        "default_35": (DEFAULT, 0.35),
        "default_third": (DEFAULT, 1 / 3),
        "default_quarter": (DEFAULT, 0.25),
        "default_32_rows": (f"{DEFAULT} --batch_size 32", 1),
        "default_32_rows_half": (f"{DEFAULT} --batch_size 32", 0.5),
        **{f"muon_{rate}": (f"{MUON} {rate} {NORMAL}", 1) for rate in ("2e-3", "4e-3", "8e-3")},
        "muon_half": (f"{MUON} 4e-3 {NORMAL}", 0.5),
        "muon_third": (f"{MUON} 4e-3 {NORMAL}", 1 / 3),
        "muon_cosine": (f"--optimizer muon {COSINE} --learning_rate 4e-3 {NORMAL}", 1),
        "muon_linear": (f"{MUON.replace('0.4', '0.98')} 4e-3 {NORMAL}", 1),
        "muon_decay_0": (f"{MUON} 4e-3 {NORMAL} --weight_decay 0", 1),
        "muon_4_rows": (f"{MUON} 4e-3 {NORMAL} --batch_size 4", 1),
        "muon_16_rows": (f"{MUON} 4e-3 {NORMAL} --batch_size 16", 1),
    },
    "SFT": {
        "adamw_5e-4": (f"{ADAMW} 5e-4", 1),
        **{f"muon_{rate}": (f"{MUON} {rate}", 1) for rate in ("5e-4", "1e-3", "2e-3", "4e-3")},
    },
    "SFT_long": {
        "adamw_5e-4": (f"{ADAMW} 5e-4", 1),
        **{f"muon_{rate}": (f"{MUON} {rate}", 1) for rate in ("2.5e-4", "5e-4", "1e-3", "2e-3")},
    },
    "distill": {
        "original": ("--recipe original", 1),
        "adamw_5e-4": (f"{ADAMW} 5e-4", 1),
        **{f"muon_{rate}": (f"{MUON} {rate}", 1) for rate in ("5e-4", "1e-3", "2e-3", "4e-3")},
    },
}
ROWS = {"pretrain": 8, "SFT": 8, "SFT_long": 4, "distill": 4}  # of a step, where a recipe does not say


def rows_of(args, name: str) -> int:
    """Rows of a step."""
    flags = (RECIPES[args.stage][name][0] or "").split()
    if name == "original" and args.stage == "pretrain":
        return 168
    return int(flags[flags.index("--batch_size") + 1]) if "--batch_size" in flags else ROWS[args.stage]


def timed_as(args, name: str) -> tuple[str, int]:
    """What the time of a step depends on, where ours makes it: optimizer and rows."""
    return ("muon" if "--optimizer muon" in RECIPES[args.stage][name][0] else "adamw"), rows_of(args, name)


# ---------------------------------------------------------------------------------------------
# the original


class Original:
    """The first recipe over the same documents."""

    def __init__(self, args, name: str, seed: int, train, val):
        self.args, self.train, self.val = args, train, val
        self.dtype, _ = runtime.pick_dtype("auto", CPU)
        runtime.prepare(CPU, seed, False)
        self.model = new_model(args)
        accelerate(self.model, CPU, self.dtype)
        self.rate, (self.optimizer,) = ORIGINAL["learning_rate"], make_optimizers(
            self.model, ORIGINAL["optimizer"], 0, ORIGINAL["weight_decay"], ORIGINAL["beta2"], ORIGINAL["decayed"])
        rng, rows, tokens = np.random.default_rng(seed), rows_of(args, name), 0
        lengths, self.steps = np.minimum(train.length, args.max_seq_len), []  # of a step: (document, 0, its length)
        if rows > len(train):
            raise UserError(f"--data_path: {len(train):,} documents do not fill a step of {rows}")
        wanted = args.tokens * RECIPES[args.stage][name][1]
        while tokens < wanted:  # epoch after epoch
            for documents in rng.permutation(len(train))[:len(train) // rows * rows].reshape(-1, rows):
                self.steps.append([(int(d), 0, int(lengths[d])) for d in documents])
                tokens += int(lengths[documents].sum())
                if tokens >= wanted:
                    break

    def step(self, pieces: list) -> None:
        """One step, from the documents without padding."""
        batches = [make_micro_batch(self.train, pieces[i:i + 8], np.ones(4, np.float32))
                   for i in range(0, len(pieces), 8)]
        backward(self.model, batches, sum(float(batch.weights.sum()) for batch in batches), self.dtype)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self) -> list[dict]:
        """Train; the curve."""
        tokens, curve = 0, []
        for step, pieces in enumerate(self.steps):
            set_learning_rate([self.optimizer], learning_rate(
                step, len(self.steps), self.rate, ORIGINAL["lr_schedule"], ORIGINAL["warmup_ratio"], 0,
                ORIGINAL["min_lr_ratio"]))
            self.step(pieces)
            tokens += sum(length for _, _, length in pieces)
            if step + 1 == len(self.steps) or (step + 1) % math.ceil(len(self.steps) / 5) == 0:
                scores = score(self.model, evaluation_batches(self.val, self.args.max_seq_len, 4096, 200_000),
                               self.val.bytes[:evaluated(self.val, 200_000)].sum(), CPU,
                               lambda: runtime.autocast(CPU, self.dtype))
                curve.append({"step": step + 1, "tokens": tokens, "bpb": scores["bpb"]})
        return curve


def new_model(args) -> WeakWater:
    """The preset for the tokenizer, its random weights those of torch's seed now."""
    config = LLMConfig.preset(args.preset, vocab_size=len(load_tokenizer(args.tokenizer_path)))
    return WeakWater(config.for_run(args.max_seq_len, dropout=0.0))


def backward(model: WeakWater, batches: list, total: float, dtype: str) -> None:
    """The gradients of one optimizer step, added up."""
    for batch in batches:
        with runtime.autocast(CPU, dtype):
            loss = model(**batch.to(CPU)) / total
        loss.backward()


# ---------------------------------------------------------------------------------------------
# learning


def learn(args, name: str, seed: int, folder: Path) -> list[dict]:
    """The curve of a recipe: [{"step", "tokens", "bpb"}], five points of a run."""
    flags, share = RECIPES[args.stage][name]
    if flags is None:
        return Original(args, name, seed, *splits(args)).run()
    rows = rows_of(args, name)
    steps = math.ceil(args.tokens * share / (rows * args.max_seq_len))
    start = ["--init_from", args.init_from] if args.init_from else ["--preset", args.preset]
    run_script(f"{args.stage}.py", "--data_path", args.data_path, "--tokenizer_path", args.tokenizer_path,
               "--out_dir", str(folder), "--cache_dir", str(Path(args.out_dir) / "cache"),
               "--max_seq_len", str(args.max_seq_len), "--batch_size", str(rows), "--accumulation_steps", "1",
               "--max_steps", str(steps), "--epochs", str(10**6), "--seed", str(seed), "--save_interval", str(steps),
               "--eval_interval", str(math.ceil(steps / 5)), "--log_interval", str(math.ceil(steps / 5)),
               "--device", "cpu", "--resume", *start, *flags.split(),
               *(["--val_path", args.val_path] if args.val_path else []))
    lines = map(json.loads, (folder / "log" / f"{args.stage}.jsonl").read_text(encoding="utf-8").splitlines())
    return [{"step": line["step"], "tokens": line["tokens"], "bpb": line["val_bpb"]}
            for line in lines if "val_bpb" in line]


def splits(args) -> tuple:
    """Training and validation documents, from the cache that the stage scripts use."""
    return load_splits(args.data_path, args.val_path, load_tokenizer(args.tokenizer_path),
                       "text" if args.stage == "pretrain" else "chat", str(Path(args.out_dir) / "cache"),
                       args.max_seq_len)


def folder_of(args, name: str, seed: int) -> Path:
    """Where a run lies."""
    return Path(args.out_dir) / args.stage / f"{name}_{seed}"


def settings_of(args, name: str) -> dict:
    """What a result depends on besides recipe and seed."""
    return {"recipe": RECIPES[args.stage][name][0], **shared_settings(args),
            **{key: getattr(args, key) for key in ("val_path", "init_from", "tokens")}}


def shared_settings(args) -> dict:
    """What the time of a step depends on too."""
    return {"tokenizer": TextEncoder.of(load_tokenizer(args.tokenizer_path)).fingerprint,
            **{key: getattr(args, key) for key in ("data_path", "preset", "max_seq_len")}}


def check_comparable(found: dict[Path, dict]) -> None:
    """Raises UserError where files are of runs that say nothing about one another."""
    (first, expected), *others = found.items()
    for other, settings in others:
        for key in sorted(settings.keys() & expected.keys() - {"recipe"}):
            if settings[key] != expected[key]:
                raise UserError(f"{key} is {expected[key]} in {first} and {settings[key]} in {other}: not to be "
                                "compared; take the same, or another --out_dir")


def learn_all(args) -> None:
    """Every recipe with every seed that has not been run yet, each in a process of its own, --jobs at a time."""
    def one(name: str, seed: int) -> None:
        result = folder_of(args, name, seed) / "result.json"
        if result.exists():
            if json.loads(result.read_text(encoding="utf-8"))["settings"] != settings_of(args, name):
                raise UserError(f"{result}: of a run with other flags: choose another --out_dir")
            return
        print(f"{name}, seed {seed}", flush=True)
        command = [sys.executable, __file__, "--alone", "--recipes", name, "--seeds", str(seed)]
        for flag in ("stage", "data_path", "val_path", "tokenizer_path", "out_dir", "preset", "tokens", "max_seq_len",
                     "init_from"):
            if getattr(args, flag) is not None:
                command += [f"--{flag}", str(getattr(args, flag))]
        threads = max(1, torch.get_num_threads() // args.jobs)
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            raise UserError(f"recipe {name}, seed {seed}: exit code {done.returncode} {done.stderr.strip()[-1000:]}")

    splits(args)  # the token cache: made once, before any two want it
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for run in [pool.submit(one, name, seed) for seed in args.seeds for name in args.recipes]:
                run.result()
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------------------------------------
# time


def time_steps(args) -> dict[str, list[float]]:
    """Seconds of a step of each recipe that differs in this, in turns; `original` takes 21 times `original_8`'s."""
    train, val = splits(args)
    dtype, _ = runtime.pick_dtype("auto", CPU)
    runtime.prepare(CPU, 1, False)
    padded = Transformers(new_model(args).config, CPU, dtype="fp32", padded_to=args.max_seq_len, compiled=False)
    steps = cycle(Original(args, "original_8", 1, train, val).steps)

    def padded_step() -> None:
        padded.step([(train.tokens(document)[:length], np.ones(length, bool))
                     for document, _, length in next(steps)], 8)

    work = {"original_8": padded_step}
    for name in RECIPES[args.stage]:
        if name.startswith("original"):
            continue
        optimizer, rows = timed_as(args, name)
        case = f"{optimizer}, {rows} rows"
        if case not in work:
            work[case] = our_step(args, optimizer, rows, train, dtype)
    return take_turns(work, args.repeats)


def our_step(args, optimizer: str, rows: int, train, dtype: str):
    """A function that makes the next step of a stage script, with weights of its own."""
    model = new_model(args)
    accelerate(model, CPU, dtype)
    optimizers = make_optimizers(model, optimizer, 1e-4, 0.1)
    loader = StepLoader(train, args.max_seq_len, rows, 1, 1)
    batches = (loader.step(0, number) for number in cycle(range(loader.steps_in_epoch(0))))

    def step() -> None:
        batch = next(batches)
        backward(model, batch.micro_batches, batch.total_weight, dtype)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad()

    return step


# ---------------------------------------------------------------------------------------------
# comparing


def read_results(args, settings_now: dict | None = None) -> tuple[dict, dict]:
    """What lies in --out_dir: {(recipe, seed): end of its curve}, and the seconds of a step of each case.

    Raises UserError where those are of other settings, or of others than `settings_now`.
    """
    out, runs, seconds, settings = Path(args.out_dir), {}, {}, {}
    try:
        for file in sorted(out.glob(f"{args.stage}/*/result.json")):
            run = json.loads(file.read_text(encoding="utf-8"))
            runs[run["recipe"], run["seed"]], settings[file] = run["curve"][-1], run["settings"]
        file = out / "seconds.json"
        if args.stage == "pretrain" and file.exists():
            timed = json.loads(file.read_text(encoding="utf-8"))
            seconds, settings[file] = timed["seconds"], timed["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not a result of this script ({type(error).__name__}: {error}); choose another "
                        "--out_dir") from None
    if settings_now:
        settings[Path("this command")] = settings_now
    if settings:
        check_comparable(settings)
    return runs, seconds


def show(args) -> None:
    """The end of every run, beside the original's of the same seed."""
    out, (runs, seconds) = Path(args.out_dir), read_results(args)

    def minutes(name: str, steps: int) -> float | None:
        if not seconds:
            return None
        if name.startswith("original"):
            return steps * statistics.median(seconds["original_8"]) * rows_of(args, name) / 8 / 60
        case = "{}, {} rows".format(*timed_as(args, name))
        if case not in seconds:
            raise UserError(f"{out / 'seconds.json'} lacks a step of {case}: measure again with --time")
        return steps * statistics.median(seconds[case]) / 60

    rows, firsts = [], [first for first in ("original", "original_8") if any(name == first for name, _ in runs)]
    for name in RECIPES[args.stage]:
        for seed in sorted(seed for other, seed in runs if other == name):
            end = runs[name, seed]
            time_alone, beside = minutes(name, end["step"]), []
            for first in firsts:
                if (first, seed) in runs:
                    theirs = runs[first, seed]
                    beside += [f"{end['tokens'] / theirs['tokens']:.0%}",
                               f"{time_alone / minutes(first, theirs['step']):.1%}" if seconds else "",
                               f"{end['bpb'] - theirs['bpb']:+.4f}"]
                else:
                    beside += [""] * 3
            rows.append([name, str(seed), f"{end['step']:,}", f"{end['tokens']:,}",
                         f"{time_alone:.1f}" if seconds else "", f"{end['bpb']:.4f}", *beside])
    head = ["recipe", "seed", "steps", "tokens", "minutes", "bits per byte"]
    for first in firsts:
        head += [f"share of {first}'s tokens", "of its time", "bits per byte beside its"]
    print_table(head, rows)
    if args.stage == "pretrain" and not seconds:
        print("minutes and time need the same command with --time, on a quiet machine")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default="pretrain", choices=tuple(RECIPES), help="(default: %(default)s)")
    parser.add_argument("--recipes", nargs="*", metavar="NAME", help="(default: all of the stage)")
    parser.add_argument("--data_path", help="training data (default, of pretrain: generated)")
    parser.add_argument("--val_path", help="held-out data (default: 0.5 %% of data_path)")
    parser.add_argument("--tokenizer_path", help="(default: trained on the data)")
    parser.add_argument("--init_from", help="weights that a stage after pretrain starts from")
    parser.add_argument("--out_dir", default="out/recipe", help="(default: %(default)s)")
    parser.add_argument("--preset", default="weakwater-5m", choices=tuple(PRESETS), help="(default: %(default)s)")
    parser.add_argument("--tokens", type=number(int, 1), default=8_000_000, help="real ones (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=number(int, 2), default=512, help="of a row (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--time", action="store_true", help="time steps in turns; nothing else may run")
    parser.add_argument("--repeats", type=number(int, 1), default=5, help="turns of --time (default: %(default)s)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out, known = Path(args.out_dir), RECIPES[args.stage]
    args.recipes = list(known) if args.recipes is None else args.recipes
    for name in args.recipes:
        if name not in known:
            parser.error(f"--recipes {name}: not one of {', '.join(known)}")
    if args.time and args.stage != "pretrain":
        parser.error("--time is of --stage pretrain only")
    if args.val_path and not args.data_path:
        parser.error("--val_path goes with --data_path")
    if args.recipes or args.time:
        if args.stage != "pretrain" and not (args.data_path and args.init_from and args.tokenizer_path):
            parser.error(f"--stage {args.stage} needs --data_path, --tokenizer_path and --init_from")
        prepare_data(args, out)
    if args.alone:
        name, seed = args.recipes[0], args.seeds[0]
        folder = folder_of(args, name, seed)
        result = {"recipe": name, "seed": seed, "settings": settings_of(args, name),
                  "curve": learn(args, name, seed, folder)}
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl([result], folder / "result.json")
        return
    if args.recipes or args.time:  # what cannot be compared is not trained
        read_results(args, shared_settings(args) if args.time else settings_of(args, args.recipes[0]))
    if args.time:
        seconds = time_steps(args)
        write_jsonl([{"settings": shared_settings(args), "seconds": seconds}], out / "seconds.json")
        print(runtime.describe_machine(CPU))
        print_table(["a step of", "seconds, median", "range"],
                    [[name, f"{statistics.median(each):.3f}", f"{min(each):.3f} to {max(each):.3f}"]
                     for name, each in seconds.items()])
    elif args.recipes:
        learn_all(args)
    show(args)


def prepare_data(args, out: Path) -> None:
    """Generated text and a tokenizer where none is given."""
    out.mkdir(parents=True, exist_ok=True)
    if args.data_path:
        find_files(args.data_path)
    else:
        if not (out / "data").exists():
            run_script("make_demo_data.py", "--out_dir", str(out / "data"))
        args.data_path, args.val_path = str(out / "data" / "pretrain.jsonl"), None
    if not args.tokenizer_path:
        args.tokenizer_path = str(out / "tokenizer")
        if not Path(args.tokenizer_path).exists():
            run_script("train_tokenizer.py", "--data_path", args.data_path, "--tokenizer_path", args.tokenizer_path)


if __name__ == "__main__":
    sys.exit(runtime.run(main))
