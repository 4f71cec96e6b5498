"""What the benchmarks share: programs in processes of their own, turns (A B, B A, …), medians with their spread, the
machine's own limits, tables.

torch is imported where it is needed: to measure the memory of a tokenizer's training, it must not be there.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

from Config import PRESETS, LLMConfig, OneLineParser, UserError, number

ROOT = Path(__file__).resolve().parent.parent
WORKER_TIMEOUT = 600  # seconds for one call: longer than any step or compilation, so only a hang reaches it


def make_parser(description: str, preset_help: str = "(default: %(default)s)") -> OneLineParser:
    """A parser with the flags of every benchmark."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="weakwater-30m", choices=tuple(PRESETS), help=preset_help)
    parser.add_argument("--repeats", type=number(int, 1), default=5, help="turns that count (default: %(default)s)")
    return parser


def warn_of_load() -> None:
    """Say so where other work ran on this machine a moment ago."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if load > 0.5:
        print(f"the load of this machine was {load:.1f} in the last minute: what else runs on it slows each loop by "
              "another factor", file=sys.stderr)


class WorkerFailed(RuntimeError):
    """A worker's program raised, died or did not answer. The message is short: it becomes a cell of the table."""


class Worker:
    """A program in a process of its own, e.g. one decoder. If it crashes, the benchmark goes on without it.

    `make(*args)` builds the program in the new process. Calls are sent over a pipe, one at a time; `seconds` is how
    long the last one took there, without the pipe. After a failure every call raises WorkerFailed again.
    """

    def __init__(self, make: Callable, *args):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, time.time(), make, args), daemon=True)
        self.process.start()
        theirs.close()  # else a crash would not close the pipe
        self.failure: str | None = None
        self.seconds = 0.0
        self.ready = False

    def __call__(self, *args):
        return self.call("__call__", *args)

    def call(self, method: str, *args, timeout: float = WORKER_TIMEOUT):
        """The result of a method of the program. Raises WorkerFailed."""
        if not self.ready:  # only now: several workers build their programs at the same time
            self._receive(timeout)
            self.ready = True
        try:
            self.pipe.send((method, args))
        except OSError:  # it died between two calls: _receive reads why
            pass
        result, self.seconds = self._receive(timeout)
        return result

    def time(self, method: str, *args) -> float:
        """Seconds that a method of the program takes. Raises WorkerFailed."""
        self.call(method, *args)
        return self.seconds

    def _receive(self, timeout: float) -> tuple:
        if self.failure is None:
            try:
                if self.pipe.poll(timeout):
                    result, seconds, self.failure = self.pipe.recv()
                else:
                    self.failure = f"failed: no answer in {timeout:.0f} s"
            except (EOFError, OSError):
                self.process.join(10)
                code = self.process.exitcode
                self.failure = f"crashed: {signal.Signals(-code).name if code and code < 0 else f'exit code {code}'}"
        if self.failure is not None:
            self.close()
            raise WorkerFailed(self.failure)
        return result, seconds

    def close(self) -> None:
        """End the process and free its memory."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe, started: float, make: Callable, args: tuple) -> None:
    """The worker's process: build the program, then answer calls until one fails or the benchmark closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the benchmark ends its workers
    os.dup2(2, 1)  # the benchmark's stdout ends with its JSON object: no program may write there
    os.environ["BENCHMARK_START"] = str(started)
    method, program = None, None
    while True:
        try:
            begin = time.perf_counter()
            if method is None:
                result, program = None, make(*args)
            else:
                result = getattr(program, method)(*args)
            wait_for_device()  # an idle worker must leave the GPU to the others
            answer = result, time.perf_counter() - begin, None
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:100]
            answer = None, 0.0, f"failed: {type(error).__name__}: {reason}".rstrip(": ")
            traceback.print_exc()
        try:
            pipe.send(answer)
            if answer[2]:  # the state of the program is unknown now
                return
            method, args = pipe.recv()
        except (EOFError, OSError):
            return


