"""The machine and the process: device, precision, seed, processes, compilation, signals."""

import contextlib
import ctypes
import logging
import os
import platform
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common.exits import TrainingStopped, out_of_memory
from Config import UserError
from fastpath import DTYPES
from fastpath.native import cpu_flags

# read once, at the process's first matrix product on a GPU, and needed there for --deterministic
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# ---------------------------------------------------------------------------------------------
# device and precision


def pick_device(name: str) -> tuple[torch.device, str]:
    """The device for --device and the reason for it. Raises UserError when it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
        reason = "the first of cuda, mps, cpu that is here" + (f"; {why}" if (why := unusable_gpu_reason()) else "")
    else:
        if not available[name]:
            why = unusable_gpu_reason() if name == "cuda" else None
            raise UserError(f"--device {name}: {why or 'not available on this machine'}")
        reason = "as asked"
    if name == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise UserError(f"process {index} has no GPU: {torch.cuda.device_count()} here")
        torch.cuda.set_device(index)
        return torch.device("cuda", index), f"{torch.cuda.get_device_name(index)}, {reason}"
    return torch.device(name), reason


def unusable_gpu_reason() -> str | None:
    """What to do if the machine has an NVIDIA GPU that this torch cannot use, else None."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # by the user
    present = os.path.exists("/dev/nvidia0") or (os.name == "nt" or os.path.exists("/dev/dxg")) and (  # dxg: WSL
        shutil.which("nvidia-smi"))
    if hidden or not present or torch.cuda.is_available():
        return None
    if torch.version.cuda:
        return (f"a GPU is here, but torch {torch.__version__} cannot start CUDA {torch.version.cuda}: the driver is "
                "too old for it, or this process may not use the GPU (nvidia-smi shows the driver; "
                "pytorch.org/get-started has torch for older ones)")
    version = torch.__version__.partition("+")[0]
    return (f"a GPU is here, but torch {torch.__version__} was built without CUDA: pip install --force-reinstall "
            f"torch=={version} (Windows: the command on pytorch.org/get-started)")


def pick_dtype(name: str, device: torch.device) -> tuple[str, str]:
    """("bf16" | "fp16" | "fp32", the reason for it) for --dtype on a device."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU has it"
        return "fp16", "the GPU has no bf16"
    if device.type == "cpu":
        fast = cpu_flags() & {"avx512_bf16", "amx_bf16"}
        if fast:
            return "bf16", f"the CPU has {' and '.join(sorted(fast)).upper()}"
        return "fp32", "the CPU has neither AVX512_BF16 nor AMX"
    return "fp32", "the safe choice on this device"


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the kernel, which would map and clear it again in every
    training step on a CPU. No effect elsewhere."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)


def autocast(device: torch.device, dtype: str):
    """Context in which matrix products run in `dtype`; weights stay float32."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[dtype])


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Dense matrix FLOP/s of known GPUs in half precision (NVIDIA's data sheets), else None."""
    if device.type != "cuda" or dtype == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    known = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
             "RTX 4090": 165.2e12, "RTX 3090": 71e12, "A10": 125e12, "T4": 65e12}
    return next((peak for part, peak in known.items() if re.search(rf"\b{part}\b(?! (Laptop|D\b))", name)), None)


def set_up(args, ranks: "Distributed") -> tuple[torch.device, str, list[str]]:
    """Choose device and dtype, join the other processes, and seed. Returns (device, dtype, lines for the log)."""
    device, device_reason = pick_device(args.device)
    dtype, dtype_reason = pick_dtype(args.dtype, device)
    ranks.start(device)
    prepare(device, args.seed, args.deterministic)
    return device, dtype, [args.command, describe_machine(device), f"device {device}: {device_reason}",
                           f"dtype {dtype}: {dtype_reason}"]


def prepare(device: torch.device, seed: int, deterministic: bool) -> None:
    """Seed torch and, if asked, allow deterministic kernels only; on a CPU, keep freed memory."""
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass adds in no fixed order
        torch.backends.cuda.enable_cudnn_sdp(False)  # nor does this one


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one optimizer step on one rank: resuming then needs no generator's state."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank & 0x7FFF_FFFF_FFFF_FFFF)


def compile_trouble(device: torch.device) -> str | None:
    """Why torch.compile does not work on this machine; None where it does."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton: it has many ways to show
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"torch.compile does not work on this machine ({reason[:120]})"
    return None


def compile_blocks(model, device: torch.device, say: Callable[[str], None] = print) -> str:
    """torch.compile each block in place (names in the state dict stay), or say why that cannot be done. `say` gets a
    line, later, where torch gives up compiling a block."""
    trouble = compile_trouble(device)
    if trouble:
        return f"off: {trouble}; continuing without it"
    CompileFallbackHandler.start(say)
    for block in model.model.layers:
        block.compile(dynamic=True)  # lengths differ in every buffer
    return f"each of {len(model.model.layers)} blocks, on first use"


class CompileFallbackHandler(logging.Handler):
    """Says in the run's log that torch hit its recompile limit, which torch says on the console only."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self.say = say

    @classmethod
    def start(cls, say: Callable[[str], None]) -> None:
        """Listen from now on, in place of an earlier run of this process."""
        logger = logging.getLogger("torch._dynamo.convert_frame")
        for handler in [h for h in logger.handlers if isinstance(h, cls)]:
            logger.removeHandler(handler)
        logger.addHandler(cls(say))

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on torch's first line."""
        message = record.getMessage()
        if "recompile_limit" in message or "cache_size_limit" in message:
            try:
                self.say(f"compile: torch hit its recompile limit; this block now runs eagerly, slower: "
                         f"{message.splitlines()[0]}")
            except Exception:  # a log that cannot be written must not stop torch here
                self.handleError(record)


