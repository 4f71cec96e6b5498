"""Training speed compared with transformers: optimizer steps on the same documents and weights, measured in turns.

    python benchmarks/train_throughput.py --preset weakwater-30m --repeats 5
    python benchmarks/train_throughput.py --data_path data/sft_512.jsonl --tokenizer_path weakwater_tokenizer

ours                 the step of the stage scripts: packed documents, bf16 if the machine has it, but with AdamW as in
                     the other loops; "ours, Muon" uses the default optimizer
transformers fp32    LlamaForCausalLM (Qwen3 with qk_norm; sdpa, no cache), one document per row padded to
                     --max_seq_len, fused AdamW: the loop of small-model repositories on a CPU; micro-batches of the
                     fastest size
transformers bf16    the same under bf16 autocast (fp16 with a gradient scaler on a GPU without bf16)

Each loop runs in a separate process; those of transformers do not use our settings, e.g. of memory allocation. If a
loop crashes, its table cell says so.

"chats" are conversations with the lengths of real SFT data, or the documents of --data_path; padding costs time here,
and each turn uses new documents. "full rows" have no padding, so only arithmetic counts. Before timing, each loop takes
a step in fp32 and in its own precision: losses and gradient norms must agree, else nothing is timed.

"MFU" is relative to the rate of large matmuls, measured in the same turns; in pretrain.py it is relative to the data
sheet. "s to first step" and "peak MiB" come from the first two steps of each process, with one process started at a
time. "pretrain.py" is the time from the start of the script to the log line of its first step, with a warm token cache.
On CUDA the loops of transformers are also timed compiled, and ours with --compile. --sweep varies preset, row length
and rows, or the one that it names. --quick skips fp32 if the machine has bf16 or fp16, and skips first steps, peaks and
"pretrain.py".
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.measure import (
    ROOT,
    Worker,
    WorkerFailed,
    close_all,
    end,
    failures,
    large_matmul,
    make_parser,
    peak_mebibytes,
    print_head,
    print_row,
    print_table,
    ratio,
    run_script,
    sample_records,
    seconds_since_start,
    take_turns,
    train_a_tokenizer,
    warn_of_load,
)
from common import exits, runtime
from common.optim import make_optimizers
from Config import PRESETS, LLMConfig, UserError, number
from dataset import MicroBatch, load_documents
from fastpath import accelerate
from formats.hf import to_transformers
from model import WeakWater
from text.chat import CONTEXT
from text.sources import find_files
from text.tokenizer import load_tokenizer

# a log-normal fit, clipped to the row length, of 5,265 SFT conversations of up to 512 tokens, sampled from the data of
# docs/REPORT.md: their median is 100 tokens and their mean 134, so rows padded to 512 are 26 % full
MEDIAN_TOKENS, LOG_DEVIATION, LEAST_TOKENS, TARGET_SHARE = 103, 0.71, 16, 0.54
LINES = 6000  # lines sampled from --data_path
ROWS_TO_TRY = {"cpu": (2, 4, 8, 16), "mps": (8, 16, 32), "cuda": (16, 32, 64, 128)}  # transformers' micro-batch sizes
# relative tolerances of (loss, gradient norm)
AGREEMENT = {"fp32": (1e-5, 1e-3), "bf16": (1e-3, 2e-2), "fp16": (1e-3, 2e-2)}


# ---------------------------------------------------------------------------------------------
# the work


def make_chats(rng: np.random.Generator, vocab_size: int, tokens: int, longest: int) -> list[tuple]:
    """(ids, is_target) of conversations with about `tokens` tokens in all. The targets are the last tokens of each."""
    chats, total = [], 0
    while total < tokens:
        length = int(np.clip(MEDIAN_TOKENS * math.exp(LOG_DEVIATION * rng.standard_normal()), LEAST_TOKENS, longest))
        is_target = np.arange(length) >= max(1, round(length * (1 - TARGET_SHARE)))
        chats.append((rng.integers(0, vocab_size, length), is_target))
        total += length
    return chats


def read_documents(rng: np.random.Generator, args, vocab_size: int, tokens: int, steps: int) -> list[list[tuple]]:
    """(ids, is_target) of the documents of each of `steps` steps, read from --data_path.

    Conversations are cut to --max_seq_len as in the stage scripts, texts are truncated there. The documents repeat if
    there are too few for all steps.
    """
    from text.sources import kind_of

    with tempfile.TemporaryDirectory() as name:
        kind, path = kind_of(find_files(args.data_path)[:1]), str(Path(name) / "sample.jsonl")
        sample_records(args.data_path, Path(path), kind, LINES, args.seed)
        tokenizer = load_tokenizer(args.tokenizer_path or train_a_tokenizer(path, Path(name), args.preset))
        if len(tokenizer) > vocab_size:
            raise UserError(f"--tokenizer_path {args.tokenizer_path}: {len(tokenizer):,} entries exceed the "
                            f"{vocab_size:,} of --preset {args.preset}")
        documents = load_documents(path, tokenizer, kind, name, args.max_seq_len)
        # a step without targets has no loss
        usable = [d for d in range(len(documents)) if documents.targets[d] and documents.length[d] > 1]
        if sum(min(int(documents.length[d]), args.max_seq_len) for d in usable) < tokens:
            raise UserError(f"--data_path {args.data_path}: has fewer than the {tokens:,} tokens of a step")
        drawn = cycle(rng.permutation(usable).tolist())
        return [next_documents(documents, drawn, kind, args.max_seq_len, tokens) for _ in range(steps)]


def next_documents(documents, drawn: Iterator[int], kind: str, longest: int, tokens: int) -> list[tuple]:
    """(ids, is_target) of the next documents, about `tokens` tokens in all."""
    chosen, total = [], 0
    while total < tokens:
        document = next(drawn)
        ids = documents.tokens(document)[:longest]
        is_target = documents.types(document) != CONTEXT if kind == "chat" else np.arange(len(ids)) > 0
        chosen.append((ids, is_target[:len(ids)]))
        total += len(ids)
    return chosen


def make_rows(rng: np.random.Generator, vocab_size: int, rows: int, length: int) -> list[tuple]:
    """(ids, is_target) of full rows of text: every token but the first is a target."""
    return [(rng.integers(0, vocab_size, length), np.arange(length) > 0) for _ in range(rows)]


class Loop:
    """Base class of the training loops: initial weights, precision, clipping and update. Subclasses define `step`."""

    def __init__(self, config: LLMConfig, device: torch.device, dtype: str):
        self.config, self.device, self.dtype = config, device, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def first_weights(self) -> WeakWater:
        """Our model with the initial weights, which are the same in every loop."""
        torch.manual_seed(0)
        return WeakWater(self.config)

    def check(self, documents: list[tuple]) -> dict[str, tuple[float, float]]:
        """Loss and gradient norm of a step from the initial weights, in fp32 and in the loop's own precision."""
        own, found = self.dtype, {}
        for self.dtype in dict.fromkeys(("fp32", own)):
            self.model.load_state_dict(self.first_weights().state_dict())
            found[self.dtype] = self.step(documents)
        return found

    def first_steps(self, documents: list[tuple]) -> dict[str, float]:
        """Seconds from the start of this process to the end of its first step, and peak memory after two steps."""
        self.step(documents)
        seconds = seconds_since_start()
        self.step(documents)
        return {"seconds_to_first_step": seconds, "peak_mebibytes": peak_mebibytes(self.device)}

    def update(self, optimizers: list) -> float:
        """Clip the gradients and update the weights. Returns the gradient norm before clipping."""
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return float(norm)


