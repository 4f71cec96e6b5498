"""What a model is (LLMConfig and its presets) and what a run is (every flag, defined once).

Nothing here imports the rest of the project, and everything else may import this.
"""

import argparse
import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace


class UserError(ValueError):
    """An error the user can fix. Scripts print it as one line on stderr and exit with 2."""


# ---------------------------------------------------------------------------------------------
# the model


@dataclass(frozen=True)
class LLMConfig:
    """Architecture of one decoder. The default is `weakwater-30m`: 28,975,616 parameters.

    The fields describe a Llama (with `qk_norm`: a Qwen3) exactly, so that weights can be
    exported without renaming. Raises UserError for values that are not valid.
    """

    vocab_size: int = 6400
    dim: int = 512  # width of the residual stream, C
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention; None: n_heads
    hidden_dim: int = 1408  # width inside SwiGLU
    max_seq_len: int = 1024  # the longest context the model is meant for, in tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False  # RMSNorm on each head's query and key before RoPE, as in Qwen3
    dropout: float = 0.0  # on the embedding and on each residual branch, in training only
    head_dim: int | None = None  # width of one attention head; None: dim / n_heads

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_seq_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"LLMConfig.{name} must be a whole number of at least 1, not {value!r}")
        for name in ("tie_embeddings", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"LLMConfig.{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("rope_theta", "norm_eps", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"LLMConfig.{name} must be a finite number, not {value!r}")
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise UserError(
                    f"LLMConfig: dim {self.dim} is not divisible by n_heads {self.n_heads}: every head has the same width"
                )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if isinstance(self.head_dim, bool) or not isinstance(self.head_dim, int) or self.head_dim < 1:
            raise UserError(f"LLMConfig.head_dim must be a whole number of at least 1, not {self.head_dim!r}")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"LLMConfig: n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}: "
                "each key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"LLMConfig: head width {self.head_dim} is odd: RoPE rotates pairs of dimensions"
            )
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise UserError("LLMConfig: rope_theta and norm_eps must be greater than 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LLMConfig.dropout must be in [0, 1), not {self.dropout}")

    def to_dict(self) -> dict:
        """Plain types, as stored in a checkpoint. A head_dim of dim / n_heads is left out, as in earlier versions."""
        values = asdict(self)
        if self.head_dim * self.n_heads == self.dim:
            del values["head_dim"]
        return values

    def for_run(self, max_seq_len: int, dropout: float) -> "LLMConfig":
        """The same architecture with the dropout of a run and a context for its rows (RoPE has no weights to grow)."""
        return replace(self, max_seq_len=max(self.max_seq_len, max_seq_len), dropout=dropout)

    @classmethod
    def from_dict(cls, values: dict) -> "LLMConfig":
        """The inverse of `to_dict`. Raises UserError on a field this version does not know."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"LLMConfig: unknown field {', '.join(sorted(map(str, unknown)))}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **overrides) -> "LLMConfig":
        """A named architecture from PRESETS, with single fields overridden."""
        if name not in PRESETS:
            raise UserError(f"--preset {name}: not one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


PRESETS = {
    "nano": dict(dim=64, n_layers=2, n_heads=2, hidden_dim=192),  # for tests
    "demo": dict(dim=128, n_layers=4, n_heads=4, hidden_dim=384),  # minutes on a laptop CPU
    "weakwater-5m": dict(dim=256, n_layers=5, n_heads=4, hidden_dim=704),
    "weakwater-30m": dict(),
    "weakwater-30m-gqa": dict(n_layers=10, n_kv_heads=2, hidden_dim=1280, qk_norm=True),
}


# ---------------------------------------------------------------------------------------------
# a run


@dataclass(frozen=True)
class Flag:
    """One command-line flag. `trajectory` marks those that change the losses that follow, and so may not differ
    between a run and its resumption."""

    kind: type  # int, float, str, bool
    default: object
    help: str
    choices: tuple = ()
    common: bool = False  # one of the ten that a newcomer needs
    trajectory: bool = False
    low: float | None = None  # smallest value allowed
    high: float | None = None  # largest value allowed
    several: bool = False  # takes one or more values


FLAGS = {
    # the ten that a newcomer needs
    "data_path": Flag(str, None, "training data: JSONL files (plain, .gz, .xz, .zst), folders, globs or names in data/; A=0.7 B=0.3 mixes sources at these shares of the tokens", common=True, several=True),
    "val_path": Flag(str, None, "validation data in the same form, without shares (default: 0.5 %% of each source, chosen by hash)", common=True, several=True),
    "out_dir": Flag(str, "out", "folder for weights, checkpoints, logs, charts and the token cache", common=True),
    "init_from": Flag(str, None, "weights to start from ('none': random weights)", common=True),
    "preset": Flag(str, None, "architecture when starting from random weights (default: weakwater-30m)", choices=tuple(PRESETS), common=True, trajectory=True),
    "epochs": Flag(int, 1, "passes over the data", common=True, trajectory=True, low=1),
    "batch_size": Flag(int, 32, "rows of max_seq_len tokens in a micro-batch, on each device (of chats up to one more)", common=True, trajectory=True, low=1),
    "learning_rate": Flag(float, 4e-3, "peak learning rate", common=True, trajectory=True, low=0),
    "device": Flag(str, "auto", "device to compute on", choices=("auto", "cpu", "cuda", "mps"), common=True),
    "resume": Flag(bool, False, "continue from the newest whole checkpoint in out_dir", common=True),
    # data
    "tokenizer_path": Flag(str, None, "folder of the tokenizer (default: the tokenizer inside the starting weights, else weakwater_tokenizer)"),
    "max_seq_len": Flag(int, 512, "tokens in a row", trajectory=True, low=2),
    "min_tokens": Flag(int, 0, "skip conversations with fewer tokens", trajectory=True, low=0),
    "max_tokens": Flag(int, None, "skip conversations with more tokens", trajectory=True, low=1),
    "max_bad_ratio": Flag(float, 0.01, "stop when more than this share of a source's lines is malformed", low=0, high=1),
    "max_text_loss": Flag(float, 0.001, "stop when the tokenizer loses more than this share of the characters in a sample", low=0, high=1),
    "split_documents": Flag(bool, False, "split a text at control strings that it spells, such as </s>: each part is a document", trajectory=True),
    "keep_malformed_thoughts": Flag(bool, False, "also train on replies whose <think> and <answer> tags are cut, repeated or out of order", trajectory=True),
    "order": Flag(str, "shuffled", "order of the documents in each epoch", choices=("shuffled", "file"), trajectory=True),
    "cache_dir": Flag(str, None, "folder of the token cache (default: out_dir/cache)"),
    # optimization
    "max_steps": Flag(int, 0, "stop after this many optimizer steps (0: no limit)", trajectory=True, low=0),
    "accumulation_steps": Flag(int, 1, "micro-batches in an optimizer step, on each device", trajectory=True, low=1),
    "output_init": Flag(str, "zero", "from random weights: how each layer's output projections start, at zero or random as in GPT-2", choices=("zero", "normal"), trajectory=True),
    "lr_schedule": Flag(str, "trapezoid", "learning rate schedule (trapezoid: warmup, stable, decay, also called WSD)", choices=("constant", "cosine", "trapezoid"), trajectory=True),
    "warmup_ratio": Flag(float, 0.02, "share of the steps over which the rate rises from 0", trajectory=True, low=0, high=1),
    "decay_ratio": Flag(float, 0.4, "share of the steps over which a trapezoid decays", trajectory=True, low=0, high=1),
    "min_lr_ratio": Flag(float, 0.0, "final learning rate / peak (cosine, trapezoid)", trajectory=True, low=0, high=1),
    "optimizer": Flag(str, "muon", "muon: Muon for the hidden matrices, AdamW for the rest", choices=("adamw", "muon"), trajectory=True),
    "beta2": Flag(float, 0.95, "AdamW beta2", trajectory=True, low=0, high=0.999999),
    "weight_decay": Flag(float, 0.1, "decoupled weight decay", trajectory=True, low=0),
    "weight_decay_on": Flag(str, "matrices", "weights that decay", choices=("matrices", "all"), trajectory=True),
    "grad_clip": Flag(float, 1.0, "largest gradient norm (0: no clipping)", trajectory=True, low=0),
    "dropout": Flag(float, 0.0, "dropout on the embedding and each residual branch", trajectory=True, low=0, high=0.99),
    "tag_weight": Flag(float, 1.0, "loss weight of <think> </think> <answer> </answer>", trajectory=True, low=0),
    "think_weight": Flag(float, 1.0, "loss weight of the text inside <think>", trajectory=True, low=0),
    "without_thoughts": Flag(bool, False, "train on data in which no reply has a thought too: the control of the thinking gain"),
    "seed": Flag(int, 42, "seed of weights, order and dropout", trajectory=True, low=0, high=2**63 - 1),
    # machine
    "dtype": Flag(str, "auto", "precision of the matmuls", choices=("auto", "bf16", "fp16", "fp32")),
    "compile": Flag(bool, False, "torch.compile each block (needs a C++ compiler on CPU)", trajectory=True),
    "gradient_checkpointing": Flag(bool, False, "recompute activations in the backward pass: less memory, more time"),
    "deterministic": Flag(bool, False, "deterministic kernels only (slower on CUDA)", trajectory=True),
    "plain": Flag(bool, False, "compute only what model.py says, without the faster replacements of fastpath/"),
    # logging and checkpoints
    "log_interval": Flag(int, 10, "steps between log lines", low=1),
    "eval_interval": Flag(int, 500, "steps between validations (0: only at the end)", low=0),
    "eval_tokens": Flag(int, 200_000, "validation tokens scored each time (0: all)", low=0),
    "save_interval": Flag(int, None, "steps between checkpoints (default: 500, but at most one a minute)", low=1),
    "keep_checkpoints": Flag(int, 2, "newest checkpoints to keep", low=1),
    "use_wandb": Flag(bool, False, "also log to Weights & Biases (works offline)"),
    "wandb_project": Flag(str, "weakwater", "Weights & Biases project"),
}

DISTILL_ONLY = ("tag_weight", "think_weight", "without_thoughts")
CHAT_ONLY = ("min_tokens", "max_tokens", "keep_malformed_thoughts")


class OneLineParser(argparse.ArgumentParser):
    """argparse that reports an error in one line and exits with 2."""

    def error(self, message: str):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: an int or float between `low` and `high`."""
    def read(text: str):
        value = kind(text)
        if not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return value

    read.__name__ = kind.__name__  # for argparse's "invalid int value"
    return read


