"""Profile of an optimizer step: the time of each operation on the CPU and on the GPU.

    python benchmarks/step_profile.py --preset weakwater-30m --rows 8
    python benchmarks/step_profile.py --rows 32 --compile --device cuda

The step is that of "ours, Muon" in `train_throughput.py`: full rows, forward, backward, clip, Muon and AdamW. "host ms"
is the time of an operation on the CPU, without the operations that it calls; with a GPU this is the launch time.
"device ms" is the time of its kernels on the GPU. Times are per step, averaged over --repeats steps under torch's
profiler. The profiler adds time, so the step time without it is printed too. If the sum of device times is well below
the step time, the GPU waits for the CPU, and more rows per step help.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.measure import large_matmul, make_parser, print_result, print_table, take_turns, warn_of_load
from benchmarks.train_throughput import Ours, make_rows
from common import exits, runtime
from Config import LLMConfig, number

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def profile(step, repeats: int, on_gpu: bool) -> tuple[list[list], float, float]:
    """(rows of [operation, calls, host ms, device ms], slowest first; total device ms; kernel launches), per step."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            step()
    rows, device_ms, launches = [], 0.0, 0.0
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel, whose time is also in its operation's row
            if not event.is_user_annotation:  # the optimizers' annotations span kernels that are already counted
                device_ms += event.self_device_time_total / 1000 / repeats
            continue
        launches += event.count / repeats if event.key in LAUNCHES else 0
        rows.append([event.key, event.count / repeats, event.self_cpu_time_total / 1000 / repeats,
                     event.self_device_time_total / 1000 / repeats])
    return sorted(rows, key=lambda row: -max(row[2:])), device_ms, launches


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=number(int, 1), default=8, help="rows per step (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=number(int, 2), default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--plain", action="store_true", help="compute as in model.py, without fastpath/")
    parser.add_argument("--top", type=number(int, 1), default=24, help="operations shown (default: %(default)s)")
    args = parser.parse_args()
    warn_of_load()
    device, _ = runtime.pick_device(args.device)
    dtype, _ = runtime.pick_dtype("auto", device)
    print(f"{runtime.describe_machine(device)}; {args.preset}, {args.rows} x {args.max_seq_len} tokens, {dtype}",
          flush=True)
    runtime.prepare(device, 0, False)
    config = LLMConfig.preset(args.preset).for_run(args.max_seq_len, dropout=0.0)
    loop = Ours(config, device, dtype, args.rows * args.max_seq_len, "muon", args.compile, args.plain)
    documents = make_rows(np.random.default_rng(0), config.vocab_size, args.rows, args.max_seq_len)
    matmul, flops = large_matmul(device, runtime.DTYPES[dtype])
    for _ in range(2):
        loop.step(documents)
    seconds = take_turns({"step": lambda: loop.step(documents), "matmul": matmul}, args.repeats)
    rows, device_ms, launches = profile(lambda: loop.step(documents), args.repeats, device.type == "cuda")
    step_ms, peak = 1000 * statistics.median(seconds["step"]), flops / statistics.median(seconds["matmul"])
    print_table(["operation", "calls", "host ms", "device ms"],
                [[name[:60], f"{calls:,.0f}", f"{host:,.2f}", f"{on_device:,.2f}" if on_device else ""]
                 for name, calls, host, on_device in rows[:args.top]])
    tokens = args.rows * args.max_seq_len
    needed_ms = 1000 * tokens * loop.model.flops_per_token(args.max_seq_len) / peak
    print(f"a step without the profiler: {step_ms:,.1f} ms ({1000 * min(seconds['step']):,.1f} to "
          f"{1000 * max(seconds['step']):,.1f}); its FLOPs at the rate of large matmuls, {peak / 1e12:.2f} TFLOP/s: "
          f"{needed_ms:,.1f} ms" + (f"; kernels: {device_ms:,.1f} ms, {launches:,.0f} launches" if launches else ""))
    print_result({"ratios": {}, "machine": runtime.describe_machine(device), "preset": args.preset,
                  "step_ms": [1000 * s for s in seconds["step"]], "peak_flops": peak, "device_ms": device_ms,
                  "launches": launches, "operations": [row for row in rows if max(row[2:]) > 0.001]})


if __name__ == "__main__":
    sys.exit(exits.run(main))
