"""What only a GPU can show: it computes what the CPU computes. Skipped where there is none.

    python -m pytest tests/gpu                 or -m gpu; about 100 seconds on one H100 with 16 cores

Each check is a process of its own (checks.py), so that a crash costs one check, and all start at once, as many
together as there are cores for: a process takes seconds to import torch and to start CUDA. Each prints one JSON line;
with WEAKWATER_GPU_REPORT=FILE the lines are appended to FILE as the checks end.
WEAKWATER_GPU_TEST_DEVICE=cpu tries the checks themselves on a CPU, but for the variable-length kernel.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

CHECKS_FILE = Path(__file__).with_name("checks.py")
DEVICE = os.environ.get("WEAKWATER_GPU_TEST_DEVICE", "cuda")
PRESETS = ("weakwater-30m", "weakwater-30m-gqa")
SECONDS = 900 if DEVICE == "cpu" else 240  # a check may take

# those that take longest come first
STAGE_CHECKS = ("resume pretrain bf16 --compile", "resume pretrain bf16", "resume pretrain fp16", "resume distill bf16",
                "follows_cpu", "out_of_memory")
CHECKS = (*(f"compiled {preset}" for preset in PRESETS), *STAGE_CHECKS,
          *(f"{name} {preset}" for name in ("losses", "decoding", "varlen", "packing", "transformers_logits")
            for preset in PRESETS if (name, DEVICE) != ("varlen", "cpu")))

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")]


class Runs:
    """The processes of the checks; `result(check)` waits for one."""

    def __init__(self, checks: list[str], folder: Path):
        cores = os.cpu_count() or 1
        workers = max(1, min(8, cores // 2))
        self.folder, self.lock, self.processes = folder, threading.Lock(), []
        # CUBLAS_WORKSPACE_CONFIG: the stages have to set it themselves. The override turns TF32 on in NVIDIA's images.
        self.env = {key: value for key, value in os.environ.items()
                    if key not in ("CUBLAS_WORKSPACE_CONFIG", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")}
        self.env["OMP_NUM_THREADS"] = str(max(1, cores // workers))
        self.pool = ThreadPoolExecutor(workers + 1)  # one more: for the data, on which others wait
        needed = set(checks) & set(STAGE_CHECKS)
        self.data = self.pool.submit(self.run, "make_data") if needed else None
        # checks that need no data come first while it is being made
        self.futures = {check: self.pool.submit(self.run, check) for check in sorted(checks, key=needed.__contains__)}

    def run(self, check: str) -> dict:
        """The JSON object of one check, or one that says how its process ended."""
        if check in STAGE_CHECKS and not self.data.result()["ok"]:
            return {"check": check, "ok": False, "error": "its data was not made", "make_data": self.data.result()}
        process = subprocess.Popen([sys.executable, str(CHECKS_FILE), str(self.folder), *check.split()], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.env, start_new_session=True)
        self.processes.append(process)
        try:
            out, err = process.communicate(timeout=SECONDS)
            problem = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            kill(process)
            (out, err), problem = process.communicate(), f"not done after {SECONDS} s"
        try:
            result = json.loads(out.splitlines()[-1])
        except (IndexError, ValueError):
            result = {"check": check, "ok": False, "error": f"{problem}: {err[-1500:]}"}
        if os.environ.get("WEAKWATER_GPU_REPORT"):
            with self.lock, open(os.environ["WEAKWATER_GPU_REPORT"], "a", encoding="utf-8") as report:
                report.write(json.dumps(result) + "\n")
        return result

    def stop(self) -> None:
        """End what still runs."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            kill(process)


def kill(process: subprocess.Popen) -> None:
    """End a process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory):
    """All checks that were selected, started."""
    selected = [item.callspec.params["check"] for item in request.session.items if "runs" in item.fixturenames]
    runs = Runs([check for check in CHECKS if check in selected], tmp_path_factory.mktemp("gpu"))
    yield runs
    runs.stop()


@pytest.mark.parametrize("check", CHECKS)
def test_check(check, runs, capfd):
    result = runs.futures[check].result()
    with capfd.disabled():  # the numbers are read from the log of a machine that is gone by then
        print(f"\n{json.dumps(result)}", flush=True)
    assert result["ok"], result.get("error")