class Ours(Loop):
    """The step of the stage scripts: each micro-batch is one packed buffer."""

    def __init__(self, config: LLMConfig, device: torch.device, dtype: str, buffer_tokens: int, optimizer: str,
                 compiled: bool, plain: bool = False):
        super().__init__(config, device, dtype)
        self.model = self.first_weights().to(device).train()
        self.optimizers = make_optimizers(self.model, optimizer, 1e-4, 0.1)
        self.buffer_tokens = buffer_tokens
        for line in accelerate(self.model, device, dtype, compiled, plain=plain):
            print(line)
        if compiled:
            print(f"ours, compile: {runtime.compile_blocks(self.model, device)}")

    def micro_batches(self, documents: list[tuple]) -> list[MicroBatch]:
        """Pack documents in order. A buffer is full once it has `buffer_tokens` tokens or more."""
        buffers, room = [[]], self.buffer_tokens
        for document in documents:
            if room <= 0:
                buffers.append([])
                room = self.buffer_tokens
            buffers[-1].append(document)
            room -= len(document[0])
        batches = []
        for buffer in buffers:
            lengths = [len(ids) for ids, _ in buffer]
            tokens = np.concatenate([ids for ids, _ in buffer])
            # never -1: the first token of a document is no target
            index = np.flatnonzero(np.concatenate([is_target for _, is_target in buffer])) - 1
            batches.append(MicroBatch(tokens, lengths, index, tokens[index + 1], np.ones(len(index), np.float32)))
        return batches

    def step(self, documents: list[tuple]) -> tuple[float, float]:
        """Take one optimizer step. Returns (loss, gradient norm)."""
        batches = self.micro_batches(documents)
        total, step_loss = sum(len(batch.targets) for batch in batches), 0.0
        for batch in batches:
            with runtime.autocast(self.device, self.dtype):
                loss = self.model(**batch.to(self.device)) / total
            self.scaler.scale(loss).backward()
            step_loss += loss.detach()
        return float(step_loss), self.update(self.optimizers)


