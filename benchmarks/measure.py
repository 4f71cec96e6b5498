"""Shared by the benchmarks: programs in separate processes, measurement in turns (A B, B A, …), ratios with median and
range, the peak rate of the machine, input data, tables.

torch is imported inside functions, because a process that measures the memory of tokenizer training must not load it.
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
WORKER_TIMEOUT = 600  # seconds per call: longer than any step or compilation, so only a hang reaches it


def make_parser(description: str, preset_help: str = "(default: %(default)s)") -> OneLineParser:
    """A parser with the flags that all benchmarks have."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="weakwater-30m", choices=tuple(PRESETS), help=preset_help)
    parser.add_argument("--repeats", type=number(int, 1), default=5, help="measured turns (default: %(default)s)")
    return parser


def warn_of_load() -> None:
    """Print a warning if other work has run on this machine in the last minute."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if load > 0.5:
        print(f"warning: the load of this machine was {load:.1f} in the last minute; other work slows the loops by "
              "different factors", file=sys.stderr)


class WorkerFailed(RuntimeError):
    """A worker's program raised, crashed or did not answer. The message is short, since it becomes a table cell."""


class Worker:
    """A program in a separate process, e.g. one decoder. If it crashes, the benchmark continues without it.

    `make(*args)` builds the program in the new process. Calls are sent over a pipe, one at a time. `seconds` is the
    duration of the last call, measured in that process. After a failure every call raises WorkerFailed.
    """

    def __init__(self, make: Callable, *args):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, time.time(), make, args), daemon=True)
        self.process.start()
        theirs.close()  # with a copy open here, a crash would not close the pipe
        self.failure: str | None = None
        self.seconds = 0.0
        self.ready = False

    def __call__(self, *args):
        return self.call("__call__", *args)

    def call(self, method: str, *args, timeout: float = WORKER_TIMEOUT):
        """Call a method of the program and return its result. Raises WorkerFailed."""
        if not self.ready:  # not awaited in __init__, so that several workers build their programs in parallel
            self._receive(timeout)
            self.ready = True
        try:
            self.pipe.send((method, args))
        except OSError:  # the process crashed between two calls; _receive finds the reason
            pass
        result, self.seconds = self._receive(timeout)
        return result

    def time(self, method: str, *args) -> float:
        """Call a method of the program and return its duration in seconds. Raises WorkerFailed."""
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
        """End the process, which frees its memory."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe, started: float, make: Callable, args: tuple) -> None:
    """Main function of the worker process: build the program, then answer calls until one fails or the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the benchmark ends its workers
    os.dup2(2, 1)  # stdout to stderr: the last line on the benchmark's stdout must be its JSON object
    os.environ["BENCHMARK_START"] = str(started)
    method, program = None, None
    while True:
        try:
            begin = time.perf_counter()
            if method is None:
                result, program = None, make(*args)
            else:
                result = getattr(program, method)(*args)
            wait_for_device()  # no work may remain on the GPU while another worker is measured
            answer = result, time.perf_counter() - begin, None
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:100]
            answer = None, 0.0, f"failed: {type(error).__name__}: {reason}".rstrip(": ")
            traceback.print_exc()
        try:
            pipe.send(answer)
            if answer[2]:  # after an exception the state of the program is unknown
                return
            method, args = pipe.recv()
        except (EOFError, OSError):
            return


def close_all(workers: dict[str, Worker]) -> None:
    """End the processes of the workers."""
    for worker in workers.values():
        worker.close()


def failures(workers: dict[str, Worker]) -> dict[str, str]:
    """The failure message of each failed worker, by name."""
    return {name: worker.failure for name, worker in workers.items() if worker.failure}


