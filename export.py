"""Take the weights of any stage to other programs, or bring a folder of transformers back.

transformers   python export.py --model_mode 2 --format hf --out exported/hf
llama.cpp      python export.py --model_mode 2 --format gguf --quant f16,q8_0 --out exported
int8           python export.py --model_mode 2 --format int8 --out exported
back           python export.py --from_hf exported/hf --out out/imported.pth

hf is a folder that AutoModelForCausalLM and AutoTokenizer load without trust_remote_code: a Llama, or with qk_norm a
Qwen3. gguf is a file for llama.cpp, with a Modelfile for Ollama (pip install -r requirements-extra.txt). In both,
<answer> and </answer> are control tokens, which other programs hide, <think> and </think> stay text, so that programs
can show a thought apart, and the chat template is that of the weights' stage. int8 is a weights file of a quarter of
the size for eval_model.py and evaluate.py. Every export ends with a check. Weights of an edited model.py are refused
where the other program cannot hold them.
"""

import argparse
import importlib.util
import re
import sys
from functools import partial
from pathlib import Path

import torch

from common import exits
from common.files import remove_leftovers, write_file, write_folder, write_whole
from common.generation import Decoder, decode_one_token, prefill
from common.weights import (
    STAGES,
    check_tokenizer_fits,
    load_model,
    refuse_int8,
    save_int8,
    save_weights,
)
from Config import FLAGS, OneLineParser, UserError
from fastpath.int8 import round_weights
from fastpath.twin import INT8_LIMIT
from formats import gguf, hf, llama_cpp
from formats.modelfile import modelfile
from model import WeakWater
from text.tokenizer import TextEncoder, choose_tokenizer, tokenizer_files

FORMATS = ("hf", "gguf", "int8")
TRY_HF = ('to try it: python -c "from transformers import pipeline; '
          "print(pipeline('text-generation', '{out}')({prompt}))\"")
PROMPTS = {True: "'<s>从前'", False: "[{'role': 'user', 'content': '你好'}]"}  # for weights that continue text; others
INT8_TOKENS = 8  # decoded to check decode.c


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="export.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    modes = ", ".join(f"{mode} {stage}" for mode, stage in STAGES.items())
    which.add_argument("--model_mode", type=int, choices=tuple(STAGES), help=f"the weights in out_dir of: {modes}")
    which.add_argument("--checkpoint", metavar="PATH", help="a weights file of any stage")
    which.add_argument("--from_hf", metavar="FOLDER", help="a folder with a Llama or a Qwen3, to bring back")
    parser.add_argument("--format", choices=FORMATS, help="what to write")
    parser.add_argument("--quant", metavar="Q[,Q]", default=None,
                        help=f"gguf: one file for each of {', '.join(gguf.QUANTS)} (default: f16)")
    parser.add_argument("--out", metavar="PATH", required=True,
                        help="hf: the folder; gguf, int8: the folder for the files; with --from_hf the weights file")
    parser.add_argument("--force", action="store_true",
                        help="replace what an earlier export wrote there, its model card or Modelfile included")
    parser.add_argument("--out_dir", help=f"where --model_mode looks for weights (default: {FLAGS['out_dir'].default})")
    parser.add_argument("--tokenizer_path", help=FLAGS["tokenizer_path"].help)
    args = parser.parse_args(argv)
    if args.from_hf is not None and args.format is not None:
        parser.error("--from_hf makes a weights file: it takes no --format")
    if args.from_hf is not None and args.tokenizer_path is not None:
        parser.error("--from_hf takes the tokenizer in the folder, no --tokenizer_path")
    if args.model_mode is None and args.out_dir is not None:
        parser.error("--out_dir: only with --model_mode; --out says where to write")
    args.out_dir = args.out_dir or FLAGS["out_dir"].default
    if args.from_hf is None and args.format is None:
        parser.error("--format: say what to write: hf, gguf or int8")
    if args.quant is not None and args.format != "gguf":
        parser.error("--quant: only for --format gguf")
    args.quant = list(dict.fromkeys((args.quant or "f16").split(",")))
    if unknown := [quant for quant in args.quant if quant not in gguf.QUANTS]:
        parser.error(f"--quant {unknown[0]}: not one of {', '.join(gguf.QUANTS)}")
    return args


