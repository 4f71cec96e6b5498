"""common/runtime.py: devices and memory. Also when the state is saved, copies to the device, and the dtype of Muon."""

import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train

from common import optim, run_state, runtime
from Config import LLMConfig, UserError
from dataset import MicroBatch, StepLoader
from model import WeakWater


@pytest.mark.parametrize("cuda, says", [
    (None, "pip install --force-reinstall torch=="), ("13.0", "cannot start CUDA 13.0")])
def test_a_gpu_that_torch_cannot_use_is_reported(monkeypatch, cuda, says):
    """torch without CUDA, or an old driver: otherwise training on the CPU could go unnoticed for hours."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(runtime.os.path, "exists", lambda path: path == "/dev/nvidia0")
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    device, reason = runtime.pick_device("auto")
    assert device.type == "cpu" and "a GPU is here" in reason and says in reason and "\n" not in reason
    with pytest.raises(UserError, match="a GPU is here"):
        runtime.pick_device("cuda")
    with monkeypatch.context() as hidden:  # the user's own choice is not an error
        hidden.setenv("CUDA_VISIBLE_DEVICES", "")
        assert "GPU" not in runtime.pick_device("auto")[1]
    monkeypatch.setattr(runtime.os.path, "exists", lambda path: False)
    assert "GPU" not in runtime.pick_device("auto")[1]
    with pytest.raises(UserError, match="not available"):
        runtime.pick_device("cuda")


def test_describe_machine_names_the_processor():
    said = runtime.describe_machine(torch.device("cpu"))
    assert f"torch {torch.__version__}" in said and "\n" not in said
    info = Path("/proc/cpuinfo")
    if info.exists() and "model name" in (text := info.read_text()):
        assert text.split("model name")[1].splitlines()[0].split(":")[1].strip() in said


# ---------------------------------------------------------------------------------------------
# out of memory


def advice_of(error, device="cpu", tokens=10**9, **settings) -> str:
    """The message when `error` ends a training loop over `tokens` tokens."""
    args = types.SimpleNamespace(**dict(batch_size=32, accumulation_steps=1, max_seq_len=16,
                                        gradient_checkpointing=False) | settings)
    net = WeakWater(LLMConfig.preset("nano", vocab_size=97))
    with pytest.raises(UserError) as raised:
        with runtime.BatchSizeAdvice(args, net, torch.device(device), "fp32", tokens):
            raise error
    assert f"out of memory at --batch_size {args.batch_size}: " in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("rows, accumulation_steps, bytes_free, advice", [
    (32, 1, 18e6, "--batch_size 16 --accumulation_steps 2 should fit"),  # 17 rows fit; 16 divide the step
    (32, 1, 40e6, "--batch_size 16 --accumulation_steps 2 should fit"),  # never the number that just failed
    (30, 2, 10.5e6, "--batch_size 6 --accumulation_steps 10 should fit"),
    (32, 1, 0.5e6, "--gradient_checkpointing needs less; so does a shorter --max_seq_len")])
def test_a_batch_size_that_fits(monkeypatch, rows, accumulation_steps, bytes_free, advice):
    """On a GPU: free memory minus weights, gradients and optimizer state, divided by the measured need per row; one
    row less, since a buffer of chats may hold one more."""
    monkeypatch.setattr(runtime.BatchSizeAdvice, "peak_bytes", lambda self, rows: 5e6 + rows * 1e6)
    fixed = 4 * 4 * sum(WeakWater(LLMConfig.preset("nano", vocab_size=97)).num_parameters().values())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((bytes_free + fixed) / 0.9, 1e12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    said = advice_of(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "cuda", batch_size=rows,
                     accumulation_steps=accumulation_steps)
    assert advice in said and "(CUDA out of memory. Tried)" in said, said
    assert ("should fit" in said) == ("should fit" in advice)


@pytest.mark.parametrize("message", [
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "MPS backend out of memory (MPS allocated",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
def test_without_a_measurement_half_is_suggested(message):
    """On a CPU and on MPS, for every form of an out-of-memory error."""
    said = advice_of(RuntimeError(message), gradient_checkpointing=True)
    assert "--batch_size 16 --accumulation_steps 2 needs less" in said and "--gradient_checkpointing" not in said


def test_rows_without_data_are_not_counted():
    """The data fills 100 of 20,000 rows: the advice is half of 100."""
    said = advice_of(RuntimeError("can't allocate memory"), batch_size=20_000, tokens=16 * 100 - 5)
    assert "--batch_size 50 --accumulation_steps 400 needs less" in said


def test_the_measurement_runs_out_of_memory(monkeypatch):
    """The message then does not claim that anything fits."""
    def full(self, rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runtime.BatchSizeAdvice, "peak_bytes", full)
    said = advice_of(torch.OutOfMemoryError("CUDA out of memory"), "cuda")
    assert "--batch_size 16 --accumulation_steps 2 needs less" in said and "fit" not in said


def test_other_errors_are_not_changed():
    args = types.SimpleNamespace(batch_size=32, max_seq_len=16)
    with pytest.raises(RuntimeError, match="shapes"):
        with runtime.BatchSizeAdvice(args, None, torch.device("cpu"), "fp32", 1000):
            raise RuntimeError("shapes do not fit")


def test_a_stage_out_of_memory(text_file, tokenizer_dir, tmp_path, monkeypatch):
    """The stage scripts give the advice."""
    def full(self, *inputs, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(WeakWater, "forward", full)
    with pytest.raises(UserError, match="at --batch_size 4: --batch_size 2 --accumulation_steps 2"):
        train("pretrain", text_file, tokenizer_dir, tmp_path, preset="nano", batch_size=4)


# ---------------------------------------------------------------------------------------------
# saving


def test_when_the_state_is_saved(monkeypatch):
    """At --save_interval; by default every 500 steps, but at most once a minute."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    asked, default = run_state.SaveSchedule(3), run_state.SaveSchedule(None)
    assert [step for step in range(1, 10) if asked.is_due(step)] == [3, 6, 9]
    saved = []
    for step in range(1, 20_001):  # of 9.9 ms
        clock[0] += 0.0099
        if default.is_due(step):
            saved.append(step)
            default.mark_saved()
    assert saved == [6500, 13000, 19500]
    clock[0] += 1000
    assert not default.is_due(20_001) and default.is_due(20_500)  # of steps of seconds, each 500th