def close_all(workers: dict[str, Worker]) -> None:
    """End the processes of all these workers."""
    for worker in workers.values():
        worker.close()


def failures(workers: dict[str, Worker]) -> dict[str, str]:
    """Why each failed worker failed, by name."""
    return {name: worker.failure for name, worker in workers.items() if worker.failure}


def take_turns(work: dict[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each piece of work, `repeats` times in turns, after one turn to warm up that does not count.

    Work that measures itself returns its seconds as a float. Work that raises WorkerFailed is left out of the rest,
    and of the result.

    On a shared machine the speed drifts; in turns all drift together, and their ratios stay. The first one in a turn
    rotates: it may pay what the others then find ready, e.g. memory for a new shape.
    """
    seconds, names = {name: [] for name in work}, list(work)
    for turn in range(repeats + warm_up):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name not in seconds:
                continue
            begin = time.perf_counter()
            try:
                measured = work[name]()
            except WorkerFailed as failure:
                print(f"{name} {failure}", file=sys.stderr, flush=True)
                del seconds[name]
                continue
            wait_for_device()
            if turn >= warm_up:
                seconds[name].append(measured if isinstance(measured, float) else time.perf_counter() - begin)
    return seconds


def results_in_turns(work: dict[str, Callable[[], dict]], repeats: int) -> dict[str, list[dict]]:
    """The same for work that measures itself: what each returned, without the round that does not count."""
    results = {name: [] for name in work}
    take_turns({name: lambda name=name, do=do: results[name].append(do()) for name, do in work.items()}, repeats)
    return {name: done[1:] for name, done in results.items()}


def run_script(script: str, *flags: str) -> None:
    """Run one of the project's scripts. Raises UserError with what it complained about."""
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{script}: {done.stderr.strip()}")


def alone(benchmark: str, name: str, **flags) -> dict:
    """`benchmark --alone name`, with these flags, in a process of its own; the JSON object that it prints last."""
    command = [sys.executable, benchmark, "--alone", name]
    for flag, value in flags.items():
        if value is not False:
            command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"BENCHMARK_START": str(time.time())})
    if done.returncode:
        raise RuntimeError(f"{name} alone: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def seconds_since_start() -> float:
    """In a process that `alone` or Worker started: since then."""
    return time.time() - float(os.environ["BENCHMARK_START"])


def wait_for_device() -> None:
    """Until the GPU, if there is one, has done what it was told."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch and torch.backends.mps.is_available():
        torch.mps.synchronize()


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How often `fast` fits into `slow`: median, smallest and largest over the turns."""
    turns = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(turns), "min": min(turns), "max": max(turns)}


def large_product(device, dtype) -> tuple[Callable[[], None], int]:
    """A large square matrix product, the limit of arithmetic on this machine, to be timed in turns with what is to be
    compared with it; and how many FLOPs it is."""
    import torch

    n, times = (8192, 4) if device.type == "cuda" else (2048, 8)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        for _ in range(times):
            a @ b

    return product, 2 * n**3 * times


def peak_mebibytes(device=None) -> float:
    """The most memory this process has held: on a GPU that of its tensors, else resident memory."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def middle(runs: list[dict], key: str) -> float:
    """The median of one measurement over the turns."""
    return statistics.median(run[key] for run in runs)


def sample_records(source: str, target: Path, kind: str, count: int, seed: int) -> None:
    """`count` lines of a JSONL file, drawn from all of it (Vitter 1985, algorithm R), as a plain file; those that are
    no records of the kind are left out, and counted. Raises UserError where none is left."""
    import random

    from text.records import MalformedRecord, find_files, parse_record, read_lines

    rng, kept, seen = random.Random(seed), [], 0
    for file in find_files(source):
        for _, line in read_lines(file):
            seen += 1
            if len(kept) < count:
                kept.append(line)
            elif (place := rng.randrange(seen)) < count:
                kept[place] = line
    written = 0
    with open(target, "wb") as stream:
        for line in kept:
            try:
                parse_record(line, kind)
            except MalformedRecord:
                continue
            stream.write(line.rstrip(b"\n") + b"\n")
            written += 1
    print(f"{source}: {len(kept):,} of {seen:,} lines drawn; {len(kept) - written:,} malformed ones left out")
    if not written:
        raise UserError(f"--data_path {source}: no {kind} record in it")


def make_corpus(path: Path, megabytes: float) -> None:
    """Generated text of about so many megabytes: the quickstart's world, of one seed after another, in random order."""
    import random

    from make_demo_data import World

    size = 0
    with open(path, "w", encoding="utf-8") as stream:
        for seed in count():
            for text in random.Random(seed).sample(texts := list(World(seed).texts()), len(texts)):
                size += stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n") * 3  # bytes, about
                if size >= 1e6 * megabytes:
                    return