class Transformers(Loop):
    """The step with a transformers model, as in its documentation: one document per padded row."""

    def __init__(self, config: LLMConfig, device: torch.device, dtype: str, padded_to: int, compiled: bool):
        super().__init__(config, device, dtype)
        self.model = to_transformers(self.first_weights()).to(device).train()
        self.model.config.use_cache = False
        self.forward = torch.compile(self.model) if compiled else self.model
        self.padded_to = padded_to
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                           fused=True)
        self.rows = 8

    def choose_rows(self, documents: list[tuple], choices: tuple[int, ...]) -> int:
        """Set and return the fastest micro-batch size. Each size is timed twice in turns, after a warm-up step."""
        if len(choices) == 1:
            self.rows = choices[0]
            return self.rows
        documents = documents[:max(choices)]
        seconds = {}
        self.step(documents, choices[0])
        for rows in choices * 2:
            begin = time.perf_counter()
            try:
                self.step(documents, rows)
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                continue
            seconds[rows] = min(seconds.get(rows, math.inf), time.perf_counter() - begin)
        self.rows = min(seconds, key=lambda rows: seconds[rows])
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the other processes need it
        return self.rows

    def step(self, documents: list[tuple], rows: int | None = None) -> tuple[float, float]:
        """Take one optimizer step. Returns (loss, gradient norm)."""
        rows = rows or self.rows
        total, step_loss = sum(int(is_target.sum()) for _, is_target in documents), 0.0
        for begin in range(0, len(documents), rows):
            part = documents[begin:begin + rows]
            ids = np.zeros((len(part), self.padded_to), np.int64)
            labels, mask = np.full_like(ids, -100), np.zeros_like(ids)
            for row, (document, is_target) in enumerate(part):
                ids[row, :len(document)], mask[row, :len(document)] = document, 1
                labels[row, :len(document)] = np.where(is_target, document, -100)
            ids, labels, mask = (torch.from_numpy(x).to(self.device) for x in (ids, labels, mask))
            with runtime.autocast(self.device, self.dtype):
                loss = self.forward(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=total).loss
            self.scaler.scale(loss).backward()
            step_loss += loss.detach()
        return float(step_loss), self.update([self.optimizer])


