"""Training speed beside transformers: one optimizer step on the same documents from the same weights, taken in turns.

    python benchmarks/train_throughput.py --preset weakwater-30m --repeats 5
    python benchmarks/train_throughput.py --data_path data/sft_512.jsonl --tokenizer_path weakwater_tokenizer

ours                 documents packed, bf16 where the machine has it: the step of the stage scripts, but with AdamW as
                     in the other loops; "ours, Muon" with their own default
transformers fp32    LlamaForCausalLM (Qwen3 with qk_norm; sdpa, no cache), one document a row padded to --max_seq_len,
                     fused AdamW: the loop of small-model repositories on a CPU; micro-batches of the fastest size
transformers bf16    the same under bf16 autocast

"chats": conversations with the lengths of real SFT data, or the documents of --data_path, where padding hurts; each
turn takes another step's documents. "full rows": rows without padding, where only the arithmetic counts. First all
take a step in fp32 and in their own precision: losses and gradient norms must agree, else nothing is timed. "s to
first step" and "peak MiB" are those of each loop alone in a process, run once; "pretrain.py" is the stage script from
its start to the line of its first step, with a warm token cache. With CUDA transformers, and with --compile ours, are
also timed compiled. --sweep shows how all of this grows with model, row length and rows.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.measure import (
    ROOT,
    alone,
    large_product,
    make_parser,
    peak_mebibytes,
    print_result,
    print_table,
    ratio,
    run_script,
    sample_records,
    seconds_since_start,
    take_turns,
    to_transformers,
    train_a_tokenizer,
    warn_of_load,
)
from common import runtime
from common.optim import make_optimizers
from Config import PRESETS, LLMConfig, UserError, number
from dataset import CONTEXT, MicroBatch, find_files, load_documents, load_tokenizer
from model import WeakWater

# of 5,265 real SFT conversations of up to 512 tokens, drawn from those of docs/REPORT.md: their median is 100 tokens,
# their mean 134, so that rows padded to 512 are 26 % full. Log-normal, cut to what a row holds
MEDIAN_TOKENS, LOG_DEVIATION, LEAST_TOKENS, TARGET_SHARE = 103, 0.71, 16, 0.54
LINES = 6000  # of --data_path, drawn from all of it
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS_TO_TRY = {"cpu": (2, 4, 8, 16), "mps": (8, 16, 32), "cuda": (16, 32, 64, 128)}  # at once, by transformers' loops
# how far losses and gradient norms may differ, as a share
AGREEMENT = {"fp32": (1e-5, 1e-3), "bf16": (1e-3, 2e-2), "fp16": (1e-3, 2e-2)}


# ---------------------------------------------------------------------------------------------
# the work


def make_chats(rng: np.random.Generator, vocab_size: int, tokens: int, longest: int) -> list[tuple]:
    """Conversations of about `tokens` tokens in all: (ids, is_target) of each. The reply stands at the end."""
    chats, total = [], 0
    while total < tokens:
        length = int(np.clip(MEDIAN_TOKENS * math.exp(LOG_DEVIATION * rng.standard_normal()), LEAST_TOKENS, longest))
        is_target = np.arange(length) >= max(1, round(length * (1 - TARGET_SHARE)))
        chats.append((rng.integers(0, vocab_size, length), is_target))
        total += length
    return chats


def read_documents(rng: np.random.Generator, args, vocab_size: int, tokens: int, steps: int) -> list[list[tuple]]:
    """The same of --data_path for each of `steps` steps: conversations, cut to --max_seq_len as the stage scripts cut
    them, or texts, cut off there. What is too little for so many steps comes again."""
    from evaluate import kind_of  # not at every start, which is timed

    with tempfile.TemporaryDirectory() as name:
        kind, path = kind_of(find_files(args.data_path)[0]), str(Path(name) / "sample.jsonl")
        sample_records(args.data_path, Path(path), kind, LINES, args.seed)
        tokenizer = load_tokenizer(args.tokenizer_path or train_a_tokenizer(path, Path(name), args.preset))
        if len(tokenizer) > vocab_size:
            raise UserError(f"--tokenizer_path {args.tokenizer_path}: {len(tokenizer):,} entries are more than the "
                            f"{vocab_size:,} of --preset {args.preset}")
        documents = load_documents(path, tokenizer, kind, name, args.max_seq_len)
        # a step's documents need one target at least
        usable = [d for d in range(len(documents)) if documents.targets[d] and documents.length[d] > 1]
        if sum(min(int(documents.length[d]), args.max_seq_len) for d in usable) < tokens:
            raise UserError(f"--data_path {args.data_path}: holds less than a step of {tokens:,} tokens")
        drawn = cycle(rng.permutation(usable).tolist())
        return [next_documents(documents, drawn, kind, args.max_seq_len, tokens) for _ in range(steps)]


def next_documents(documents, drawn: Iterator[int], kind: str, longest: int, tokens: int) -> list[tuple]:
    """(ids, is_target) of the documents that come next, about `tokens` tokens in all."""
    chosen, total = [], 0
    while total < tokens:
        document = next(drawn)
        ids = documents.tokens(document)[:longest]
        is_target = documents.kinds(document) != CONTEXT if kind == "chat" else np.arange(len(ids)) > 0
        chosen.append((ids, is_target[:len(ids)]))
        total += len(ids)
    return chosen


def make_rows(rng: np.random.Generator, vocab_size: int, rows: int, length: int) -> list[tuple]:
    """Full rows of text: every token but the first is a target."""
    return [(rng.integers(0, vocab_size, length), np.arange(length) > 0) for _ in range(rows)]


class Ours:
    """The step of the stage scripts: one packed buffer a micro-batch."""

    def __init__(self, config: LLMConfig, device: torch.device, rows: int, max_seq_len: int, optimizer: str,
                 compiled: bool):
        torch.manual_seed(0)
        self.device, self.dtype = device, runtime.pick_dtype("auto", device)[0]
        self.model = WeakWater(config).to(device).train()
        self.optimizers = make_optimizers(self.model, optimizer, 1e-4, 0.1)
        self.rows, self.buffer_tokens = rows, rows * max_seq_len
        if compiled:
            print(f"ours, compile: {runtime.compile_blocks(self.model, device)}")

    def micro_batches(self, documents: list[tuple]) -> list[MicroBatch]:
        """Buffers of at most rows x max_seq_len tokens."""
        buffers, room = [[]], self.buffer_tokens
        for document in documents:
            if len(document[0]) > room:
                buffers.append([])
                room = self.buffer_tokens
            buffers[-1].append(document)
            room -= len(document[0])
        batches = []
        for buffer in buffers:
            lengths = [len(ids) for ids, _ in buffer]
            tokens = np.concatenate([ids for ids, _ in buffer])
            index = np.flatnonzero(np.concatenate([is_target for _, is_target in buffer])) - 1  # the first is no target
            batches.append(MicroBatch(tokens, lengths, index, tokens[index + 1], np.ones(len(index), np.float32)))
        return batches

    def step(self, documents: list[tuple]) -> tuple[float, float]:
        """One optimizer step; its loss and its gradient's norm."""
        batches = self.micro_batches(documents)
        total, step_loss = sum(len(batch.targets) for batch in batches), 0.0
        for batch in batches:
            with runtime.autocast(self.device, self.dtype):
                loss = self.model(**batch.to(self.device)) / total
            loss.backward()
            step_loss += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(step_loss), float(norm)


