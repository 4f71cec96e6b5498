"""runs/gpu.sh from end to end on a CPU: every part's output is there, that of a part killed at its limit too."""

import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT

import make_demo_data
from common.weights import load_model
from experiments import split_weights

SMALL = {"DEVICE": "cpu", "PRESET": "nano", "ROWS": "2", "BIG_ROWS": "4", "PILOT": "4", "REPEATS": "1",
         "SWEEP": "2:4e-3 4:8e-3", "SWEEP_TOKENS": "8192", "RATE": "1024", "PRETRAIN_S": "20", "SFT_S": "8",
         "SFT_LONG_S": "8", "DISTILL_S": "8", "QUESTIONS": "4", "NEW_TOKENS": "8", "MIB": "1", "PYTHON": sys.executable,
         "OMP_NUM_THREADS": "1"}  # threads that wait for each other are slow where other tests run too


@pytest.fixture(scope="module")
def carry(tmp_path_factory):
    """The data folder that runs/gpu.sh reads, from the demo corpus."""
    folder = tmp_path_factory.mktemp("gpu")
    demo, carry = folder / "demo", folder / "carry"
    make_demo_data.main(["--out_dir", str(demo), "--share", "0.02"])
    (carry / "pretrain").mkdir(parents=True)
    chats = (demo / "sft_512.jsonl").read_bytes() + (demo / "sft_1024.jsonl").read_bytes()
    for name, data in {"pretrain/0.jsonl.xz": (demo / "pretrain.jsonl").read_bytes(), "sft.jsonl.xz": chats,
                       "val.jsonl.xz": (demo / "val/pretrain.jsonl").read_bytes(),
                       "r1.jsonl.xz": (demo / "r1_1024.jsonl").read_bytes()}.items():
        (carry / name).write_bytes(lzma.compress(data, preset=0))
    shutil.copy(demo / "eval/one_step.jsonl", carry / "held_out.jsonl")
    # as the head of gpu.sh makes it: with fewer entries the long chats would have more than 1,024 tokens
    subprocess.run([sys.executable, ROOT / "train_tokenizer.py", "--data_path", demo / "pretrain.jsonl", "--vocab_size",
                    "1700", "--single_hanzi", "--tokenizer_path", carry / "tokenizer"], check=True, capture_output=True)
    return carry


def gpu_sh(command: str, carry, out, **settings) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """(how runs/gpu.sh ended, what logs.tgz holds by name)."""
    places = {"CARRY": str(carry), "OUT": str(out), "RUN": f"{out}_run"}
    done = subprocess.run(["bash", str(ROOT / "runs/gpu.sh"), command], capture_output=True, text=True,
                          env=os.environ | SMALL | settings | places)
    with tarfile.open(out / "logs.tgz") as tar:
        return done, {member.name: tar.extractfile(member).read().decode("utf-8", "replace") for member in tar
                      if member.isfile() and not member.name.endswith(".png")}


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs/gpu.sh needs GNU timeout and env")


@pytest.mark.extra
def test_measure_keeps_every_output(carry, tmp_path):
    slow = {f"LIMIT_{name}": "300" for name in (
        "checks", "caches_text", "caches_chat", "sweep_2_4e_3", "sweep_4_8e_3", "sweep", "speed_eager",
        "speed_compiled", "speed_compiled_big", "train_compiled", "decode", "profile")}
    done, logs = gpu_sh("measure", carry, tmp_path / "out", LIMIT_train_eager="3", BUDGET="1200", **slow)
    parts = ["checks", "caches_text", "caches_chat", "sweep_2_4e-3", "sweep_4_8e-3", "sweep", "speed_eager",
             "speed_compiled", "speed_compiled_big", "train_eager", "decode", "profile", "train_compiled"]
    assert {f"{name}.txt" for name in [*parts, "machine"]} <= set(logs), done.stdout
    assert done.returncode == 1 and re.fullmatch(r"train_eager \(exit (124|137)\)\n", logs["failed.txt"]), done.stdout
    assert all(logs[f"{name}.txt"].strip() in done.stdout for name in parts)
    assert all("bits per byte" in logs[f"sweep_{case}.txt"] for case in ("2_4e-3", "4_8e-3"))
    assert "2_4e-3" in logs["sweep.txt"] and "Epoch:" in logs["speed_compiled.txt"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["logs.tgz"]


@pytest.mark.extra
def test_train_keeps_every_output_and_the_weights(carry, tmp_path):
    # pretraining has far more steps than its limit allows: it is interrupted, and the other stages go on from there
    done, logs = gpu_sh("train", carry, tmp_path / "out", PRETRAIN_S="100000", LIMIT_pretrain="40")
    assert done.returncode == 1 and re.fullmatch(r"pretrain \(exit (124|137)\)\n", logs["failed.txt"]), done.stdout
    stages = ("pretrain", "SFT", "SFT_long", "distill")
    assert "stopping after this step" in logs["pretrain.txt"]
    assert {f"train/log/{stage}.log" for stage in stages} <= set(logs)
    assert all("bits per byte" in logs[f"{stage}.txt"] for stage in stages[1:])
    assert "bits per byte" in logs["metrics_pretrain.txt"]
    assert all("exact answers" in logs[f"problems_{stage}.txt"] for stage in stages[2:])
    assert all(logs["train/log/distill.log"].count(f"data: {place}: ") for place in (
        f"{carry}/r1.jsonl.xz", f"{carry}/sft.jsonl.xz", f"{carry}/pretrain"))
    echoes = {echo: logs["answers.txt"].count(f"\n{echo}> ") for echo in ("", "[think] ")}
    assert echoes == {"": 3 * 2 * 10, "[think] ": 2 * 10}
    pieces = sorted(file.name for file in (tmp_path / "out").iterdir() if file.name != "logs.tgz")
    assert pieces == [f"distill.{i}" for i in range(len(pieces))] and pieces
    split_weights.main(["unpack", str(tmp_path / "out/distill"), str(tmp_path / "distill.pth")])
    assert load_model(tmp_path / "distill.pth")[1]["stage"] == "distill"


@pytest.mark.parametrize("settings, says", [
    ({}, "pretrain"), ({"DEVICE": "gpu"}, "must be cuda or cpu"), ({"RUN": "earlier"}, "choose another RUN")])
def test_what_is_missing_is_said_in_one_line(tmp_path, settings, says):
    if settings:
        (tmp_path / "pretrain").mkdir()
        for name in ("val.jsonl.xz", "sft.jsonl.xz", "r1.jsonl.xz", "held_out.jsonl", "tokenizer"):
            (tmp_path / name).touch()
    (tmp_path / "earlier" / "train").mkdir(parents=True)
    env = {name: str(tmp_path / value) if name == "RUN" else value for name, value in settings.items()}
    done = subprocess.run(["bash", str(ROOT / "runs/gpu.sh"), "train"], capture_output=True, text=True,
                          env=os.environ | {"CARRY": str(tmp_path), "OUT": str(tmp_path / "out")} | env)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and says in done.stderr