# ---------------------------------------------------------------------------------------------
# measuring


def make_loop(name: str, args, config: LLMConfig, device: torch.device) -> Loop:
    """Build a loop in its worker process."""
    own, compiled = runtime.pick_dtype("auto", device)[0], name.endswith(" compiled")
    if name.startswith("ours"):
        runtime.prepare(device, args.seed, False)
        return Ours(config, device, own, args.rows * args.max_seq_len, "muon" if "Muon" in name else "adamw", compiled,
                    args.plain)
    return Transformers(config, device, name.split()[1], args.max_seq_len, compiled)


def start_loops(args, config: LLMConfig, device: torch.device, names: list[str], documents: list[tuple]) -> tuple:
    """Start the named loops in separate processes.

    Returns (workers by name, results of `first_steps` by name, micro-batch sizes of transformers by name). With --quick
    there are no first steps.
    """
    loops = {name: Worker(make_loop, name, args, config, device) for name in names if args.quick}
    own, rows = {}, {}
    for name in names:
        choices = ROWS_TO_TRY[device.type]
        if name.endswith(" compiled"):  # each other size would need another compilation
            choices = (rows.get(name.removesuffix(" compiled"), choices[0]),)
        try:
            if name.startswith("transformers") and not args.quick and len(choices) > 1:
                # in another process, so that larger sizes do not count toward the peak memory of this loop
                loops[name] = Worker(make_loop, name, args, config, device)
                choices = (loops[name].call("choose_rows", documents, choices),)
                loops[name].close()
            if not args.quick:
                loops[name] = Worker(make_loop, name, args, config, device)
            if name.startswith("transformers"):
                rows[name] = loops[name].call("choose_rows", documents, choices)
            if not args.quick:
                own[name] = loops[name].call("first_steps", documents)
        except WorkerFailed as failure:
            print(f"{name} {failure}", file=sys.stderr, flush=True)
    return loops, own, rows


def work_of(args, config: LLMConfig) -> dict[str, list[list[tuple]]]:
    """{"chats", "full rows"}: the documents of one step per turn. The first turn is the warm-up. "chats" are texts if
    --data_path holds texts."""
    rng, tokens, steps = np.random.default_rng(args.seed), args.rows * args.max_seq_len, args.repeats + 1
    chats = (read_documents(rng, args, config.vocab_size, tokens, steps) if args.data_path
             else [make_chats(rng, config.vocab_size, tokens, args.max_seq_len) for _ in range(steps)])
    rows = [make_rows(rng, config.vocab_size, args.rows, args.max_seq_len)] * steps
    return {"chats": chats, "full rows": rows}


def one_after_another(loop: Worker, draws: list[list[tuple]]) -> Callable[[], float]:
    """A function that takes a step on the documents of the next turn and returns its seconds."""
    documents = cycle(draws)
    return lambda: loop.time("step", next(documents))


def script_to_first_step(args) -> list[float]:
    """Seconds from the start of pretrain.py to the log line of its first optimizer step, with a warm token cache."""
    seconds = []
    with tempfile.TemporaryDirectory() as name:
        data, tokenizer = f"{name}/data", f"{name}/tokenizer"
        run_script("make_demo_data.py", "--out_dir", data)
        run_script("train_tokenizer.py", "--data_path", data, "--tokenizer_path", tokenizer,
                   "--vocab_size", str(LLMConfig.preset(args.preset).vocab_size))
        for turn in range(args.repeats + 1):
            command = [sys.executable, "pretrain.py", "--preset", args.preset, "--data_path", f"{data}/pretrain.jsonl",
                       "--tokenizer_path", tokenizer, "--out_dir", f"{name}/{turn}", "--cache_dir", f"{name}/cache",
                       "--batch_size", str(args.rows), "--max_seq_len", str(args.max_seq_len), "--max_steps", "2",
                       "--accumulation_steps", "1", "--log_interval", "1", "--device", args.device]
            begin = time.perf_counter()
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8") as run:
                for line in run.stdout:
                    if line.startswith("Epoch:") and len(seconds) == turn:
                        seconds.append(time.perf_counter() - begin)
            if run.returncode or len(seconds) == turn:
                raise RuntimeError(f"{' '.join(command)} failed")
    return seconds[1:]  # the first run creates the cache