class Transformers:
    """The step with transformers' model, as its documentation says, one document a row."""

    def __init__(self, config: LLMConfig, device: torch.device, bf16: bool, padded_to: int, compiled: bool):
        torch.manual_seed(0)
        self.model = to_transformers(WeakWater(config)).to(device).train()
        self.model.config.use_cache = False
        self.forward = torch.compile(self.model) if compiled else self.model
        self.device, self.dtype, self.padded_to = device, "bf16" if bf16 else "fp32", padded_to
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                           fused=True)
        self.rows = 8

    def choose_rows(self, documents: list[tuple], choices: tuple[int, ...]) -> None:
        """Keep the micro-batch with which a step is fastest, each twice in turns after a step that does not count."""
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

    def step(self, documents: list[tuple], rows: int | None = None) -> tuple[float, float]:
        """One optimizer step; its loss and its gradient's norm."""
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
            loss.backward()
            step_loss += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(step_loss), float(norm)


# ---------------------------------------------------------------------------------------------
# measuring


def make_loops(args, config: LLMConfig, device: torch.device, names: list[str]) -> dict:
    """The named loops, each with weights of its own."""
    loops = {}
    for name in names:
        if name.startswith("ours"):
            loops[name] = Ours(config, device, args.rows, args.max_seq_len, "muon" if "Muon" in name else "adamw",
                               "compiled" in name)
        else:
            loops[name] = Transformers(config, device, "bf16" in name, args.max_seq_len, "compiled" in name)
    return loops


