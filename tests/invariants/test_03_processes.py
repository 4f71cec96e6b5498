"""Invariant 3 for processes: two processes give the losses and weights of one with the same tokens per step, to float32
rounding; they also stop and resume like one."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_r1, write_jsonl
from faults import ROOT, Ended, bits, course, metrics, start

import dataset

# settings in which only rounding may differ
PLAIN = dict(dtype="fp32", dropout=0, optimizer="adamw", epochs=2, save_interval=3, eval_interval=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir):
    """Uninterrupted runs of all stages. These tests use their weights."""
    runs = course(tmp_path_factory, tokenizer_dir)
    runs.reference("SFT_long")
    return runs


def idle_steps(path: Path, kind: str, tokenizer, cache_dir: Path, rows: int, length: int) -> list[int]:
    """Steps of the first epoch in which the second of two processes has no document, at accumulation 2."""
    train, _ = dataset.load_splits(dataset.find_sources([str(path)]), None, tokenizer, kind, str(cache_dir), length,
                                   say=lambda line: None)
    loader = dataset.StepLoader(train, length, rows, 2, seed=42, rank=1, world_size=2)
    return [number for number in range(loader.steps_in_epoch(0))
            if not sum(batch.weights.sum() for batch in loader.step(0, number).micro_batches)]


@pytest.fixture(scope="module")
def weighted(tmp_path_factory, tokenizer) -> Path:
    """Weighted R1 records, of a number that makes an epoch's last step too small for two processes."""
    folder = tmp_path_factory.mktemp("weighted")
    records = [r | {"weight": [0.5, 1, 3][number % 3]} for number, r in enumerate(make_r1(6, 40, thought=1))]
    for n in range(12, 40):
        path = write_jsonl(folder / f"{n}.jsonl", records[:n])
        if len(steps := idle_steps(path, "chat", tokenizer, folder / "cache", rows=2, length=96)) and steps[-1] > 0:
            return path
    raise AssertionError("with every number of records both processes have documents")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_two(runs, stage: str, out: Path, flags: dict, resume: bool = False, fault: dict | None = None,
            options: tuple[dict, dict] = ({}, {})) -> list[Ended]:
    """Run a stage as two gloo processes, as torchrun would start them. `fault` applies to the first process; `options`
    are the arguments of `faults.start` for each."""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
           "GLOO_SOCKET_IFNAME": "lo"}
    waits = [start(stage, runs.argv(stage, out, resume, **flags), fault if rank == 0 else None,
                   env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options[rank]) for rank in range(2)]
    return [wait() for wait in waits]


def assert_close(one: Path, two: Path, stage: str) -> None:
    """Metrics and weights are equal to rounding."""
    rows, expected = metrics(stage, two), metrics(stage, one)
    assert len(rows) == len(expected) >= 4
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=2e-5), f"{name} of step {row['step']}"
    weights, others = (torch.load(out / f"{stage}.pth", weights_only=True)["model"] for out in (two, one))
    far = sum((weights[name] - others[name]).square().sum() for name in others).sqrt()
    size = sum(tensor.square().sum() for tensor in others.values()).sqrt()
    assert far < 1e-5 * size


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_pretrain_as_one(runs, tmp_path, accumulation):
    flags = PLAIN | dict(accumulation_steps=2 * accumulation)
    assert runs.run("pretrain", tmp_path / "one", resume=False, flags=flags).code == 0
    flags["accumulation_steps"] = accumulation
    ended = run_two(runs, "pretrain", tmp_path / "two", flags)
    assert [e.code for e in ended] == [0, 0], ended
    assert_close(tmp_path / "one", tmp_path / "two", "pretrain")
    assert "2 processes" in ended[0].out and "Epoch:" not in ended[1].out, "only the first process prints"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_distill_as_one_with_masks_and_weights(runs, weighted, tmp_path, accumulation):
    flags = PLAIN | dict(data_path=weighted, cache_dir=tmp_path / "cache", tag_weight=5, think_weight=0.3,
                         max_seq_len=96, batch_size=2, accumulation_steps=2 * accumulation)
    assert runs.run("distill", tmp_path / "one", resume=False, flags=flags).code == 0
    flags["accumulation_steps"] = accumulation
    ended = run_two(runs, "distill", tmp_path / "two", flags)
    assert [e.code for e in ended] == [0, 0], ended
    assert_close(tmp_path / "one", tmp_path / "two", "distill")


