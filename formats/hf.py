"""transformers' folders: config, safetensors, tokenizer and model card, written from our weights or read back.

The names of the tensors are transformers' own (model.py), so the folder is a Llama, or with qk_norm a Qwen3.
"""

import contextlib
import json
import re
from pathlib import Path

import torch

from common.weights import STAGES
from Config import LLMConfig, UserError
from formats.card import model_card
from formats.tokenizer import exported, imported
from model import WeakWater
from text.tokenizer import FILES, TextEncoder, tokenizer_from_files

TOLERANCE = 1e-5  # largest difference of two logits, relative to the largest logit
MOST_TOKENS = 4096  # that are compared
METADATA = "weakwater"  # our field in config.json
CARD = "README.md"
# the names of files that `write` makes
WRITTEN = r"README\.md|(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|tokenizer(_config)?\.json"
KEPT = ("stage", "step", "tokens", "tokenizer_sha256")  # of the metadata, in config.json
EDITED = "model.py was edited, and other programs cannot hold the network that it defines"
REPRESENTED = {  # fields of transformers' config and the only value that LLMConfig can say
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}


# ---------------------------------------------------------------------------------------------
# the network


def quiet_transformers():
    """The package, which takes seconds to import, without its progress bars."""
    import transformers

    transformers_logging().disable_progress_bar()
    return transformers


def transformers_logging():
    """transformers' own logging."""
    from transformers.utils import logging

    return logging


def to_transformers(model: WeakWater, **ids):
    """transformers' model with copies of the weights, in float32. `ids`: bos_token_id, eos_token_id, pad_token_id.

    Raises UserError, naming tensors, where its class has others than the model.
    """
    transformers, config = quiet_transformers(), model.config
    name = "Qwen3" if config.qk_norm else "Llama"
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(
        vocab_size=config.vocab_size, hidden_size=config.dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
        intermediate_size=config.hidden_dim, max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, **ids))
    ours, known = model.state_dict(), theirs.state_dict()
    for said, names in (("has no", ours.keys() - known.keys()), ("needs", known.keys() - ours.keys()), (
            "has another shape for", {n for n in ours.keys() & known.keys() if ours[n].shape != known[n].shape})):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{name}ForCausalLM {said} {', '.join(sorted(names)[:3])}{more}: {EDITED}")
    theirs.load_state_dict(ours)
    return theirs.eval()


@torch.no_grad()
def logits_error(model: WeakWater, theirs, reason: str = EDITED) -> float:
    """The largest difference of two logits, both computed in float32 on random tokens that fill the context (at most
    MOST_TOKENS), relative to the largest logit. Raises UserError, naming the first logit that differs and the likely
    `reason`, if it is above TOLERANCE."""
    length = min(model.config.max_seq_len, MOST_TOKENS)
    tokens = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ours, other = model(tokens).float(), theirs(tokens).logits.float()
    difference = (other - ours).abs() / ours.nan_to_num().abs().max()
    wrong = (~(difference <= TOLERANCE)).nonzero()  # NaN is wrong, too
    if len(wrong):
        row, position, entry = wrong[0].tolist()
        raise UserError(f"{type(theirs).__name__} computes other logits: the first is that of entry {entry} after "
                        f"token {position + 1}, {float(other[row, position, entry]):.6g} instead of "
                        f"{float(ours[row, position, entry]):.6g}: {reason}")
    return float(difference.max())


# ---------------------------------------------------------------------------------------------
# the folder


def write(folder: Path, model: WeakWater, meta: dict, tokenizer_files: dict[str, str], made_from: str) -> None:
    """Fill a folder with the weights, in float32 on the CPU. `made_from` is named in the model card. Raises UserError
    where transformers' class cannot hold the network, and OSError where the folder cannot be written."""
    stage = str(meta.get("stage"))
    encoder = TextEncoder.of(tokenizer_from_files(tokenizer_files, "the tokenizer"))
    ids = {"bos_token_id": encoder.bos_id, "eos_token_id": encoder.eos_id,
           "pad_token_id": encoder.eos_id if encoder.unk_id is None else encoder.unk_id}
    theirs = to_transformers(model, **ids)
    setattr(theirs.config, METADATA, {key: meta[key] for key in KEPT if key in meta})
    theirs.generation_config = quiet_transformers().GenerationConfig(**ids)
    try:
        theirs.save_pretrained(folder)
    except Exception as error:  # safetensors has its own type for a full disk
        raise OSError(short(error)) from None
    card = model_card(model.config, sum(model.num_parameters().values()), meta, made_from)
    for name, text in (exported(tokenizer_files, stage) | {CARD: card}).items():
        (folder / name).write_text(text, encoding="utf-8")