def work_of(args, config: LLMConfig) -> dict[str, list[list[tuple]]]:
    """The documents of a step, for one turn after another: of chats (texts, where --data_path holds them) and of full
    rows. The first turn warms up."""
    rng, tokens, steps = np.random.default_rng(args.seed), args.rows * args.max_seq_len, args.repeats + 1
    chats = (read_documents(rng, args, config.vocab_size, tokens, steps) if args.data_path
             else [make_chats(rng, config.vocab_size, tokens, args.max_seq_len) for _ in range(steps)])
    rows = [make_rows(rng, config.vocab_size, args.rows, args.max_seq_len)] * steps
    return {"chats": chats, "full rows": rows}


def one_after_another(loop, draws: list[list[tuple]]) -> Callable[[], object]:
    """A function that takes the step on the documents of the next turn."""
    documents = cycle(draws)
    return lambda: loop.step(next(documents))


def save_documents(documents: list[tuple], path: Path) -> None:
    """For `load_saved` in another process."""
    np.savez(path, lengths=[len(ids) for ids, _ in documents], ids=np.concatenate([ids for ids, _ in documents]),
             is_target=np.concatenate([is_target for _, is_target in documents]))


def load_saved(path: str) -> list[tuple]:
    """What `save_documents` was given."""
    with np.load(path) as saved:
        ends = np.cumsum(saved["lengths"])[:-1]
        return list(zip(np.split(saved["ids"], ends), np.split(saved["is_target"], ends), strict=True))


def first_steps(args, config: LLMConfig, device: torch.device) -> dict:
    """One loop alone in this process: seconds from its start to the end of the first step, and memory after two."""
    documents = load_saved(args.documents)
    loop = make_loops(args, config, device, [args.alone])[args.alone]
    loop.rows = args.micro_rows
    loop.step(documents)
    seconds = seconds_since_start()
    loop.step(documents)
    return {"seconds_to_first_step": seconds, "peak_mebibytes": peak_mebibytes(device)}


def script_to_first_step(args) -> list[float]:
    """Seconds from the start of pretrain.py to the line of its first optimizer step, its token cache being there."""
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
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
                for line in run.stdout:
                    if line.startswith("Epoch:") and len(seconds) == turn:
                        seconds.append(time.perf_counter() - begin)
            if run.returncode or len(seconds) == turn:
                raise RuntimeError(f"{' '.join(command)} failed")
    return seconds[1:]  # the first made the cache


def check_agreement(loops: dict, documents: list[tuple], start: dict[str, torch.Tensor],
                    first: str = "transformers fp32") -> dict[str, tuple]:
    """Loss and gradient norm of a step of each loop in fp32 from the weights `start`. Raises RuntimeError where they
    are not the `first` loop's, or where those in the loop's own precision are far from them."""
    found = {}
    for name, loop in sorted(loops.items(), key=lambda item: item[0] != first):
        usual = loop.dtype
        for dtype in dict.fromkeys(("fp32", usual)):
            loop.model.load_state_dict(start)
            loop.dtype = dtype
            step_loss, step_norm = loop.step(documents)
            if dtype == "fp32":
                found[name] = step_loss, step_norm
            loss, norm = found[first]
            of_loss, of_norm = AGREEMENT[dtype]
            if not (abs(step_loss - loss) <= of_loss * loss and abs(step_norm - norm) <= of_norm * norm):
                raise RuntimeError(f"{name} in {dtype}: loss {step_loss:.6f}, gradient norm {step_norm:.5f}; "
                                   f"transformers in fp32: {loss:.6f}, {norm:.5f}: not the same work")
        loop.dtype = usual
    return found