def check_agreement(loops: dict, documents: list[tuple]) -> dict[str, tuple[float, float]]:
    """(loss, gradient norm) by loop of an fp32 step from the initial weights.

    The reference is the first loop of transformers that has not failed. Raises RuntimeError if a loop differs from it
    by more than AGREEMENT, in fp32 or in its own precision, and WorkerFailed if ours fails.
    """
    checked = {}
    for name, loop in loops.items():
        try:
            checked[name] = loop.call("check", documents)
        except WorkerFailed as failure:
            if name == "ours":
                raise
            print(f"{name} {failure}", file=sys.stderr, flush=True)
    first = next((name for name in checked if name.startswith("transformers")), "ours")
    if first == "ours":
        print("all loops of transformers failed: our loss is not compared", flush=True)
    loss, norm = checked[first]["fp32"]
    for name, found in checked.items():
        for dtype, (step_loss, step_norm) in found.items():
            of_loss, of_norm = AGREEMENT[dtype]
            if not (abs(step_loss - loss) <= of_loss * loss and abs(step_norm - norm) <= of_norm * norm):
                raise RuntimeError(f"{name} in {dtype}: loss {step_loss:.6f}, gradient norm {step_norm:.5f}; "
                                   f"{first} in fp32: {loss:.6f}, {norm:.5f}: not the same work")
    return {name: found["fp32"] for name, found in checked.items()}


def measure(loops: dict[str, Worker], draws: list[list[tuple]], args, config: LLMConfig, device: torch.device,
            dtype: str) -> tuple[dict, dict]:
    """Time steps on `draws` in turns with large matmuls. Returns (seconds, rates) by loop, without failed loops."""
    matmul, matmul_flops = large_matmul(device, runtime.DTYPES[dtype])
    seconds = take_turns({n: one_after_another(loop, draws) for n, loop in loops.items()} | {"matmul": matmul},
                         args.repeats)
    peak = matmul_flops / statistics.median(seconds.pop("matmul"))
    with torch.device("meta"):
        model = WeakWater(config)  # only its sizes are needed
    useful = [sum(len(ids) for ids, _ in documents) for documents in draws[1:]]
    flops = [tokens * model.flops_per_token(sum(len(ids)**2 for ids, _ in documents) / tokens)
             for tokens, documents in zip(useful, draws[1:], strict=True)]
    found = {}
    for name, times in seconds.items():
        positions = (useful if name.startswith("ours")
                     else [len(documents) * args.max_seq_len for documents in draws[1:]])
        found[name] = dict(
            seconds=times, useful_tokens_per_second=[tokens / s for tokens, s in zip(useful, times, strict=True)],
            useful_share=sum(useful) / sum(positions),
            positions_per_second=statistics.median(p / s for p, s in zip(positions, times, strict=True)),
            mfu=statistics.median(f / s / peak for f, s in zip(flops, times, strict=True)), peak_flops=peak)
    return seconds, found


