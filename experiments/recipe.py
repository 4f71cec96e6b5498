"""Which recipe learns most from a token, and from a second? Held-out bits per byte, recipes side by side.

    python experiments/recipe.py --data_path data/pretrain.jsonl --tokens 8000000 --seeds 1 2
    python experiments/recipe.py --recipes original muon muon_half      only these
    python experiments/recipe.py --recipes                              only the table, of what has been run

Every recipe but the first is `python pretrain.py` with other flags. `original` is what this project came from: a
document a row, cut at --max_seq_len and padded, --rows rows a step, AdamW with betas 0.9 and 0.999 and a decay of 0.01
on every weight, 5e-4 on a cosine to a tenth. Its documents are computed packed, which gives the same gradients (law 4)
in less time; its *time* is the number of its steps by the median of five padded fp32 steps, timed in the same run. Its
tokens are the real ones. `..._half` runs the whole schedule on half of the tokens.

The models are random at first by --seeds; all see the same held-out documents. Runs lie in --out_dir and are not made
twice. Without --data_path the text is generated.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from common import checkpoint, runtime
from common.optim import learning_rate, set_learning_rate
from common.scoring import score
from Config import PRESETS, LLMConfig, OneLineParser, UserError, number
from dataset import evaluated, evaluation_batches, load_splits, load_tokenizer, make_micro_batch
from model import WeakWater

ROOT = Path(__file__).resolve().parent.parent
MUON = "--optimizer muon --learning_rate 4e-3 --lr_schedule trapezoid --decay_ratio 0.4 --min_lr_ratio 0"
ROWS = 8  # of a step of all but the original
RECIPES = {  # name: (flags of pretrain.py, share of the tokens)
    "original": None,
    "adamw": ("--optimizer adamw --learning_rate 2e-3 --lr_schedule cosine --warmup_ratio 0.02", 1),
    "adamw_4e-3": ("--optimizer adamw --learning_rate 4e-3 --lr_schedule cosine --warmup_ratio 0.02", 1),
    "muon": (f"{MUON} --warmup_ratio 0.02", 1),
    "muon_half": (f"{MUON} --warmup_ratio 0.02", 0.5),
    "muon_quarter": (f"{MUON} --warmup_ratio 0.02", 0.25),
    "muon_cosine": ("--optimizer muon --learning_rate 4e-3 --lr_schedule cosine --warmup_ratio 0.02", 1),
    "muon_2e-3": (MUON.replace("4e-3", "2e-3") + " --warmup_ratio 0.02", 1),
    "muon_8e-3": (MUON.replace("4e-3", "8e-3") + " --warmup_ratio 0.02", 1),
    "muon_decay_0": (f"{MUON} --warmup_ratio 0.02 --weight_decay 0", 1),
    "muon_4_rows": (f"{MUON} --warmup_ratio 0.02 --batch_size 4", 1),
    "muon_16_rows": (f"{MUON} --warmup_ratio 0.02 --batch_size 16", 1),
    "muon_zero_init": (f"{MUON} --warmup_ratio 0.02", 1),  # output projections that begin at zero
}


# ---------------------------------------------------------------------------------------------
# the original


class Original:
    """The first recipe over the same documents."""

    def __init__(self, args, seed: int, train, val):
        self.args, self.train, self.val = args, train, val
        torch.manual_seed(seed)
        self.model = WeakWater(LLMConfig.preset(args.preset, vocab_size=args.vocab_size))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4, betas=(0.9, 0.999), weight_decay=0.01)
        self.dtype, _ = runtime.pick_dtype("auto", torch.device("cpu"))
        order = np.random.default_rng(seed).permutation(len(train))
        lengths, chosen, tokens = np.minimum(train.length, args.max_seq_len), [], 0
        while tokens < args.tokens:  # epoch after epoch
            for document in order[:len(order) // args.rows * args.rows].reshape(-1, args.rows):
                chosen.append([(int(d), 0, int(lengths[d])) for d in document])
                tokens += int(lengths[document].sum())
                if tokens >= args.tokens:
                    break
        self.steps = chosen

    def update(self) -> None:
        """Clip, step, forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def padded_step(self, pieces: list[tuple]) -> float:
        """Seconds of the step as it was: fp32, every row filled up to --max_seq_len, logits for every position."""
        begin, length = time.perf_counter(), self.args.max_seq_len
        ids, mask = torch.zeros(len(pieces), length, dtype=torch.long), torch.zeros(len(pieces), length - 1)
        for row, (document, _, n) in enumerate(pieces):
            start = int(self.train.cache.documents["start"][self.train.index[document]])
            ids[row, :n] = torch.from_numpy(self.train.cache.tokens[start:start + n].astype(np.int64))
            mask[row, :n - 1] = 1
        for some, weight in zip(ids.split(self.args.micro_rows), mask.split(self.args.micro_rows), strict=True):
            logits = self.model(some[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="none")
            ((loss * weight.flatten()).sum() / mask.sum()).backward()
        self.update()
        return time.perf_counter() - begin

    def packed_step(self, pieces: list[tuple]) -> None:
        """The same gradient (to rounding) from the documents alone."""
        batches = [make_micro_batch(self.train, pieces[i:i + 32], np.ones(4, np.float32))
                   for i in range(0, len(pieces), 32)]
        total = sum(float(batch.weights.sum()) for batch in batches)
        for batch in batches:
            with runtime.autocast(torch.device("cpu"), self.dtype):
                loss = self.model(**batch.to("cpu")) / total
            loss.backward()
        self.update()

    def run(self) -> dict:
        """Train; the curve, with the time that padded fp32 steps would have taken."""
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        seconds = statistics.median(self.padded_step(self.steps[i]) for i in range(-5, 0))
        self.model.load_state_dict(state)
        self.optimizer.state.clear()
        tokens, curve = 0, []
        for step, pieces in enumerate(self.steps):
            set_learning_rate([self.optimizer], learning_rate(step, len(self.steps), 5e-4, "cosine"))
            self.packed_step(pieces)
            tokens += sum(length for _, _, length in pieces)
            if step + 1 == len(self.steps) or (step + 1) % max(1, len(self.steps) // 10) == 0:
                bpb = held_out_bpb(self.args, self.model, self.val, self.dtype)
                curve.append({"tokens": tokens, "seconds": (step + 1) * seconds, "bpb": bpb})
                print(f"  {tokens:,} tokens, {bpb:.4f}", flush=True)
        return {"curve": curve, "padded_step_seconds": seconds}


def held_out_bpb(args, model: WeakWater, val, dtype: str) -> float:
    """Bits per byte of the first 200,000 held-out tokens, as pretrain.py scores them."""
    device = torch.device("cpu")
    scores = score(model, evaluation_batches(val, args.max_seq_len, ROWS * args.max_seq_len, 200_000),
                   val.bytes[:evaluated(val, 200_000)].sum(), device, lambda: runtime.autocast(device, dtype))
    return scores["bpb"]


# ---------------------------------------------------------------------------------------------
# the others


def run_script(args, name: str, seed: int, folder: Path) -> dict:
    """pretrain.py with a recipe's flags; the curve from its log."""
    flags, share = RECIPES[name]
    rows = int(flags.split("--batch_size ")[1].split()[0]) if "--batch_size" in flags else ROWS
    steps = math.ceil(args.tokens * share / (rows * args.max_seq_len))
    command = [sys.executable, "pretrain.py", "--data_path", args.data_path, "--tokenizer_path", args.tokenizer_path,
               "--out_dir", str(folder), "--cache_dir", str(Path(args.out_dir) / "cache"), "--preset", args.preset,
               "--max_seq_len", str(args.max_seq_len), "--batch_size", str(rows), "--accumulation_steps", "1",
               "--max_steps", str(steps), "--epochs", "100", "--seed", str(seed), "--save_interval", str(steps),
               "--eval_interval", str(math.ceil(steps / 10)), "--log_interval", str(math.ceil(steps / 10)),
               "--device", "cpu", *flags.split(), *(["--val_path", args.val_path] if args.val_path else [])]
    if name.endswith("zero_init"):
        torch.manual_seed(seed)
        model = WeakWater(LLMConfig.preset(args.preset, vocab_size=args.vocab_size))
        with torch.no_grad():
            for block in model.model.layers:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
        folder.mkdir(parents=True)
        checkpoint.save_weights(folder / "start.pth", model, {"stage": "pretrain"})
        command += ["--init_from", str(folder / "start.pth")]
        command[command.index("--preset"):command.index("--preset") + 2] = []
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"recipe {name}: pretrain.py failed; its log is in {folder}")
    curve, seconds, tokens = [], 0.0, 0
    for line in (folder / "log" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
        tokens = row["tokens"]
        if "val_bpb" in row:
            curve.append({"tokens": tokens, "seconds": seconds, "bpb": row["val_bpb"]})
    return {"curve": curve, "command": " ".join(command)}


# ---------------------------------------------------------------------------------------------
# comparing


def table(out: Path) -> str:
    """Markdown: the end of every run, beside the original's of the same seed."""
    runs = {}
    for file in sorted(out.glob("*/result.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        runs[run["recipe"], run["seed"]] = run["curve"][-1]
    head = "recipe, seed, tokens, minutes, bits per byte, of the original's tokens, of its time, below its bits"
    lines = [f"| {head.replace(', ', ' | ')} |", "|---" * 8 + "|"]
    for recipe in RECIPES:
        for seed in sorted({seed for name, seed in runs if name == recipe}):
            end, first = runs[recipe, seed], runs.get(("original", seed))
            beside = (f"{end['tokens'] / first['tokens']:.0%} | {end['seconds'] / first['seconds']:.1%} | "
                      f"{first['bpb'] - end['bpb']:+.4f}" if first else " | | ")
            lines.append(f"| {recipe} | {seed} | {end['tokens']:,} | {end['seconds'] / 60:.1f} | {end['bpb']:.4f} | "
                         f"{beside} |")
    return "\n".join(lines)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=tuple(RECIPES), metavar="NAME",
                        help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--data_path", help="JSONL of texts (default: the quickstart's world)")
    parser.add_argument("--val_path", help="held-out texts (default: 0.5 %% of data_path)")
    parser.add_argument("--tokenizer_path", help="(default: trained on the data)")
    parser.add_argument("--out_dir", default="out/recipe", help="(default: %(default)s)")
    parser.add_argument("--preset", default="weakwater-5m", choices=tuple(PRESETS), help="(default: %(default)s)")
    parser.add_argument("--tokens", type=number(int, 1), default=8_000_000, help="real ones (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=number(int, 2), default=512, help="of a row (default: %(default)s)")
    parser.add_argument("--rows", type=number(int, 1), default=168, help="of the original's step: 84 x 2 (default)")
    parser.add_argument("--micro_rows", type=number(int, 1), default=8, help="at a time when padded (default: 8)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    args = parser.parse_args()
    out = Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)

    def script(*command: str) -> None:
        if subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"{' '.join(command)} failed")

    if args.recipes and not args.data_path:
        if not (out / "data").exists():
            script("make_demo_data.py", "--out_dir", str((out / "data").resolve()))
        args.data_path, args.val_path = str((out / "data/pretrain.jsonl").resolve()), None
    if args.recipes and not args.tokenizer_path:
        args.tokenizer_path = str((out / "tokenizer").resolve())
        if not Path(args.tokenizer_path).exists():
            script("train_tokenizer.py", "--data_path", args.data_path, "--tokenizer_path", args.tokenizer_path)
    for seed in args.seeds:
        for name in args.recipes:
            folder = (out / f"{name}_{seed}").resolve()
            if (folder / "result.json").exists():
                continue
            print(f"{name}, seed {seed}", flush=True)
            tokenizer = load_tokenizer(args.tokenizer_path)
            args.vocab_size = len(tokenizer)
            if name == "original":
                runtime.prepare(torch.device("cpu"), seed, False)
                train, val = load_splits(args.data_path, args.val_path, tokenizer, "text", str(out / "cache"),
                                         args.max_seq_len)
                result = Original(args, seed, train, val).run()
            else:
                result = run_script(args, name, seed, folder)
            folder.mkdir(exist_ok=True)
            result |= {"recipe": name, "seed": seed, "machine": runtime.describe_machine(torch.device("cpu"))}
            (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (out / "README.md").write_text(table(out) + "\n", encoding="utf-8")
    print(table(out))


if __name__ == "__main__":
    sys.exit(runtime.run(main))