def measure(loops: dict, draws: list[list[tuple]], padded_to: int, dtype: str, repeats: int) -> tuple[dict, dict]:
    """Steps on `draws` in turns, a large product among them: the seconds of each, and what they come to."""
    ours = loops["ours"]
    product, product_flops = large_product(ours.device, DTYPES[dtype])
    seconds = take_turns({n: one_after_another(loop, draws) for n, loop in loops.items()} | {"product": product},
                         repeats)
    peak = product_flops / statistics.median(seconds["product"])
    useful = [sum(len(ids) for ids, _ in documents) for documents in draws[1:]]
    flops = [tokens * ours.model.flops_per_token(sum(len(ids)**2 for ids, _ in documents) / tokens)
             for tokens, documents in zip(useful, draws[1:], strict=True)]
    found = {}
    for name, loop in loops.items():
        positions = useful if isinstance(loop, Ours) else [len(documents) * padded_to for documents in draws[1:]]
        rates = [tokens / s for tokens, s in zip(useful, seconds[name], strict=True)]
        found[name] = dict(
            seconds=seconds[name], useful_tokens_per_second=rates, useful_share=sum(useful) / sum(positions),
            positions_per_second=statistics.median(p / s for p, s in zip(positions, seconds[name], strict=True)),
            mfu=statistics.median(f / s / peak for f, s in zip(flops, seconds[name], strict=True)),
            rows=loop.rows, peak_flops=peak)
    return seconds, found


def compare(args, config: LLMConfig, device: torch.device, dtype: str) -> dict:
    """Time all loops on both kinds of work, print the tables, return everything."""
    theirs = ["transformers fp32"] + ["transformers bf16"] * (dtype == "bf16")
    trouble = runtime.compile_trouble(device) if args.compile or device.type == "cuda" else None
    if trouble:
        print(f"nothing is compiled: {trouble}")
    elif device.type == "cuda":
        theirs += [f"{name} compiled" for name in theirs]
    best = "ours compiled" if args.compile and not trouble else "ours"  # of ours, to which the ratios are
    names = list(dict.fromkeys(["ours", best, "ours, Muon", *theirs]))
    work = work_of(args, config)
    loops, result, seconds = make_loops(args, config, device, names), {}, {}
    start = {name: tensor.clone() for name, tensor in loops["ours"].model.state_dict().items()}
    for kind, draws in work.items():
        found = check_agreement(loops, draws[0], start)
        loss, norm = found["ours"]
        print(f"\n{kind}: {len(draws[0])} documents, {sum(len(ids) for ids, _ in draws[0]):,} tokens in the first "
              f"step, whose loss in fp32, {loss:.5f}, and gradient norm, {norm:.4f}, are those of all loops")
        own = {}
        if kind == "chats":  # padded, they are rows of the same length as the full ones
            for name in theirs:
                if name.endswith(" compiled"):  # each size would be compiled anew
                    loops[name].rows = loops[name.removesuffix(" compiled")].rows
                else:
                    loops[name].choose_rows(draws[0], ROWS_TO_TRY[device.type])
            own = measure_alone(args, loops, draws[0])
        seconds[kind], measured = measure(loops, draws, args.max_seq_len, dtype, args.repeats)
        rows = []
        for name, m in measured.items():
            result[f"{kind}, {name}"] = m | {"loss": found[name][0], "alone": own.get(name)}
            rates = m["useful_tokens_per_second"]
            rows.append([name, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}",
                         f"{m['positions_per_second']:,.0f}", f"{m['useful_share']:.1%}", f"{m['mfu']:.0%}",
                         *(f"{own[name][key]:,.{digits}f}" for key, digits in (
                             ("seconds_to_first_step", 1), ("peak_mebibytes", 0)) if own)])
        head = ["", "useful tokens/s", "range", "positions/s", "useful", "MFU", "s to first step", "peak MiB"]
        print_table(head if own else head[:-2], rows)
        print(f"large products in the same turns: {measured['ours']['peak_flops'] / 1e12:.2f} TFLOP/s in {dtype}; "
              "rows at once: " + ", ".join(f"{name} {loops[name].rows}" for name in theirs))

    def times(kind: str, name: str) -> dict:
        return ratio(seconds[kind][name], seconds[kind][best])

    result["ratios"] = {"useful_vs_padded_fp32": times("chats", "transformers fp32"),
                        "muon_useful_vs_padded_fp32": ratio(seconds["chats"]["transformers fp32"],
                                                            seconds["chats"]["ours, Muon"]),
                        "positions_vs_fp32": times("full rows", "transformers fp32")}
    if dtype == "bf16":
        result["ratios"] |= {"useful_vs_padded_bf16": times("chats", "transformers bf16"),
                             "positions_vs_transformers_bf16": times("full rows", "transformers bf16")}
    for name in names:
        if name.endswith("compiled"):
            other = "ours_uncompiled" if name == best else name.replace(" ", "_")
            result["ratios"][f"positions_vs_{other}"] = times("full rows", "ours" if name == best else name)
    return result