def describe_machine(device: torch.device) -> str:
    """One line for logs and above tables: software, device, threads, the model of the CPU and of the GPU."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.M) if info.exists() else None
    # a virtual machine often hides the model: these flags, on which speed in bf16 depends, tell more
    flags = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    processor = (model[1] if model else platform.processor() or platform.machine()) + (
        f" ({' '.join(flags)})" if flags else "")
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} "
            f"{platform.machine()}, device {device}, {torch.get_num_threads()} threads, {processor}{gpu}")


class BatchSizeAdvice:
    """Context of a training loop: out of memory in it becomes a UserError that suggests a --batch_size, with as many
    rows in a step."""

    def __init__(self, args, net, device: torch.device, dtype: str, tokens_per_epoch: int):
        self.args, self.net, self.device, self.dtype = args, net, device, dtype
        self.rows = min(args.batch_size, -(-tokens_per_epoch // args.max_seq_len))  # little data may not fill them

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if (reason := out_of_memory(error)) is None:
            return
        traceback.clear_frames(trace)  # they hold the tensors that did not fit
        args, rows = self.args, self.args.batch_size * self.args.accumulation_steps
        measured = self.rows_that_fit()
        limit = min(self.rows - 1, self.rows // 2 if measured is None else measured)
        fits = next((n for n in range(limit, 0, -1) if rows % n == 0), None)
        advice = []
        if fits:
            advice.append(f"--batch_size {fits} --accumulation_steps {rows // fits} "
                          f"{'needs less' if measured is None else 'should fit'}, with the same steps but for rounding "
                          "(a run that has saved a state must start again in another --out_dir)")
        if not args.gradient_checkpointing:
            advice.append("--gradient_checkpointing needs less")
        advice.append("so does a shorter --max_seq_len")
        raise UserError(f"out of memory at --batch_size {args.batch_size}: {'; '.join(advice)} ({reason})") from None

    def rows_that_fit(self) -> int | None:
        """Rows of a micro-batch that fit on a GPU: the memory of 1 and of 3 rows is measured, and grows linearly
        with the rows. None if it cannot be measured: on a CPU, and with several processes, whose gradients would be
        exchanged."""
        if self.device.type != "cuda" or dist.is_initialized():
            return None
        try:
            self.net.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            few, more = (self.peak_bytes(rows) for rows in (1, 3))
            free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
            # weights, gradients, at most two numbers of optimizer state for each weight
            fixed = 4 * sum(p.numel() * p.element_size() for p in self.net.parameters())
            return int((0.9 * free - fixed) / max(1, (more - few) / 2)) - 1  # a buffer of chats may hold one row more
        except RuntimeError:
            return None

    def peak_bytes(self, rows: int) -> int:
        """The most memory that forward and backward of so many full rows take."""
        length = self.args.max_seq_len
        tokens = torch.zeros(1, rows * length, dtype=torch.int64, device=self.device)
        index = torch.arange(rows * length, device=self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with autocast(self.device, self.dtype):
            loss = self.net(tokens, [length] * rows, target_index=index, targets=tokens[0], weights=index.float())
        loss.backward()
        self.net.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated(self.device)


# ---------------------------------------------------------------------------------------------
# processes


class Distributed:
    """The processes of one run: one, or those that torchrun started."""

    def __init__(self):
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.is_main = self.rank == 0

    def start(self, device: torch.device) -> None:
        """Join the others: NCCL on CUDA, gloo elsewhere."""
        if self.world_size > 1:
            # long, since the other ranks wait while rank 0 builds the token cache
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
            self.device = device

    def wrap(self, model):
        """The model, or its DistributedDataParallel over all ranks."""
        if self.world_size == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=False)  # the rotary tables are the same everywhere

    def gradient_sync(self, model, now: bool):
        """Context of one micro-batch: gradients are exchanged only with the step's last one."""
        return contextlib.nullcontext() if now or self.world_size == 1 else model.no_sync()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over all ranks."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            self.sum(torch.zeros(1)).item()  # on CUDA only reading the result waits

    @contextlib.contextmanager
    def main_first(self):
        """Rank 0 runs the block first; the others then run it with stdout off."""
        if self.is_main:
            try:
                yield
            finally:
                self.barrier()
        else:
            self.barrier()
            with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
                yield


# ---------------------------------------------------------------------------------------------
# signals


class StopSignal:
    """SIGINT and SIGTERM ask for a stop after the optimizer step under way; a second Ctrl-C stops at once.

    A second SIGTERM does not: schedulers send one to every process, and torchrun passes on its own.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0
        self.before = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.number:
            if number == signal.SIGINT and time.monotonic() - self.since > 1:
                raise KeyboardInterrupt
            return
        self.number, self.since = number, time.monotonic()
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)


def stop_by_signal(number: int, args, done: int) -> None:
    """End a run whose state has just been saved: exit code 130 or 143, and the command that resumes it."""
    number = number or signal.SIGTERM  # 0: it reached another rank only
    command = args.command + ("" if args.resume else " --resume")
    raise TrainingStopped(f"stopped by {signal.Signals(number).name} after step {done}; the state is saved. "
                          f"To resume: {command}", 128 + number)
