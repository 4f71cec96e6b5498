"""Split a weights file into small bfloat16 pieces, and join them again.

    python experiments/split_weights.py pack out/distill.pth pieces/distill --mib 15    writes pieces/distill.0, .1, …
    python experiments/split_weights.py unpack pieces/distill out/distill.pth

bfloat16 halves the size. The joined file is an ordinary float32 weights file whose meta has "rounded": "bfloat16". Each
piece begins with one line of JSON: its number, the number of pieces, its SHA-256 and that of the whole.
"""

import argparse
import hashlib
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common import exits
from common.files import write_whole
from common.weights import load_model, load_strict, refuse_int8, save_weights
from Config import LLMConfig, OneLineParser, UserError, number
from model import WeakWater

HEADER_BYTES = 1024  # more than the longest header


def piece_path(prefix: Path, i: int) -> Path:
    """The path of piece `i`."""
    return prefix.with_name(f"{prefix.name}.{i}")


def pack(source: Path, prefix: Path, mib: int) -> None:
    """Write the weights in `source` as pieces of at most `mib` MiB."""
    model, meta = load_model(source)
    refuse_int8(source, meta)
    tensors = {id(tensor): tensor.detach().bfloat16() for tensor in model.parameters()}  # tied weights stay one
    state = {name: tensors[id(parameter)] for name, parameter in model.state_dict(keep_vars=True).items()}
    stream = io.BytesIO()
    torch.save({"model": state, "config": model.config.to_dict(), "meta": meta}, stream)
    data = stream.getvalue()
    size = (mib << 20) - HEADER_BYTES
    pieces = [data[begin:begin + size] for begin in range(0, len(data), size)]
    for i, piece in enumerate(pieces):
        header = {"piece": i, "pieces": len(pieces), "sha256": hashlib.sha256(piece).hexdigest(),
                  "whole_sha256": hashlib.sha256(data).hexdigest()}
        whole = json.dumps(header).encode() + b"\n" + piece
        write_whole(piece_path(prefix, i), lambda stream, whole=whole: stream.write(whole))
    extra = len(pieces)
    while piece_path(prefix, extra).exists():  # left by an earlier, larger file
        piece_path(prefix, extra).unlink()
        extra += 1
    print(f"{source}: {len(data) / 2**20:.1f} MiB in bfloat16, {len(pieces)} pieces {prefix}.0 …")


def read_piece(path: Path, i: int) -> tuple[dict, bytes]:
    """(header, content) of piece `i`. Raises UserError if it is missing, damaged or a different piece."""
    try:
        line, _, content = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: a piece of the weights is missing") from None
    try:
        header = json.loads(line)
        whole = header["sha256"] == hashlib.sha256(content).hexdigest()
        found = header["piece"], header["pieces"], header["whole_sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: damaged, truncated or not a piece of weights")
    if found[0] != i:
        raise UserError(f"{path}: it is piece {found[0]}, not {i}: its name was changed")
    return header, content


def unpack(prefix: Path, target: Path) -> None:
    """Join the pieces and write an ordinary weights file."""
    first, content = read_piece(piece_path(prefix, 0), 0)
    contents = [content]
    for i in range(1, first["pieces"]):
        header, content = read_piece(piece_path(prefix, i), i)
        if header["whole_sha256"] != first["whole_sha256"]:
            raise UserError(f"{piece_path(prefix, i)}: it belongs to other weights than {piece_path(prefix, 0)}")
        contents.append(content)
    packed = torch.load(io.BytesIO(b"".join(contents)), weights_only=True)
    model = WeakWater(LLMConfig.from_dict(packed["config"]))
    load_strict(model, packed["model"], prefix)
    save_weights(target, model, packed["meta"] | {"rounded": "bfloat16"})
    print(f"{target}: {first['pieces']} pieces joined, {sum(model.num_parameters().values()):,} parameters")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="split_weights.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="weights file to pieces")
    packing.add_argument("checkpoint", type=Path, help="a weights file of any stage")
    packing.add_argument("prefix", type=Path, help="the pieces are PREFIX.0, PREFIX.1, …; existing ones are replaced")
    packing.add_argument("--mib", type=number(int, 1), default=15, help="largest piece in MiB (default: 15)")
    joining = commands.add_parser("unpack", help="pieces to weights file")
    joining.add_argument("prefix", type=Path, help="as in pack")
    joining.add_argument("checkpoint", type=Path, help="the file to write; an existing one is replaced")
    args = parser.parse_args(argv)
    if args.command == "pack":
        pack(args.checkpoint, args.prefix, args.mib)
    else:
        unpack(args.prefix, args.checkpoint)


if __name__ == "__main__":
    sys.exit(exits.run(main))
