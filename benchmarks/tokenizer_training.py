"""Tokenizer training: train_tokenizer.py compared with plain byte-level BPE training by `tokenizers`.

    python benchmarks/tokenizer_training.py --megabytes 8 --repeats 5
    python benchmarks/tokenizer_training.py --data_path data/pretrain.jsonl

ours     python train_tokenizer.py: a sample of the text in bounded memory, single digits, a limit on word length in
         training, a report on held-out text
plain    BpeTrainer with ByteLevel pre-tokenization and its default regex on the whole text, as in the documentation of
         `tokenizers`

Each runs in a separate process, on one, two and four times the text, from process start to saved file. Memory is the
peak resident size. "bytes a token" is measured on the same held-out texts; more is better. Without --data_path the text
is generated. The text of a conversation is that of its messages.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import (
    alone,
    copy_texts,
    make_corpus,
    make_parser,
    middle,
    peak_mebibytes,
    print_result,
    print_table,
    ratio,
    results_in_turns,
    seconds_since_start,
    warn_of_load,
)
from common import exits
from Config import LLMConfig, UserError, number

TIMES = (1, 2, 4)
LEAST_TEXTS, MOST_HELD_OUT = 40, 500  # a tenth of the texts is held out


def plain(data_path: str, target: Path, vocab_size: int) -> None:
    """Train and save the plain byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts():
        with open(data_path, encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)["text"]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.save(str(target))


def train(args) -> dict:
    """Train the tokenizer named by args.alone in this process. Returns seconds since process start and peak memory."""
    if args.alone == "ours":
        import train_tokenizer

        train_tokenizer.main(["--data_path", args.data_path, "--tokenizer_path", args.out,
                              "--vocab_size", args.vocab_size])
    else:
        Path(args.out).mkdir()
        plain(args.data_path, Path(args.out) / "tokenizer.json", int(args.vocab_size))
    return {"seconds": seconds_since_start(), "mebibytes": peak_mebibytes()}


def bytes_per_token(path: Path, texts: list[str]) -> float:
    """Bytes per token of `texts`. Raises RuntimeError when a text is not decoded exactly from its ids."""
    from tokenizers import Tokenizer

    tokenizer, tokens = Tokenizer.from_file(str(path / "tokenizer.json")), 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise RuntimeError(f"{path}: a text is not decoded exactly")
        tokens += len(ids)
    return sum(len(text.encode("utf-8")) for text in texts) / tokens


def compare(args, lines: list[str], folder: Path) -> dict:
    """Train both tokenizers on one, two and four times the text. Prints the table and returns the result."""
    vocab_size, n_held_out = LLMConfig.preset(args.preset).vocab_size, min(len(lines) // 10, MOST_HELD_OUT)
    lines, texts = lines[:-n_held_out], [json.loads(line)["text"] for line in lines[-n_held_out:]]
    result, rows, ratios = {}, [], {}
    for times in TIMES:
        data, size = folder / f"{times}.jsonl", len(lines) * times // max(TIMES)
        data.write_text("".join(lines[:size]), encoding="utf-8")

        def turn(name: str, data=data) -> dict:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                target = Path(out) / "tokenizer"
                measured = alone(__file__, name, data_path=data, out=target, vocab_size=vocab_size)
                return measured | {"bytes_per_token": bytes_per_token(target, texts)}

        runs = results_in_turns({name: partial(turn, name) for name in ("ours", "plain")}, args.repeats)
        for name, done in runs.items():
            result[f"{times} x the text, {name}"] = done
            rows.append([f"{data.stat().st_size / 1e6:.1f} MB, {name}", f"{middle(done, 'seconds'):.1f}",
                         f"{min(r['seconds'] for r in done):.1f} to {max(r['seconds'] for r in done):.1f}",
                         f"{middle(done, 'mebibytes'):,.0f}", f"{middle(done, 'bytes_per_token'):.3f}"])
        for what in ("seconds", "mebibytes"):
            ratios[f"plain_over_ours_{what}_{times}x"] = ratio(*([r[what] for r in runs[name]]
                                                                 for name in ("plain", "ours")))
    print_table(["", "seconds", "range", "peak MiB", "bytes a token"], rows)
    return {"cases": result, "ratios": ratios}


def main() -> None:
    parser = make_parser(__doc__, "preset whose vocabulary size is used (default: %(default)s)")
    parser.add_argument("--data_path", help="JSONL of texts or conversations (default: generated text)")
    parser.add_argument("--megabytes", type=number(float, 0.1), default=8,
                        help="approximate size of the largest text (default: %(default)s)")
    for hidden in ("alone", "out", "vocab_size"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(train(args)))
        return
    warn_of_load()
    import torch

    machine = runtime.describe_machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "text.jsonl"
        if args.data_path:
            copy_texts(args.data_path, source, args.megabytes)
        else:
            make_corpus(source, args.megabytes)
        with open(source, encoding="utf-8") as stream:
            lines = list(stream)
        if len(lines) < LEAST_TEXTS:
            raise UserError(f"{args.data_path or '--megabytes'}: {len(lines)} texts are too few: at least "
                            f"{LEAST_TEXTS} are needed; raise --megabytes")
        print(f"{machine}; {source.stat().st_size / 1e6:.1f} MB of text, {args.repeats} turns")
        result = compare(args, lines, Path(name))
    print_result(result | {"machine": machine, "preset": args.preset})


if __name__ == "__main__":
    if "--alone" not in sys.argv:  # importing runtime would add torch to the measured memory
        from common import runtime

    sys.exit(exits.run(main))