def take_turns(work: dict[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each function in `work`, run `repeats` times in turns after one warm-up turn that is not counted.

    A function that measures itself returns its seconds as a float. A function that raises WorkerFailed is not called
    again and is absent from the result.

    The speed of a shared machine drifts. In turns all functions see the same drift, so their ratios stay stable. The
    order rotates from turn to turn, because the first function may pay for what the others reuse, e.g. memory.
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
    """The results of each function in `work`, run `repeats` times in turns after a warm-up turn."""
    results = {name: [] for name in work}
    take_turns({name: lambda name=name, do=do: results[name].append(do()) for name, do in work.items()}, repeats)
    return {name: done[1:] for name, done in results.items()}


def run_script(script: str, *flags: str) -> None:
    """Run one of the project's scripts. Raises UserError with its stderr when it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, encoding="utf-8",
                          errors="replace")
    if done.returncode:
        raise UserError(f"{script}: {done.stderr.strip()}")


def alone(benchmark: str, name: str, **flags) -> dict:
    """Run `benchmark --alone name` with these flags in a separate process. Returns the JSON object on its last line."""
    command = [sys.executable, benchmark, "--alone", name]
    for flag, value in flags.items():
        if value is not False:
            command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace",
                          env=os.environ | {"BENCHMARK_START": str(time.time())})
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def seconds_since_start() -> float:
    """Seconds since this process was started by `alone` or Worker."""
    return time.time() - float(os.environ["BENCHMARK_START"])


def wait_for_device() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch and torch.backends.mps.is_available():
        torch.mps.synchronize()


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """The ratio of `slow` to `fast` within each turn: {"median", "min", "max"}."""
    turns = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(turns), "min": min(turns), "max": max(turns)}


def large_matmul(device, dtype) -> tuple[Callable[[], None], int]:
    """(a function that runs large square matmuls, its FLOPs). Timed in turns with a training step, it gives the peak
    rate of the machine at that moment."""
    import torch

    n, times = (8192, 4) if device.type == "cuda" else (2048, 8)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def matmul() -> None:
        for _ in range(times):
            a @ b

    return matmul, 2 * n**3 * times


def peak_mebibytes(device=None) -> float:
    """Peak memory of this process in MiB: of its tensors on a GPU, else resident memory."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the parent process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    import resource  # does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def middle(runs: list[dict], key: str) -> float:
    """The median of `key` over the turns."""
    return statistics.median(run[key] for run in runs)


def sample_records(source: str, target: Path, kind: str, count: int, seed: int) -> None:
    """Write a plain JSONL file of `count` lines, sampled uniformly from `source` (Vitter 1985, algorithm R).

    Lines that are not records of `kind` ("text" or "chat") are skipped and counted. Raises UserError if none is left.
    """
    import random

    from text.records import MalformedRecord, parse_record, read_lines
    from text.sources import find_files

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
    print(f"{source}: {len(kept):,} of {seen:,} lines sampled; {len(kept) - written:,} malformed ones skipped")
    if not written:
        raise UserError(f"--data_path {source}: has no {kind} record")


def make_corpus(path: Path, megabytes: float) -> None:
    """Write about `megabytes` of generated text: the quickstart's world with seeds 0, 1, …, each in random order."""
    from make_demo_data import World

    size = 0
    with open(path, "w", encoding="utf-8") as stream:
        for seed in count():
            world = World(seed)
            texts = [*world.texts_of_the_world(share=1), *world.other_texts(share=1)]
            for text in world.rng.sample(texts, len(texts)):
                size += stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n") * 3  # about 3 bytes each
                if size >= 1e6 * megabytes:
                    return


def copy_texts(source: str, target: Path, megabytes: float) -> None:
    """Copy the first `megabytes` of text in a JSONL file as {"text": ...} lines, the only format that all loops read.

    The messages of a conversation, or a question and its answer, become one text with line breaks between them.
    Malformed and empty lines are skipped and counted. Raises UserError if there is no text.
    """
    from text.records import MalformedRecord, read_lines
    from text.sources import find_files
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
    print(f"{source}: {written:,} texts, {size / 1e6:.1f} MB; {left_out:,} malformed or empty lines skipped")
    if not written:
        raise UserError(f"--data_path {source}: has no text")


def train_a_tokenizer(data_path: str, folder: Path, preset: str) -> str:
    """Train a tokenizer on the data with the vocabulary size of a preset. Returns its path. Raises UserError."""
    path = str(folder / "tokenizer")
    try:
        run_script("train_tokenizer.py", "--data_path", data_path, "--tokenizer_path", path,
                   "--vocab_size", str(LLMConfig.preset(preset).vocab_size))
    except UserError as error:
        raise UserError(f"no tokenizer can be trained on this data; name one with --tokenizer_path ({error})") from None
    return path


def print_row(cells: list[str], widths: list[int]) -> None:
    """Print one row of a Markdown table and flush it, so that an interrupted benchmark loses no finished row."""
    print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |", flush=True)


def print_head(head: list[str], widths: list[int]) -> None:
    """Print the first two rows of a Markdown table."""
    print_row(head, widths)
    print_row(["-" * width for width in widths], widths)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print_head(head, widths)
    for row in rows:
        print_row(row, widths)


def print_result(result: dict) -> None:
    """Print the ratios, then the whole result as one JSON object on the last line."""
    for name, value in result["ratios"].items():
        print(f"{name}: {value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})")
    print(json.dumps(result, ensure_ascii=False), flush=True)


def end(result: dict, work: Callable[[dict], None]) -> int:
    """Run `work`, which fills `result`, and print the result, even after an interrupt.

    Returns the exit code: 130 after an interrupt, 1 if one of our programs failed. Failures of other programs do not
    count.
    """
    code = 0
    try:
        work(result)
    except KeyboardInterrupt:
        result["interrupted"], code = True, 130
    except RuntimeError as error:  # e.g. the programs do different work
        result["failed"] = str(error)
        print_result(result)
        raise
    if code == 0 and any(name.startswith("ours") for name in result["failures"]):
        code = 1
    print_result(result)
    return code
