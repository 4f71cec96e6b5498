"""Data loading, from text to training steps: the token cache compared with tokenizing in a Dataset's `__getitem__`.

    python benchmarks/data_throughput.py --megabytes 8 --repeats 5
    python benchmarks/data_throughput.py --data_path data/pretrain.jsonl --tokenizer_path weakwater_tokenizer

The first --megabytes of text (for conversations, of their messages) become training steps with two methods:

ours            dataset.open_cache writes the tokens of all documents once; dataset.StepLoader packs them
__getitem__     a torch Dataset with all lines in memory; __getitem__ tokenizes a text and cuts or pads it to
                --max_seq_len, called by a DataLoader in the training process or in two workers (as in MiniMind)

Each measurement runs in a separate process that uses one or two cores. "first batch" is the time since the start of the
process, including imports. Memory is the peak resident size without the workers, on the text and on eight times the
text. First the benchmark checks that both methods give the same ids. Texts that contain the strings of control tokens
are skipped in this check, because __getitem__ encodes such strings as control tokens. Without --data_path the text is
generated; without --tokenizer_path a tokenizer is trained on it.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from itertools import count, islice
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
    train_a_tokenizer,
    warn_of_load,
)
from common import exits, runtime
from Config import UserError, number
from dataset import StepLoader, load_documents, open_cache
from text.sources import find_files
from text.tokenizer import TextEncoder, load_tokenizer

GROWTH = 8  # size of the larger corpus relative to the smaller one
COMPARED = 1000  # documents whose ids are compared


# ---------------------------------------------------------------------------------------------
# the two methods, each in a separate process


class TokenizedOnDemand:
    """A torch Dataset as in typical small-model repositories: padded rows of --max_seq_len ids."""

    def __init__(self, path: str, tokenizer_path: str, max_seq_len: int):
        from transformers import AutoTokenizer

        with open(path, encoding="utf-8") as stream:
            self.texts = [json.loads(line)["text"] for line in stream]
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
        encoder = TextEncoder.of(self.tokenizer)  # it finds the ids even if the tokenizer names no bos token
        self.begin, self.end = self.tokenizer.convert_ids_to_tokens([encoder.bos_id, encoder.eos_id])
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.end
        self.max_seq_len = max_seq_len

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int):
        import torch

        text = self.begin + self.texts[index] + self.end
        encoded = self.tokenizer(text, max_length=self.max_seq_len, padding="max_length", truncation=True,
                                 add_special_tokens=False)
        return torch.tensor(encoded.input_ids), torch.tensor(encoded.attention_mask)


def batches_of(args):
    """Yield the number of useful tokens of each micro-batch of one epoch, with the method named by args.alone."""
    if args.alone == "ours":
        documents = load_documents(args.data_path, load_tokenizer(args.tokenizer_path), "text", args.cache_dir,
                                   args.max_seq_len, say=lambda line: None)
        loader = StepLoader(documents, args.max_seq_len, args.rows, 1, seed=0)
        for step in range(loader.steps_in_epoch(0)):
            for micro_batch in loader.step(0, step).micro_batches:
                micro_batch.to("cpu")
                yield len(micro_batch.tokens)
    else:
        from torch.utils.data import DataLoader

        data = TokenizedOnDemand(args.data_path, args.tokenizer_path, args.max_seq_len)
        for _, mask in DataLoader(data, batch_size=args.rows, shuffle=True, num_workers=args.workers):
            yield int(mask.sum())


def time_epoch(args) -> dict:
    """Seconds to the first batch, useful tokens per second after it, and peak memory of this process."""
    batches = batches_of(args)
    next(batches)
    first, begin, tokens = seconds_since_start(), time.perf_counter(), 0
    for tokens_now in islice(batches, args.batches or None):
        tokens += tokens_now
    return {"seconds_to_first_batch": first, "tokens_per_second": tokens / (time.perf_counter() - begin),
            "mebibytes": peak_mebibytes()}


def build(args) -> dict:
    """Write a new token cache. Returns its seconds, without imports, megabytes of text per second, and peak memory."""
    tokenizer = load_tokenizer(args.tokenizer_path)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        open_cache(find_files(args.data_path), tokenizer, "text", folder)
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "megabytes_per_second": Path(args.data_path).stat().st_size / 1e6 / seconds,
            "mebibytes": peak_mebibytes()}


# ---------------------------------------------------------------------------------------------
# measuring


def check_enough(args, data_path: str) -> None:
    """Raises UserError if the text is too short to time both methods after their first batch."""
    size = Path(data_path).stat().st_size
    with open(data_path, encoding="utf-8") as stream:
        texts = sum(1 for _ in stream)
    least_texts, least_size = 4 * args.rows, 8 * args.rows * args.max_seq_len  # a token has about four bytes
    if texts < least_texts or size < least_size:
        raise UserError(f"{args.data_path or '--megabytes'}: {texts:,} texts, {size:,} bytes: at least "
                        f"{least_texts:,} and {least_size:,} are needed")


def check_equal(args, data_path: str, folder: Path) -> None:
    """Raises RuntimeError if the two methods give different ids, UserError if no text can be compared."""
    tokenizer = load_tokenizer(args.tokenizer_path)
    cache = open_cache(find_files(data_path), tokenizer, "text", str(folder))
    theirs = TokenizedOnDemand(data_path, args.tokenizer_path, args.max_seq_len)
    control = [token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()]
    bounds, compared = cache.documents["start"], 0
    for index in range(min(COMPARED, len(theirs))):
        if any(token in theirs.texts[index] for token in control):
            continue
        ours = cache.tokens[bounds[index]:bounds[index + 1]][:args.max_seq_len].tolist()
        if theirs[index][0].tolist()[:len(ours)] != ours:
            raise RuntimeError(f"{data_path}:{index + 1}: the two methods give different ids")
        compared += 1
    if not compared:
        raise UserError(f"{args.data_path}: all texts contain strings of control tokens; use plain text")
    print(f"ids of {compared:,} documents are equal with both methods; {min(COMPARED, len(theirs)) - compared:,} with "
          "strings of control tokens were not compared")


def compare(args, data_path: str, folder: Path) -> dict:
    """Run all measurements in turns, print the table, and return the result."""
    larger, cache_dir = folder / "larger.jsonl", str(folder / "cache")
    with open(larger, "wb") as stream:
        for _ in range(GROWTH):
            stream.write(Path(data_path).read_bytes())
    for path in (data_path, str(larger)):
        open_cache(find_files(path), load_tokenizer(args.tokenizer_path), "text", cache_dir)
    fresh = (str(folder / f"fresh{i}") for i in count())  # folders for new caches
    run = partial(alone, __file__, tokenizer_path=args.tokenizer_path, rows=args.rows, max_seq_len=args.max_seq_len)
    ours, getitem = partial(run, "ours", batches=0), partial(run, "getitem", batches=args.batches)
    work = {
        "cache, one core": lambda: run("build", data_path=data_path, cores=1),
        "cache, two cores": lambda: run("build", data_path=data_path),
        "ours, without a cache": lambda: ours(data_path=data_path, cache_dir=next(fresh)),
        "ours": lambda: ours(data_path=data_path, cache_dir=cache_dir),
        f"ours, {GROWTH} x the text": lambda: ours(data_path=larger, cache_dir=cache_dir),
        "__getitem__": lambda: getitem(data_path=data_path),
        "__getitem__, two workers": lambda: getitem(data_path=data_path, workers=2),
        f"__getitem__, {GROWTH} x the text": lambda: getitem(data_path=larger),
    }
    if not hasattr(os, "sched_setaffinity"):
        print("this system cannot restrict a process to one core: the first row is skipped")
        del work["cache, one core"]
    runs = results_in_turns(work, args.repeats)
    print_table(["", "text to tokens, MB/s", "first batch, s", "tokens/s", "peak MiB"], [
        [name, *(f"{middle(done, key):{form}}" if key in done[0] else "" for key, form in (
            ("megabytes_per_second", ".1f"), ("seconds_to_first_batch", ".1f"), ("tokens_per_second", ",.0f"),
            ("mebibytes", ",.0f")))] for name, done in runs.items()])

    def of(name: str, key: str) -> list[float]:
        return [run[key] for run in runs[name]]

    ratios = {"cache_two_cores_vs_one": ratio(of("cache, one core", "seconds"), of("cache, two cores", "seconds"))
              } if "cache, one core" in runs else {}
    return {"cases": runs, "ratios": ratios | {
        "first_batch_warm_cache_vs_getitem": ratio(of("__getitem__", "seconds_to_first_batch"),
                                                   of("ours", "seconds_to_first_batch")),
        "first_batch_without_cache_vs_getitem": ratio(of("__getitem__", "seconds_to_first_batch"),
                                                      of("ours, without a cache", "seconds_to_first_batch")),
        "tokens_vs_getitem": ratio(of("ours", "tokens_per_second"), of("__getitem__", "tokens_per_second")),
        "tokens_vs_getitem_two_workers": ratio(of("ours", "tokens_per_second"),
                                               of("__getitem__, two workers", "tokens_per_second")),
        "memory_as_text_grows": ratio(of(f"ours, {GROWTH} x the text", "mebibytes"), of("ours", "mebibytes")),
        "getitem_memory_as_text_grows": ratio(of(f"__getitem__, {GROWTH} x the text", "mebibytes"),
                                              of("__getitem__", "mebibytes"))}}


def main() -> None:
    parser = make_parser(__doc__, "preset whose vocabulary size is used (default: %(default)s)")
    parser.add_argument("--data_path", help="JSONL of texts or conversations (default: generated text)")
    parser.add_argument("--tokenizer_path", help="tokenizer folder (default: trained on the text)")
    parser.add_argument("--megabytes", type=number(float, 0.1), default=8, help="of text (default: %(default)s)")
    parser.add_argument("--rows", type=number(int, 1), default=8, help="rows per batch (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=number(int, 2), default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument("--batches", type=number(int, 0), default=200,
                        help="batches timed with __getitem__; 0: all (default: %(default)s)")
    for hidden in ("alone", "cache_dir"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    for hidden, default in (("workers", 0), ("cores", 2)):
        parser.add_argument(f"--{hidden}", type=int, default=default, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.cores])
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if args.alone == "getitem" else "true"
        print(json.dumps((build if args.alone == "build" else time_epoch)(args)))
        return
    warn_of_load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_path = str(folder / "text.jsonl")
        if args.data_path:
            copy_texts(args.data_path, folder / "text.jsonl", args.megabytes)
        else:
            make_corpus(folder / "text.jsonl", args.megabytes)
        check_enough(args, data_path)
        if not args.tokenizer_path:
            args.tokenizer_path = train_a_tokenizer(data_path, folder, args.preset)
        import torch

        machine = runtime.describe_machine(torch.device("cpu"))
        print(f"{machine}; {Path(data_path).stat().st_size / 1e6:.1f} MB of text, {args.repeats} turns")
        check_equal(args, data_path, folder / "check")
        result = compare(args, data_path, folder)
    print_result(result | {"machine": machine, "preset": args.preset})


if __name__ == "__main__":
    sys.exit(exits.run(main))