def test_a_short_run_saves_only_at_its_end(text_file, tokenizer_dir, tmp_path, monkeypatch):
    """Without --save_interval, a run shorter than a minute saves one state; with it, the state at every interval."""
    is_due = run_state.SaveSchedule.is_due
    monkeypatch.setattr(run_state.SaveSchedule, "is_due",
                        lambda self, step: is_due(self, step * 500 if self.least_seconds else step))
    seen, save = [], run_state.save_state
    monkeypatch.setattr(run_state, "save_state",
                        lambda state, *where: seen.append(state["step"]) or save(state, *where))
    flags = dict(preset="nano", batch_size=4, max_steps=5, epochs=9, eval_interval=0)
    train("pretrain", text_file, tokenizer_dir, tmp_path / "a", **flags)
    assert seen == [5]
    train("pretrain", text_file, tokenizer_dir, tmp_path / "b", save_interval=2, **flags)
    assert seen == [5, 2, 4, 5]


# ---------------------------------------------------------------------------------------------
# steps


@pytest.mark.parametrize("device, pinned", [("mps", False), ("cuda", True)])
def test_only_pinned_memory_is_copied_asynchronously(monkeypatch, device, pinned):
    """Other memory is freed at once, so an asynchronous copy could read what is written there later."""
    batch, copies = MicroBatch(np.zeros(3), [3], np.zeros(2), np.zeros(2), np.zeros(2)), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone().fill_(7))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, where, non_blocking: copies.append(
        (where, non_blocking, bool((self == 7).all()))) or self)
    batch.to(device)
    assert copies == [(device, pinned, pinned)] * 5


def test_an_epoch_is_planned_once(data_dir, tokenizer_dir, cache_dir, tmp_path, monkeypatch):
    """The next step is loaded before the log line of the current one, which must not plan the epoch again."""
    planned, plan = [], StepLoader._plan_epoch
    monkeypatch.setattr(StepLoader, "_plan_epoch",
                        lambda self, passes: planned.append(self._epoch) or plan(self, passes))
    flags = dict(cache_dir=cache_dir, preset="nano", batch_size=4, epochs=3, eval_interval=0, init_from="none")
    rows = train("SFT", data_dir / "sft.jsonl", tokenizer_dir, tmp_path, **flags)
    assert {row["epoch"] for row in rows} == {1, 2, 3}
    assert planned == [0, 1, 2, 0, 1, 2], planned  # once to count the steps, once to take them


def test_the_loop_trains_on_the_steps_of_the_loader(text_file, tokenizer_dir, tmp_path, monkeypatch):
    """Each step trains on the rows of its number, also across the end of an epoch."""
    asked, trained = [], []
    step = StepLoader.step
    monkeypatch.setattr(StepLoader, "step",
                        lambda self, *place: asked.append((place, step(self, *place))) or asked[-1][1])
    forward = WeakWater.forward
    monkeypatch.setattr(WeakWater, "forward", lambda self, tokens, *rest, **named: (
        trained.append(tokens.flatten().tolist()) if self.training and self.config.vocab_size == 800  # not the twin
        else None) or forward(self, tokens, *rest, **named))
    train("pretrain", text_file, tokenizer_dir, tmp_path, preset="nano", batch_size=4, epochs=2, eval_interval=0)
    assert [place for place, _ in asked] == sorted({place for place, _ in asked}), "each once and in order"
    assert {epoch for (epoch, _), _ in asked} == {0, 1}
    batches = [batch.tokens.tolist() for _, made in asked for batch in made.micro_batches]
    assert [tokens[:len(batch)] for tokens, batch in zip(trained, batches, strict=True)] == batches


# ---------------------------------------------------------------------------------------------
# the dtype of Muon


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
def test_newton_schulz_in_half_precision(monkeypatch, size):
    """GPUs before Ampere lack fast bfloat16. float16 gives the same as float32, also for gradients that are too small
    for float16, as those of queries are at the start."""
    torch.manual_seed(0)
    matrices = torch.randn(2, 48, 96)
    coefficients, results = (3.4445, -4.7750, 2.0315), {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        monkeypatch.setattr(optim, "matmul_dtype", lambda device, dtype=dtype: dtype)
        results[dtype] = optim.newton_schulz(matrices * size, coefficients, 5, 1e-7).float()
    exact = results[torch.float32]
    singular = torch.linalg.svdvals(exact)
    assert singular.min() > 0.5 and singular.max() < 1.3
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
        assert (results[dtype] - exact).norm() <= tolerance * exact.norm(), dtype