def copy_texts(source: str, target: Path, megabytes: float) -> None:
    """The texts of a JSONL file, its first `megabytes` of them, as plain {"text": ...} lines, for loops that know
    nothing else; of a conversation its messages, of a question its answer, one below the other.

    Lines that are malformed or empty are left out, and counted. Raises UserError where no text is found.
    """
    from text.records import MalformedRecord, find_files, read_lines
    from train_tokenizer import parse_texts

    left_out = written = size = 0
    with open(target, "w", encoding="utf-8") as stream:
        for line in (line for file in find_files(source) for _, line in read_lines(file)):
            try:
                text = "\n".join(parse_texts(line)[1])
            except MalformedRecord:
                text = ""
            if not text.strip():
                left_out += 1
                continue
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written, size = written + 1, size + len(text.encode("utf-8"))
            if size >= 1e6 * megabytes:
                break
    print(f"{source}: {written:,} texts, {size / 1e6:.1f} MB; {left_out:,} malformed or empty lines left out")
    if not written:
        raise UserError(f"--data_path {source}: no text in it")


def train_a_tokenizer(data_path: str, folder: Path, preset: str) -> str:
    """A tokenizer trained on the data, with the vocabulary of a preset; its path. Raises UserError."""
    path = str(folder / "tokenizer")
    try:
        run_script("train_tokenizer.py", "--data_path", data_path, "--tokenizer_path", path,
                   "--vocab_size", str(LLMConfig.preset(preset).vocab_size))
    except UserError as error:
        raise UserError(f"no tokenizer can be trained on this, --tokenizer_path has to name one ({error})") from None
    return path


def to_transformers(model):
    """transformers' model with the same weights, which have the same names: a Llama or, with qk_norm, a Qwen3."""
    import transformers

    config = model.config
    name = "Qwen3" if config.qk_norm else "Llama"
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(
        vocab_size=config.vocab_size, hidden_size=config.dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
        intermediate_size=config.hidden_dim, max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}))
    theirs.load_state_dict(model.state_dict())
    return theirs


def print_row(cells: list[str], widths: list[int]) -> None:
    """One row of a Markdown table, shown at once: an interrupted benchmark loses no finished row."""
    print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |", flush=True)


def print_head(head: list[str], widths: list[int]) -> None:
    """The first two rows of a Markdown table."""
    print_row(head, widths)
    print_row(["-" * width for width in widths], widths)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, its columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print_head(head, widths)
    for row in rows:
        print_row(row, widths)


def print_result(result: dict) -> None:
    """The end of a benchmark: its ratios, and one JSON object on the last line."""
    for name, value in result["ratios"].items():
        print(f"{name}: {value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})")
    print(json.dumps(result, ensure_ascii=False), flush=True)


def end(result: dict, work: Callable[[dict], None]) -> int:
    """Run `work`, which fills `result`, and print what is there, even if interrupted. Returns the exit code: of the
    programs that failed, only ours makes it 1."""
    code = 0
    try:
        work(result)
    except KeyboardInterrupt:
        result["interrupted"], code = True, 130
    except RuntimeError as error:  # e.g. the programs do not do the same work
        result["failed"] = str(error)
        print_result(result)
        raise
    if code == 0 and any(name.startswith("ours") for name in result["failures"]):
        code = 1
    print_result(result)
    return code