def parse_args(stage: str, description: str, argv: list[str] | None = None, previous: str | None = None,
               leave_out: tuple = (), **defaults):
    """The arguments of one training stage as a namespace.

    `defaults` are the stage's own default values, that of data_path as it would stand on the command line; `leave_out`
    names flags that do not apply to it. Without --init_from it starts from the weights of the `previous` stage in
    --out_dir, or from random weights. The namespace also carries `stage`, `previous`, `command`, the line that would
    run the same again, and `default_data`: True without --data_path.
    Exits with 2, after one line on stderr, on an unknown flag or a value out of range.
    """
    parser = OneLineParser(prog=f"{stage}.py", usage="%(prog)s [flags]", description=description, allow_abbrev=False,
                           add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    argv = sys.argv[1:] if argv is None else argv
    common = parser.add_argument_group("common flags")
    advanced = parser.add_argument_group("advanced flags")
    for name, flag in FLAGS.items():
        if name in leave_out:
            continue
        group = common if flag.common else advanced
        default = defaults.get(name, flag.default)
        if flag.kind is bool:
            group.add_argument(f"--{name}", action="store_true", help=flag.help)
            continue
        shown = f"{previous}.pth in out_dir" if name == "init_from" and previous else default
        if name == "data_path" and default and " " in default:
            shown = f"{default}: the first, and those of the others that are in data/"
        group.add_argument(f"--{name}", type=flag.kind, choices=flag.choices or None, nargs="+" if flag.several else None,
                           default=None if flag.several else default,
                           help=flag.help if shown is None else f"{flag.help} (default: {shown})",
                           metavar=None if flag.choices else "PATH" if flag.several else flag.kind.__name__.upper())
    advanced.add_argument("-h", "--help", action="help", help="show this message and exit")
    args = parser.parse_args(argv)
    for name, flag in FLAGS.items():
        value = getattr(args, name, None)
        if value is None or flag.kind not in (int, float):
            continue
        if not math.isfinite(value) or (flag.low is not None and value < flag.low) or (
                flag.high is not None and value > flag.high):
            limits = f"at least {flag.low}" if flag.high is None else f"between {flag.low} and {flag.high}"
            parser.error(f"--{name} {value}: must be {limits}")
    if getattr(args, "max_tokens", None) is not None and args.min_tokens > args.max_tokens:
        parser.error(f"--min_tokens {args.min_tokens} is greater than --max_tokens {args.max_tokens}")
    args.stage, args.previous, args.default_data = stage, previous, args.data_path is None
    args.data_path = args.data_path or (defaults["data_path"].split() if "data_path" in defaults else None)
    args.cache_dir = args.cache_dir or os.path.join(args.out_dir, "cache")
    args.init_from = args.init_from or (os.path.join(args.out_dir, f"{previous}.pth") if previous else "none")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    starter = [python] if processes == 1 else [python, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    script = sys.argv[0] if os.path.basename(sys.argv[0]) == f"{stage}.py" else f"{stage}.py"
    args.command = " ".join(map(_quoted, [*starter, script, *argv]))
    return args


def _quoted(word: str) -> str:
    return subprocess.list2cmdline([word]) if os.name == "nt" else shlex.quote(word)
