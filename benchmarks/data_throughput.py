"""Text into training steps: the token cache beside tokenising in a data set's `__getitem__`.

    python benchmarks/data_throughput.py --megabytes 8 --repeats 5
    python benchmarks/data_throughput.py --data_path data/pretrain.jsonl --tokenizer_path weakwater_tokenizer

The first --megabytes of the texts (of conversations: of their messages) are turned into steps in two ways.

ours            dataset.open_cache writes the tokens of all documents once; dataset.StepLoader lays them end to end
__getitem__     a torch Dataset with all lines in memory; each text is tokenised, cut and padded to --max_seq_len when
                it is asked for, by a DataLoader in the training process or in two workers (MiniMind's way)

Everything runs in a process of its own, which sees one core or two. "first batch" counts from the start of that
process, its imports included. Memory is the most that the operating system saw resident, workers not counted: of ours
in one pass over the text, and over eight times as much. Before anything is timed the ids of both ways are compared, but
for texts in which control tokens are written out: __getitem__ takes those for the tokens. Without --data_path the text
is generated, and without --tokenizer_path the tokenizer trained on it.
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
from common import (
    exits,  # noqa: E402
    runtime,
)
from Config import UserError, number
from dataset import StepLoader, load_documents, open_cache
from text.records import find_files
from text.tokenizer import TextEncoder, load_tokenizer

GROWTH = 8  # the larger corpus is so many times the smaller one
SAME = 1000  # documents whose ids are compared


# ---------------------------------------------------------------------------------------------
# the two ways, each in a process of its own


class TokenisedWhenAsked:
    """A torch Dataset as small-model repositories write it: rows of --max_seq_len ids, padded."""

    def __init__(self, path: str, tokenizer_path: str, max_seq_len: int):
        from transformers import AutoTokenizer

        with open(path, encoding="utf-8") as stream:
            self.texts = [json.loads(line)["text"] for line in stream]
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
        encoder = TextEncoder.of(self.tokenizer)  # which knows what begins a text where the tokenizer names no token
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
    """Micro-batches of one epoch, in the way that args.alone names: (useful tokens) of each."""
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

        data = TokenisedWhenAsked(args.data_path, args.tokenizer_path, args.max_seq_len)
        for _, mask in DataLoader(data, batch_size=args.rows, shuffle=True, num_workers=args.workers):
            yield int(mask.sum())


def go_through(args) -> dict:
    """Seconds to the first batch, useful tokens per second after it, peak memory: of this process."""
    batches = batches_of(args)
    next(batches)
    first, begin, tokens = seconds_since_start(), time.perf_counter(), 0
    for tokens_now in islice(batches, args.batches or None):
        tokens += tokens_now
    return {"seconds_to_first_batch": first, "tokens_per_second": tokens / (time.perf_counter() - begin),
            "mebibytes": peak_mebibytes()}


def build(args) -> dict:
    """Megabytes of text per second into a new token cache, without the imports."""
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
    """Raises UserError where there is too little text for both ways to be timed after their first batch."""
    size = Path(data_path).stat().st_size
    with open(data_path, encoding="utf-8") as stream:
        texts = sum(1 for _ in stream)
    least_texts, least_size = 4 * args.rows, 8 * args.rows * args.max_seq_len  # a token has four bytes, about
    if texts < least_texts or size < least_size:
        raise UserError(f"{args.data_path or '--megabytes'}: {texts:,} texts, {size:,} bytes: at least "
                        f"{least_texts:,} and {least_size:,} are needed")


def check_equal(args, data_path: str, folder: Path) -> None:
    """Raises RuntimeError where both ways do not give the same ids, UserError where no text can be compared."""
    tokenizer = load_tokenizer(args.tokenizer_path)
    cache = open_cache(find_files(data_path), tokenizer, "text", str(folder))
    theirs = TokenisedWhenAsked(data_path, args.tokenizer_path, args.max_seq_len)
    control = [token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()]
    bounds, compared = cache.documents["start"], 0
    for index in range(min(SAME, len(theirs))):
        if any(token in theirs.texts[index] for token in control):
            continue
        ours = cache.tokens[bounds[index]:bounds[index + 1]][:args.max_seq_len].tolist()
        if theirs[index][0].tolist()[:len(ours)] != ours:
            raise RuntimeError(f"{data_path}:{index + 1}: the two ways do not give the same ids")
        compared += 1
    if not compared:
        raise UserError(f"{args.data_path}: control tokens are written out in all of its texts; take plain text")
    print(f"ids of {compared:,} documents: equal both ways; {min(SAME, len(theirs)) - compared:,} with control tokens "
          "written out in them are not compared")


def compare(args, data_path: str, folder: Path) -> dict:
    """Run everything in turns, print the table, return the result."""
    larger, cache_dir = folder / "larger.jsonl", str(folder / "cache")
    with open(larger, "wb") as stream:
        for _ in range(GROWTH):
            stream.write(Path(data_path).read_bytes())
    for path in (data_path, str(larger)):
        open_cache(find_files(path), load_tokenizer(args.tokenizer_path), "text", cache_dir)
    fresh = (str(folder / f"fresh{i}") for i in count())  # for a cache that is not there yet
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
        print("one core and two cannot be told apart on this system: the first row is left out")
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
    parser = make_parser(__doc__, "its vocabulary size (default: %(default)s)")
    parser.add_argument("--data_path", help="JSONL of texts or conversations (default: generated)")
    parser.add_argument("--tokenizer_path", help="(default: trained on the text)")
    parser.add_argument("--megabytes", type=number(float, 0.1), default=8, help="of text, about (default: %(default)s)")
    parser.add_argument("--rows", type=number(int, 1), default=8, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=number(int, 2), default=512, help="of a row (default: %(default)s)")
    parser.add_argument("--batches", type=number(int, 0), default=200,
                        help="that __getitem__ is timed for; 0: all (default: %(default)s)")
    for hidden in ("alone", "cache_dir"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    for hidden, default in (("workers", 0), ("cores", 2)):
        parser.add_argument(f"--{hidden}", type=int, default=default, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.cores])
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if args.alone == "getitem" else "true"
        print(json.dumps((build if args.alone == "build" else go_through)(args)))
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
