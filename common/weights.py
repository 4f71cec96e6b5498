"""Weights files, which the next stage, a chat or an evaluation starts from: {"model", "config", "meta"} in one .pth.

`meta["tokenizer"]` holds the texts of the tokenizer's two files, so a weights file alone is all that a chat needs.
"""

import argparse
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common import runtime
from common.checkpoint import load, save
from common.generation import Decoder
from Config import FLAGS, LLMConfig, OneLineParser, UserError, number
from fastpath.int8 import state_from_int8, state_to_int8
from model import WeakWater
from text.tokenizer import TextEncoder, choose_tokenizer

STAGES = {0: "pretrain", 1: "SFT", 2: "distill", 3: "SFT_long"}  # by --model_mode


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


def save_int8(path: Path, model: WeakWater, meta: dict) -> None:
    """Write weights whose matrices are in int8, with "scales" (fastpath/int8.py), to decode with; meta gets
    {"quant": "int8"} and loses the SHA-256 of the weights that were rounded."""
    state, scales = state_to_int8(model.state_dict())
    meta = {key: value for key, value in meta.items() if key != "weights_sha256"} | {"quant": "int8"}
    save({"model": state, "scales": scales, "config": model.config.to_dict(), "meta": meta}, path)


def is_int8(meta: dict) -> bool:
    """True for the metadata of `save_int8`."""
    return meta.get("quant") == "int8"


def refuse_int8(path: Path | str, meta: dict) -> None:
    """Raises UserError for weights of `save_int8`."""
    if is_int8(meta):
        raise UserError(f"{path}: its weights are rounded to int8, to decode with; take the weights that it was "
                        "exported from")


def load_weights(path: Path, hint: str = "") -> tuple[dict[str, torch.Tensor], LLMConfig, dict]:
    """(state dict, config, meta) of a weights file; int8 is restored to float32. Raises UserError; `hint` says how the
    file is made."""
    if hint and not Path(path).is_file():
        raise UserError(f"{path}: no such file ({hint})")
    content = load(path, ("model", "config", "meta"))
    if not all(isinstance(content[key], dict) for key in ("model", "config", "meta")):
        raise UserError(f"{path}: not a WeakWater checkpoint")
    try:
        config = LLMConfig.from_dict(content["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not is_int8(content["meta"]):
        return content["model"], config, content["meta"]
    try:
        return state_from_int8(content["model"], content["scales"]), config, content["meta"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: damaged int8 weights: {error}") from None


def load_strict(model: WeakWater, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state dict strictly. Raises UserError, naming the file, when names or shapes differ or a weight is NaN or
    infinite."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its config: {' '.join(str(error).split())[:300]}") from None
    broken = [name for name, tensor in state.items() if not all(map(math.isfinite, tensor.float().aminmax()))]
    if broken:
        raise UserError(f"{path}: NaN or infinity in {len(broken)} of its weight tensors (the first: {broken[0]}): "
                        "they cannot be used")


def load_model(path: Path, device="cpu", hint: str = "") -> tuple[WeakWater, dict]:
    """The model in a weights file, in eval mode on `device`, and the file's meta. Raises UserError."""
    state, config, meta = load_weights(path, hint)
    model = WeakWater(config)
    load_strict(model, state, path)
    return model.to(device).eval(), meta


# ---------------------------------------------------------------------------------------------
# the weights that a command line names, ready to run


def model_parser(prog: str, description: str) -> OneLineParser:
    """A parser with the flags that choose weights, tokenizer, device and precision."""
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    modes = ", ".join(f"{mode} {stage}" for mode, stage in STAGES.items())
    which.add_argument("--model_mode", type=int, choices=tuple(STAGES), help=f"the weights in out_dir of: {modes}")
    which.add_argument("--checkpoint", metavar="PATH", help="a weights file of any stage")
    parser.add_argument("--plain", action="store_true", help=FLAGS["plain"].help)
    for name in ("out_dir", "tokenizer_path", "device", "dtype"):
        flag = FLAGS[name]
        parser.add_argument(f"--{name}", default=flag.default, choices=flag.choices or None,
                            help=flag.help if flag.default is None else f"{flag.help} (default: {flag.default})")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=42,
                        help="seed of all random choices (default: 42)")
    return parser


def check_tokenizer_fits(encoder: TextEncoder, model: WeakWater, path: Path) -> None:
    """Raises UserError if the tokenizer has more entries than the weights."""
    if encoder.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer has {encoder.vocab_size:,} entries, {path} only {model.config.vocab_size:,}: "
                        "not the one it was trained with; name that with --tokenizer_path")


@dataclass
class Loaded:
    """Weights, ready to run, and what belongs to them."""

    model: WeakWater
    tokenizer: object
    encoder: TextEncoder
    path: Path
    stage: str
    device: torch.device
    dtype: str
    decoder: Decoder  # the same weights, to generate with
    described: list[str]  # lines for the user

    @property
    def continues_text(self) -> bool:
        """True for pretraining weights, which have no chat format."""
        return self.stage == "pretrain"

    @property
    def thinks(self) -> bool:
        """True for distill's weights, whose conversations are in the thinking format (text/chat.py)."""
        return self.stage == "distill"

    def generator(self, seed: int) -> torch.Generator:
        """A random generator on the model's device."""
        return torch.Generator(self.device).manual_seed(seed)


def open_weights(args) -> Loaded:
    """Load the weights named by the flags of `model_parser`. Raises UserError when a part is missing, damaged or
    does not fit the others."""
    device, device_reason = runtime.pick_device(args.device)
    dtype, dtype_reason = runtime.pick_dtype(args.dtype, device)
    if args.checkpoint is None:
        stage = STAGES[args.model_mode]
        path, hint = Path(args.out_dir) / f"{stage}.pth", f"python {stage}.py makes it"
    else:
        stage, path, hint = "unknown stage", Path(args.checkpoint), "--checkpoint"
    model, meta = load_model(path, device, hint)
    stage = str(meta.get("stage", stage))
    tokenizer = choose_tokenizer(args.tokenizer_path, str(path), meta.get("tokenizer"), meta.get("tokenizer_sha256"))
    encoder = TextEncoder.of(tokenizer)
    check_tokenizer_fits(encoder, model, path)
    described = [f"{stage}: {path}, step {meta.get('step', '?')}, {sum(model.num_parameters().values()):,} parameters, "
                 f"context of {model.config.max_seq_len:,} tokens",
                 f"device {device}: {device_reason}; dtype {dtype}: {dtype_reason}"]
    decoder = Decoder(model, dtype, args.plain, is_int8(meta))
    if is_int8(meta):
        replies = "restored, too" if decoder.native_reason else "computed in int8, by decode.c"
        described.append(f"weights in int8, restored to {dtype} for prompts; replies are {replies}")
    return Loaded(model, tokenizer, encoder, path, stage, device, dtype, decoder, described + decoder.lines)