def test_some_steps_leave_the_second_process_idle(runs, weighted, tokenizer, tmp_path):
    """The two tests above rely on this."""
    assert idle_steps(runs.data["pretrain"], "text", tokenizer, tmp_path, rows=2, length=16)
    assert idle_steps(weighted, "chat", tokenizer, tmp_path, rows=2, length=96)


def test_two_processes_killed_at_a_save_resume_bit_for_bit(runs, tmp_path):
    flags = PLAIN | dict(dropout=0.1, dtype="bf16")
    ended = run_two(runs, "pretrain", tmp_path / "whole", flags)
    assert [e.code for e in ended] == [0, 0], ended
    first, _ = run_two(runs, "pretrain", tmp_path / "killed", flags, fault={"at": "before sync weights"})
    assert first.code == -signal.SIGKILL
    ended = run_two(runs, "pretrain", tmp_path / "killed", flags, resume=True)
    assert [e.code for e in ended] == [0, 0], ended
    assert "resuming from" in ended[0].out
    whole, killed = (bits(torch.load(tmp_path / name / "pretrain.pth", weights_only=True)["model"])
                     for name in ("whole", "killed"))
    assert whole == killed
    assert metrics("pretrain", tmp_path / "whole") == metrics("pretrain", tmp_path / "killed")
    ended = runs.run("pretrain", tmp_path / "whole", flags=flags)
    assert ended.code == 2 and "the number of processes changed" in ended.one_line, ended


def test_the_first_process_decides_when_to_save(runs, tmp_path):
    """Clocks differ, and all processes take part in a save: the others follow the first."""
    flags = PLAIN | dict(save_interval=None, keep_checkpoints=9)
    ended = run_two(runs, "pretrain", tmp_path / "two", flags, options=({"due": [2, 3]}, {"due": [1, 3]}))
    assert [e.code for e in ended] == [0, 0], ended
    saved = sorted((tmp_path / "two" / "checkpoints" / "pretrain").glob("step_*.pth"))
    last = metrics("pretrain", tmp_path / "two")[-1]["step"]
    assert [int(path.stem.removeprefix("step_")) for path in saved] == [2, 3, last] and last > 3


def test_torchrun_saves_on_sigterm_and_the_printed_command_resumes(runs, tmp_path):
    """With real processes: the state of the last complete step is saved, and the final metrics equal those of a run
    that was never stopped."""
    flags = PLAIN | dict(epochs=40, save_interval=1000, eval_interval=1000)
    command = ["torchrun", "--nproc_per_node", "2", "pretrain.py", *runs.argv("pretrain", tmp_path / "two", **flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo",
                        "MASTER_PORT": str(free_port()), "PET_MASTER_PORT": str(free_port()),
                        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        for line in process.stdout:
            if line.startswith("Epoch:"):
                process.send_signal(signal.SIGTERM)
                break
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    rows = metrics("pretrain", tmp_path / "two")
    saved, = (tmp_path / "two" / "checkpoints" / "pretrain").glob("step_*.pth")
    assert int(saved.stem.removeprefix("step_")) == rows[-1]["step"] < 100, "the last complete step is saved"
    told = [line.split("To resume: ")[1] for line in err.splitlines() if "To resume: " in line]
    assert told and " --nproc_per_node 2 pretrain.py " in told[0], err
    env["PET_MASTER_PORT"] = str(free_port())
    again = subprocess.run(told[0], shell=True, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"resuming from {saved}" in again.stdout
    ended = run_two(runs, "pretrain", tmp_path / "never stopped", flags)
    assert [e.code for e in ended] == [0, 0], ended
    assert metrics("pretrain", tmp_path / "two") == metrics("pretrain", tmp_path / "never stopped")