# ---------------------------------------------------------------------------------------------
# the formats


def export_hf(out: Path, model: WeakWater, meta: dict, tokenizer: dict[str, str], made_from: str, force: bool) -> None:
    """Write the folder `out`, whole or not at all."""
    out = out.resolve() if out.is_symlink() else out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; name a folder")
    if out.resolve() in (here := Path.cwd().resolve(), *here.parents):
        raise UserError(f"--out {out}: the current folder is in it; name a new folder")
    if out.exists() and (reason := hf.not_exported(out)) is not None:
        raise UserError(f"--out {out}: already there, and {reason}; name another folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise UserError(f"--out {out}: already there; --force replaces it, its model card included")
    remove_leftovers(out.parent, out.name)
    errors = []

    def fill(folder: Path) -> None:
        hf.write(folder, model, meta, tokenizer, made_from)
        errors.append(hf.check(folder, model))

    if not write_folder(out, fill, over=True):
        raise UserError(f"--out {out}: another process wrote it at the same time")
    kind = "Qwen3ForCausalLM" if model.config.qk_norm else "LlamaForCausalLM"
    print(f"{out}: {kind}, {megabytes(*out.iterdir())}; checked: transformers loads it, and no logit differs by more "
          f"than {errors[0]:.1e} of the largest")
    print(TRY_HF.format(out=out, prompt=PROMPTS[meta["stage"] == "pretrain"]))


def export_gguf(out: Path, model: WeakWater, meta: dict, tokenizer: dict[str, str], quants: list[str],
                force: bool) -> None:
    """Write one file for each quant into the folder `out`, and a Modelfile, unless there is one."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--format gguf: the package gguf is not installed: pip install -r requirements-extra.txt")
    paths = {quant: out / f"{meta['stage']}-{quant}.gguf" for quant in quants}
    refuse_existing(paths.values(), force)
    hf.logits_error(model, hf.to_transformers(model))  # llama.cpp's Llama and Qwen3 compute what transformers' do
    for quant, path in paths.items():
        remove_leftovers(out, path.name)
        said = write_file(path, partial(fill_gguf, model=model, quant=quant, tokenizer=tokenizer, stage=meta["stage"]))
        print(f"{path}: {megabytes(path)}; checked: {said}")
    first, recipe = next(iter(paths.values())), out / "Modelfile"
    if recipe.exists() and not force:
        print(f"{recipe}: kept as it is; --force writes it anew")
    else:
        text = modelfile(first.name, meta["stage"], model.config.max_seq_len)
        write_whole(recipe, lambda stream: stream.write(text.encode("utf-8")))
        print(f"{recipe}: for Ollama, with {first.name}")
    print(f"to try it: llama-server -m {first} (llama.cpp), or ollama create weakwater -f {recipe}")


def fill_gguf(path: Path, model: WeakWater, quant: str, tokenizer: dict[str, str], stage: str) -> str:
    """Write a GGUF file and check it. Returns what was checked."""
    gguf.write(path, model, quant, tokenizer, stage)
    gguf.check(path, model, quant)
    said = "read back, it holds the weights"
    if (reason := llama_cpp.why_unavailable()) is not None:
        return f"{said}; llama.cpp was not run: {reason}"
    if (worst := llama_cpp.check(path, model, quant)) is None:
        return f"{said}; llama.cpp loads it (the likeliest tokens are no whole characters: nothing was compared)"
    return f"{said}; in llama.cpp no log-probability of the likeliest tokens differs by more than {worst:.1e}"


def export_int8(out: Path, model: WeakWater, meta: dict, tokenizer: dict[str, str], force: bool) -> None:
    """Write the weights file in int8 into the folder `out`."""
    path = out / f"{meta['stage']}-int8.pth"
    refuse_existing([path], force)
    remove_leftovers(out, path.name)
    said = write_file(path, partial(fill_int8, model=model, meta=meta | {"tokenizer": tokenizer}))
    print(f"{path}: {megabytes(path)}; checked: {said}")
    print(f"to try it: python eval_model.py --checkpoint {path}")


@torch.no_grad()
def fill_int8(path: Path, model: WeakWater, meta: dict) -> str:
    """Write an int8 file and check it. Returns what was checked."""
    save_int8(path, model, meta)
    loaded, _ = load_model(path)
    tokens = torch.randint(0, model.config.vocab_size, (1, min(128, model.config.max_seq_len)),
                           generator=torch.Generator().manual_seed(0))
    ours = model(tokens)
    round_weights(model)
    if any(not torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)):
        raise UserError(f"{path}: loaded again, it does not hold the rounded weights")
    error = float((loaded(tokens) - ours).norm() / ours.norm())
    said = f"loaded again, it holds the rounded weights, whose logits are {error:.1%} from the original's"
    decoders = [Decoder(loaded, int8=True), Decoder(model, plain=True)]
    if decoders[0].native_reason is not None:
        return f"{said}; its weights are restored to float32, without decode.c in int8: {decoders[0].native_reason}"
    found = []
    for decoder in decoders:
        cache = decoder.new_cache(1, 2 + INT8_TOKENS)
        prefill(decoder, tokens[:, :1].tolist(), cache)
        found.append(torch.cat([decode_one_token(decoder, tokens[0, i:i + 1], cache) for i in range(1, INT8_TOKENS)]))
    error = float((found[0] - found[1]).norm() / found[1].norm())
    if not error <= INT8_LIMIT:
        raise UserError(f"{path}: decode.c differs from model.py by {error:.2g} on these weights")
    return f"{said}; decode.c in int8 differs from model.py by {error:.1e}"


def refuse_existing(paths, force: bool) -> None:
    """Raises UserError if one of the files is there and may not be replaced."""
    for path in paths:
        if path.exists() and not force:
            raise UserError(f"{path}: already there; --force replaces it")


def megabytes(*files: Path) -> str:
    """The size of files together."""
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


# ---------------------------------------------------------------------------------------------


def bring_back(folder: Path, out: Path, force: bool) -> None:
    """Make a weights file of a folder of transformers."""
    if out.suffix != ".pth":
        raise UserError(f"--out {out}: with --from_hf it is a weights file: its name ends in .pth")
    refuse_existing([out], force)
    model, meta, error = hf.read(folder)
    save_weights(out, model, meta)
    print(f"{out}: {sum(model.num_parameters().values()):,} parameters, {megabytes(out)}; checked: no logit differs by "
          f"more than {error:.1e} of the largest from transformers'")
    print(f"to train it further: python SFT.py --init_from {out}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    out = Path(args.out)
    if args.from_hf is not None:
        return bring_back(Path(args.from_hf), out, args.force)
    path = Path(args.checkpoint or Path(args.out_dir) / f"{STAGES[args.model_mode]}.pth")
    model, meta = load_model(path, hint="--checkpoint" if args.checkpoint else f"python {path.stem}.py makes it")
    refuse_int8(path, meta)
    meta["stage"] = re.sub(r"[^\w-]+", "-", str(meta.get("stage", "weights"))).strip("-") or "weights"  # in file names
    tokenizer = choose_tokenizer(args.tokenizer_path, str(path), meta.get("tokenizer"), meta.get("tokenizer_sha256"))
    check_tokenizer_fits(TextEncoder.of(tokenizer), model, path)
    files = tokenizer_files(tokenizer)
    if args.format == "hf":
        export_hf(out, model, meta, files, path.name, args.force)
    elif args.format == "gguf":
        export_gguf(out, model, meta, files, args.quant, args.force)
    else:
        export_int8(out, model, meta, files, args.force)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    sys.exit(exits.run(main))