def compare(args, config: LLMConfig, device: torch.device, dtype: str, result: dict) -> None:
    """Time all loops on chats and on full rows. Fills `result` and prints the tables."""
    theirs = [f"transformers {kind}" for kind in dict.fromkeys(("fp32", dtype)) if kind == dtype or not args.quick]
    compiling = args.compile or (device.type == "cuda" and not args.quick)
    trouble = runtime.compile_trouble(device) if compiling else None
    if trouble:
        print(f"nothing is compiled: {trouble}", flush=True)
    elif device.type == "cuda" and compiling:
        theirs += [f"{name} compiled" for name in theirs]
    best = "ours compiled" if args.compile and not trouble else "ours"  # our loop that the ratios compare
    names = list(dict.fromkeys(["ours", best, "ours, Muon", *theirs]))
    work = work_of(args, config)
    loops, own, rows_at_once = start_loops(args, config, device, names, work["chats"][0])
    try:
        for kind, draws in work.items():
            found = check_agreement(loops, draws[0])
            loss, norm = found["ours"]
            print(f"\n{kind}: {len(draws[0])} documents, {sum(len(ids) for ids, _ in draws[0]):,} tokens in the first "
                  f"step; all loops agree on its fp32 loss {loss:.5f} and gradient norm {norm:.4f}", flush=True)
            seconds, measured = measure(loops, draws, args, config, device, dtype)
            shown = own if kind == "chats" else {}  # measured once: padded chats have the shape of full rows
            head = ["", "useful tokens/s", "range", "positions/s", "useful", "MFU",
                    *(["s to first step", "peak MiB"] if shown else [])]
            rows = []
            for name in names:
                if name not in measured:
                    result[f"{kind}, {name}"] = {"failed": loops[name].failure}
                    rows.append([name, loops[name].failure, *[""] * (len(head) - 2)])
                    continue
                m = measured[name]
                result[f"{kind}, {name}"] = m | {"loss": found[name][0], "rows": rows_at_once.get(name, args.rows),
                                                 "alone": shown.get(name)}
                rates = m["useful_tokens_per_second"]
                rows.append([name, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}",
                             f"{m['positions_per_second']:,.0f}", f"{m['useful_share']:.1%}", f"{m['mfu']:.0%}",
                             *(f"{shown[name][key]:,.{digits}f}" for key, digits in (
                                 ("seconds_to_first_step", 1), ("peak_mebibytes", 0)) if shown)])
            print_table(head, rows)
            for m in list(measured.values())[:1]:
                print(f"MFU is relative to large matmuls in the same turns, {m['peak_flops'] / 1e12:.2f} TFLOP/s in "
                      f"{dtype} (in pretrain.py to the data sheet); rows per micro-batch: "
                      + ", ".join(f"{name} {rows}" for name, rows in rows_at_once.items()), flush=True)
            result["ratios"] |= ratios_of(kind, seconds, best)
    finally:
        result["failures"] |= failures(loops)
        close_all(loops)


def ratios_of(kind: str, seconds: dict[str, list[float]], best: str) -> dict[str, dict]:
    """The ratios of our loop `best` to the other loops that have not failed, on "chats" or "full rows"."""
    pairs = {}
    for dtype in runtime.DTYPES:
        other = f"transformers {dtype}"
        if kind == "chats":
            pairs[f"useful_vs_padded_{dtype}"] = other, best
        else:
            pairs["positions_vs_fp32" if dtype == "fp32" else f"positions_vs_transformers_{dtype}"] = other, best
            pairs[f"positions_vs_transformers_{dtype}_compiled"] = f"{other} compiled", best
    if kind == "chats":
        pairs["muon_useful_vs_padded_fp32"] = "transformers fp32", "ours, Muon"
    elif best != "ours":
        pairs["positions_vs_ours_uncompiled"] = "ours", best
    return {key: ratio(seconds[slow], seconds[fast]) for key, (slow, fast) in pairs.items()
            if slow in seconds and fast in seconds}


def config_of(args) -> LLMConfig:
    """The config of the preset for rows of --max_seq_len, without dropout."""
    return LLMConfig.preset(args.preset).for_run(args.max_seq_len, dropout=0.0)