def measure_alone(args, loops: dict, documents: list[tuple]) -> dict[str, dict]:
    """`first_steps` of every loop, each in a process of its own."""
    runs = {}
    torch.cuda.empty_cache()  # they need the room
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.npz"
        save_documents(documents, path)
        for name, loop in loops.items():
            runs[name] = alone(__file__, name, micro_rows=loop.rows, documents=path, preset=args.preset, rows=args.rows,
                               max_seq_len=args.max_seq_len, device=args.device)
    return runs


def config_of(args) -> LLMConfig:
    """The preset, with room for the rows."""
    return LLMConfig.preset(args.preset).for_run(args.max_seq_len, dropout=0.0)


def sweep(args, device: torch.device, dtype: str) -> list[dict]:
    """Ours beside transformers on full rows, with one of preset (up to --preset), row length and rows changed at a
    time."""
    theirs = "transformers bf16" if dtype == "bf16" else "transformers fp32"
    cases = [dict(preset=preset) for preset in list(PRESETS)[:list(PRESETS).index(args.preset) + 1]]
    cases += [dict(max_seq_len=max(2, args.max_seq_len * n // 4)) for n in (1, 2, 8)]
    cases += [dict(rows=max(1, args.rows * n // 4)) for n in (1, 2, 8)]
    results, rows = [], []
    for case in cases:
        here = argparse.Namespace(**(vars(args) | case))
        config = config_of(here)
        loops = make_loops(here, config, device, ["ours", theirs])
        documents = make_rows(np.random.default_rng(args.seed), config.vocab_size, here.rows, here.max_seq_len)
        start = {name: tensor.clone() for name, tensor in loops["ours"].model.state_dict().items()}
        check_agreement(loops, documents, start, first=theirs)
        loops[theirs].choose_rows(documents, ROWS_TO_TRY[device.type])
        own = measure_alone(here, loops, documents)
        seconds, measured = measure(loops, [documents] * (args.repeats + 1), here.max_seq_len, dtype, args.repeats)
        gain = ratio(seconds[theirs], seconds["ours"])
        row = [here.preset, str(here.max_seq_len), str(here.rows)]
        for name, m in measured.items():
            m |= own[name]
            row += [f"{m['positions_per_second']:,.0f}", f"{m['mfu']:.0%}", f"{m['seconds_to_first_step']:.1f}",
                    f"{m['peak_mebibytes']:,.0f}"]
        results.append({"preset": here.preset, "max_seq_len": here.max_seq_len, "rows": here.rows, "ratio": gain}
                       | measured)
        rows.append([*row, f"{gain['median']:.2f}"])
    print(f"\nfull rows, ours and then {theirs}")
    head = ["tokens/s", "MFU", "s to first step", "peak MiB"]
    print_table(["preset", "row length", "rows", *head, *head, "ratio"], rows)
    return results


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", help="JSONL of conversations or texts (default: made up)")
    parser.add_argument("--tokenizer_path", help="its tokenizer (default: trained on the data)")
    parser.add_argument("--rows", type=number(int, 1), default=8, help="rows of a step (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=number(int, 2), default=512, help="of a row (default: %(default)s)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the documents (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time ours compiled as well; ratios are then to that")
    parser.add_argument("--sweep", action="store_true", help="also: other models, row lengths and rows")
    for hidden in ("alone", "documents"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    parser.add_argument("--micro_rows", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device, _ = runtime.pick_device(args.device)
    dtype, _ = runtime.pick_dtype("auto", device)
    config = config_of(args)
    if not (args.alone or "").startswith("transformers"):  # our way with freed memory
        runtime.prepare(device, dtype, args.seed, False)
    if args.alone:
        print(json.dumps(first_steps(args, config, device)))
        return
    warn_of_load()
    print(f"{runtime.describe_machine(device)}; {args.preset}, "
          f"{args.rows} x {args.max_seq_len} tokens a step, {args.repeats} turns")
    result = compare(args, config, device, dtype)
    result["script_to_first_step"] = starts = script_to_first_step(args)
    print(f"\npretrain.py, start to first step: {statistics.median(starts):.1f} s "
          f"({min(starts):.1f} to {max(starts):.1f})")
    if args.sweep:
        result["sweep"] = sweep(args, device, dtype)
    print_result(result | {"machine": runtime.describe_machine(device), "preset": args.preset})


if __name__ == "__main__":
    sys.exit(runtime.run(main))