def check(folder: Path, model: WeakWater) -> float:
    """Load a folder as anybody would, and compare it with the model. Returns the `logits_error`. Raises UserError."""
    theirs = load_theirs(folder)
    try:
        quiet_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers has many ways to fail
        raise UserError(f"{folder}: {short(error)}") from None
    return logits_error(model, theirs)


def not_exported(folder: Path) -> str | None:
    """Why a folder may not be replaced: what is in it that an export did not write; None if there is nothing."""
    names = sorted(file.name for file in folder.iterdir())
    if other := [name for name in names if not re.fullmatch(WRITTEN, name)]:
        return f"it also holds {', '.join(other[:3])}"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if METADATA in json.loads((folder / "config.json").read_text(encoding="utf-8")):
            return None
    return "export.py did not write it" if names else None


def load_theirs(folder: Path):
    """transformers' model in a folder, in float32. Raises UserError, naming tensors, if the file lacks one or holds one
    more: transformers would go on with random numbers, or without it."""
    auto = quiet_transformers().AutoModelForCausalLM
    verbosity = transformers_logging().get_verbosity()
    transformers_logging().set_verbosity_error()  # it warns of what is raised here
    try:
        theirs, found = auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32,
                                             output_loading_info=True)
    except Exception as error:  # transformers has many ways to fail
        raise UserError(f"{folder}: {short(error)}") from None
    finally:
        transformers_logging().set_verbosity(verbosity)
    tied = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    for said, names in (("lacks", set(found["missing_keys"]) - tied), ("has no place for", found["unexpected_keys"]),
                        ("has another shape for", {str(key) for key in found["mismatched_keys"]})):
        if names:
            raise UserError(f"{folder}: {type(theirs).__name__} {said} {', '.join(sorted(names)[:3])}")
    broken = [name for name, tensor in theirs.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{folder}: {broken[0]} holds NaN or infinite numbers")
    return theirs.eval()


def read(folder: Path) -> tuple[WeakWater, dict, float]:
    """(model, metadata with the tokenizer, `logits_error`) of a folder with a Llama or a Qwen3. Raises UserError,
    naming the field or file, where LLMConfig cannot say what it holds."""
    config, known = read_config(folder)
    theirs = load_theirs(folder)
    try:
        model = WeakWater(config)
        model.load_state_dict(theirs.state_dict(), strict=True)
        files = imported({name: (folder / name).read_text(encoding="utf-8") for name in FILES},
                         known.get("tokenizer_sha256"))
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: {short(error)}") from None
    fingerprint = TextEncoder.of(tokenizer_from_files(files, f"{folder}/{FILES[0]}")).fingerprint
    meta = known | {"tokenizer": files, "tokenizer_sha256": fingerprint}
    return model, meta, logits_error(model.eval(), theirs, "it does something that model.py does not")


def short(error: Exception) -> str:
    """The beginning of an error's text, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def read_config(folder: Path) -> tuple[LLMConfig, dict]:
    """(architecture, the metadata that `write` left) of a folder's config.json. Raises UserError."""
    path = f"{folder}/config.json"
    try:
        kind = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {short(error)}: not a folder of transformers") from None
    if kind not in ("llama", "qwen3"):
        raise UserError(f"{path}: model_type {kind!r}: only llama and qwen3 have the shape of model.py")
    try:
        theirs = quiet_transformers().AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each kind of fault raises its own type
        raise UserError(f"{path}: {short(error)}") from None
    for field, only in REPRESENTED.items():
        if getattr(theirs, field, only) != only:
            raise UserError(f"{path}: {field} is {getattr(theirs, field)!r}: model.py has only {only!r}")
    rope, heads = theirs.rope_parameters, theirs.num_attention_heads
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: rope_type is {rope['rope_type']!r}: model.py rotates without scaling")
    try:
        config = LLMConfig(
            vocab_size=theirs.vocab_size, dim=theirs.hidden_size, n_layers=theirs.num_hidden_layers, n_heads=heads,
            n_kv_heads=theirs.num_key_value_heads, head_dim=getattr(theirs, "head_dim", None),
            hidden_dim=theirs.intermediate_size, max_seq_len=theirs.max_position_embeddings,
            rope_theta=float(rope["rope_theta"]), norm_eps=theirs.rms_norm_eps,
            tie_embeddings=theirs.tie_word_embeddings, qk_norm=kind == "qwen3")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    said = getattr(theirs, METADATA, None)
    known = {key: said[key] for key in KEPT if key in said} if isinstance(said, dict) else {}
    if known.get("stage") not in STAGES.values():
        known["stage"] = "imported"
    known |= {key: known[key] if isinstance(known.get(key), int) else 0 for key in ("step", "tokens")}
    return config, known