def sweep(args, device: torch.device, dtype: str, result: dict) -> None:
    """Time ours and transformers on full rows, with one setting changed at a time: preset (up to --preset), row
    length, or rows; or only the one that --sweep names."""
    theirs = f"transformers {dtype}"
    settings = {"preset": list(PRESETS)[:list(PRESETS).index(args.preset) + 1],
                "max_seq_len": [max(2, args.max_seq_len * n // 4) for n in (1, 2, 8)],
                "rows": [max(1, args.rows * n // 4) for n in (1, 2, 8)]}
    cases = [{name: value} for name, values in settings.items() if args.sweep in (name, "all") for value in values]
    print(f"\nfull rows, ours and then {theirs}")
    head = ["tokens/s", "MFU", "s to first step", "peak MiB"]
    head = ["preset", "row length", "rows", *head, *head, "ratio"]
    widths = [max(len(cell), 10) for cell in head]
    widths[0] = max(map(len, PRESETS))
    print_head(head, widths)
    result["sweep"] = []
    for case in cases:
        here = argparse.Namespace(**(vars(args) | case))
        config = config_of(here)
        documents = make_rows(np.random.default_rng(args.seed), config.vocab_size, here.rows, here.max_seq_len)
        loops, own, _ = start_loops(here, config, device, ["ours", theirs], documents)
        try:
            check_agreement(loops, documents)
            seconds, measured = measure(loops, [documents] * (args.repeats + 1), here, config, device, dtype)
            row = [here.preset, str(here.max_seq_len), str(here.rows)]
            for name, loop in loops.items():
                if name in measured:
                    m = measured[name] = measured[name] | own[name]
                    row += [f"{m['positions_per_second']:,.0f}", f"{m['mfu']:.0%}",
                            f"{m['seconds_to_first_step']:.1f}", f"{m['peak_mebibytes']:,.0f}"]
                else:
                    measured[name] = {"failed": loop.failure}
                    row += [loop.failure, "", "", ""]
            gain = {"ratio": ratio(seconds[theirs], seconds["ours"])} if len(seconds) == 2 else {}
            result["sweep"].append({"preset": here.preset, "max_seq_len": here.max_seq_len, "rows": here.rows}
                                   | gain | measured)
            print_row([*row, f"{gain['ratio']['median']:.2f}" if gain else ""], widths)
        finally:
            result["failures"] |= {f"{name}, {case}": why for name, why in failures(loops).items()}
            close_all(loops)


def everything(args, config: LLMConfig, device: torch.device, dtype: str, result: dict) -> None:
    """Run all measurements that the flags select. Fills `result`."""
    compare(args, config, device, dtype, result)
    if not args.quick:
        result["script_to_first_step"] = starts = script_to_first_step(args)
        print(f"\npretrain.py, start to first step: {statistics.median(starts):.1f} s "
              f"({min(starts):.1f} to {max(starts):.1f})", flush=True)
    if args.sweep:
        sweep(args, device, dtype, result)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", help="JSONL of conversations or texts (default: random ids)")
    parser.add_argument("--tokenizer_path", help="tokenizer folder (default: trained on the data)")
    parser.add_argument("--rows", type=number(int, 1), default=8, help="rows per step (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=number(int, 2), default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of the documents (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also time ours compiled, and use it in the ratios")
    parser.add_argument("--sweep", nargs="?", const="all", choices=("all", "preset", "max_seq_len", "rows"),
                        help="also vary preset, row length and rows, or one of them")
    parser.add_argument("--plain", action="store_true", help="ours computes as in model.py, without fastpath/")
    parser.add_argument("--quick", action="store_true", help="skip fp32 beside bf16 or fp16, first steps and peaks")
    args = parser.parse_args()
    if args.quick and args.sweep:
        parser.error("--sweep measures first steps and peaks, which --quick skips")
    device, _ = runtime.pick_device(args.device)
    dtype, _ = runtime.pick_dtype("auto", device)
    config = config_of(args)
    warn_of_load()
    result = {"ratios": {}, "machine": runtime.describe_machine(device), "preset": args.preset, "failures": {}}
    print(f"{result['machine']}; {args.preset}, {args.rows} x {args.max_seq_len} tokens a step, {args.repeats} turns",
          flush=True)
    return end(result, partial(everything, args, config, device, dtype))


if __name__ == "__main__":
    sys.exit(exits.run(main))
