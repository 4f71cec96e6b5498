"""Benchmarks at tiny sizes: each ends with one JSON object that holds its ratios, also after a crash or an interrupt.
Also compare_runs.py and the flags of the recipe scripts."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, train, write_jsonl

from benchmarks import decode_throughput as decoding
from benchmarks import step_profile
from benchmarks import train_throughput as benchmark
from benchmarks.measure import Worker, WorkerFailed, copy_texts, end, sample_records, take_turns
from common.weights import save_weights
from Config import CHAT_ONLY, DISTILL_ONLY, FLAGS, LLMConfig, UserError, parse_args
from experiments import compare_runs
from model import WeakWater
from text.sources import kind_of

CPU = torch.device("cpu")

RATIOS = {
    "train_throughput.py --device cpu --rows 8 --max_seq_len 64 --sweep rows": {
        "useful_vs_padded_fp32", "positions_vs_fp32"},
    "train_throughput.py --device cpu --rows 1 --max_seq_len 400 --data_path {chats}": {"useful_vs_padded_fp32"},
    "train_throughput.py --device cpu --rows 1 --max_seq_len 64 --quick": set(),
    "decode_throughput.py --device cpu --prompt_tokens 8 --new_tokens 4 --batch 2": {"batch1_vs_transformers"},
    "decode_throughput.py --device cpu --prompt_tokens 8 --new_tokens 4 --batch 2 --quick": {"batch1_vs_transformers"},
    "data_throughput.py --megabytes 0.1 --batches 3 --max_seq_len 64 --data_path {chats}": {"tokens_vs_getitem"},
    "data_throughput.py --megabytes 0.5 --batches 3": {
        "first_batch_warm_cache_vs_getitem", "tokens_vs_getitem", "memory_as_text_grows"},
    "tokenizer_training.py --megabytes 1": {
        f"plain_over_ours_{what}_{times}x" for what in ("seconds", "mebibytes") for times in (1, 2, 4)},
}


@pytest.mark.extra
@pytest.mark.parametrize("command", RATIOS)
def test_a_benchmark_ends_with_its_ratios(command, data_dir):
    script, *flags = command.format(chats=data_dir / "sft.jsonl").split()
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--preset", "nano", "--repeats", "2",
                           *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert RATIOS[command] <= set(result["ratios"]) and not result.get("failures")
    for value in result["ratios"].values():
        assert 0 < value["min"] <= value["median"] <= value["max"]
    if "--quick" in flags:
        assert "script_to_first_step" not in result and result["ratios"]
    elif script == "train_throughput.py":
        assert len(result["script_to_first_step"]) == 2
        if "--sweep" in flags:
            assert [case["rows"] for case in result["sweep"]] == [2, 4, 16]
            assert all(case["ours"]["peak_mebibytes"] > 100 for case in result["sweep"])


class InProcess:
    """Calls a program as a Worker does, but in this process."""

    def __init__(self, program):
        self.program = program

    def call(self, method: str, *args):
        return getattr(self.program, method)(*args)


def test_a_step_profile(monkeypatch, capsys):
    """The profile contains every part of a step: matmuls, the operations between them, the optimizers."""
    monkeypatch.setattr(sys, "argv", "step_profile.py --preset nano --rows 2 --max_seq_len 64 --repeats 2".split())
    step_profile.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    calls = {name: calls for name, calls, *_ in result["operations"]}
    # two layers of four matmuls, each with one forward and two backward, and three of the output
    assert calls["aten::mm"] == 2 * 4 * 3 + 3
    assert calls["aten::baddbmm"] and calls["aten::_fused_adamw_"] and len(result["step_ms"]) == 2
    assert all(host > 0 for _, _, host, _ in result["operations"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_different_work_is_not_timed(dtype):
    """The loss or the gradient reveals a loop that trains on other targets."""
    args = argparse.Namespace(rows=2, max_seq_len=64, data_path=None, seed=0, repeats=2)
    config = LLMConfig.preset("nano")
    ours = benchmark.Ours(config, CPU, dtype, 128, "adamw", compiled=False)
    theirs = benchmark.Transformers(config, CPU, dtype, 64, compiled=False)
    loops = {"ours": InProcess(ours), "transformers": InProcess(theirs)}
    for draws in benchmark.work_of(args, config).values():
        documents = draws[0]
        benchmark.check_agreement(loops, documents)
    step = ours.step
    ids, is_target = documents[0]
    one_less = [(ids, is_target & (ids != ids[-1])), *documents[1:]]
    ours.step = lambda documents: step(one_less)
    with pytest.raises(RuntimeError, match="not the same work"):
        benchmark.check_agreement(loops, documents)


def test_a_step_of_chats_fills_one_buffer():
    """As in StepLoader: the document that reaches the size of a buffer is the last one in it."""
    ours = benchmark.Ours(LLMConfig.preset("nano"), CPU, "fp32", 100, "adamw", compiled=False)
    for lengths, sizes in (([60, 39, 30], [129]), ([60, 40, 30], [100, 30]), ([150, 50], [150, 50])):
        buffers = ours.micro_batches(benchmark.make_rows(np.random.default_rng(0), 6400, 1, n)[0] for n in lengths)
        assert [len(buffer.tokens) for buffer in buffers] == sizes


@pytest.mark.parametrize("file", ["sft.jsonl", "pretrain.jsonl"])
def test_each_turn_uses_new_documents(data_dir, tokenizer_dir, file):
    """Conversations or texts, cut to the row length; in a conversation only the reply has targets."""
    args = argparse.Namespace(rows=2, max_seq_len=400, data_path=str(data_dir / file), preset="nano", seed=0, repeats=2,
                              tokenizer_path=str(tokenizer_dir))
    draws = benchmark.work_of(args, LLMConfig.preset("nano"))["chats"]
    assert len(draws) == 3
    first = [tuple(ids.tolist()) for ids, _ in draws[0]]
    assert not set(first) & {tuple(ids.tolist()) for ids, _ in draws[1]}
    for documents in draws:
        assert 800 <= sum(len(ids) for ids, _ in documents) < 1200
        assert all(len(ids) <= 400 and len(ids) == len(is_target) and not is_target[0] for ids, is_target in documents)
        share = sum(is_target.sum() for _, is_target in documents) / sum(len(ids) - 1 for ids, _ in documents)
        assert share == 1 if file == "pretrain.jsonl" else 0.1 < share < 0.9


def test_copy_texts(data_dir, tmp_path):
    """Texts and conversations become texts of the requested total size; a file without text is an error."""
    for file in ("pretrain.jsonl", "sft.jsonl"):
        copy_texts(str(data_dir / file), tmp_path / "texts.jsonl", 0.01)
        texts = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
        assert all(set(text) == {"text"} for text in texts)
        assert 10_000 <= sum(len(text["text"].encode()) for text in texts) < 20_000
    assert kind_of([data_dir / "pretrain.jsonl"]) == "text" and kind_of([data_dir / "sft.jsonl"]) == "chat"
    (tmp_path / "none.jsonl").write_text('{"other": 1}\nno JSON\n', encoding="utf-8")
    with pytest.raises(UserError, match="no text"):
        copy_texts(str(tmp_path / "none.jsonl"), tmp_path / "texts.jsonl", 1)


def test_lines_are_sampled_from_the_whole_file(tmp_path):
    path, target = tmp_path / "lines.jsonl", tmp_path / "sample.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(1000)), encoding="utf-8")
    sample_records(str(path), target, "text", 100, seed=1)
    numbers = [int(json.loads(line)["text"]) for line in target.read_text(encoding="utf-8").splitlines()]
    assert len(set(numbers)) == 100 and min(numbers) < 100 and max(numbers) >= 900
    with pytest.raises(UserError, match="no chat record"):
        sample_records(str(path), target, "chat", 100, seed=1)


@pytest.mark.parametrize("preset", ["nano", "qwen3"])
def test_different_decoders_are_detected(preset):
    """Ours equals transformers, for one prompt and for several; a decoder with a wrong token is an error."""
    config = LLMConfig.preset("nano", **({"qk_norm": True, "n_kv_heads": 1} if preset == "qwen3" else {}))
    model = decoding.make_model(config, CPU)
    decoders = {"ours": decoding.Ours(model, CPU, "fp32"), "transformers": decoding.Transformers(model, CPU, "fp32")}
    prompts = torch.randint(0, 6400, (3, 8)).tolist()
    replies = decoding.check_equal(decoders, prompts, 12)
    shares = decoding.check_found(decoders, prompts, replies)
    assert len(shares) == 4 and set(shares.values()) == {1}
    wrong = {"ours": lambda call, n, sampled: [ids[:-1] + [ids[-1] ^ 1] for ids in decoders["ours"](call, n, sampled)],
             "transformers": decoders["transformers"]}
    with pytest.raises(RuntimeError, match="token 12 is not ours"):
        decoding.check_equal(wrong, prompts, 12)
    with pytest.raises(RuntimeError, match="ours, 1 at once, finds"):
        decoding.check_found(wrong, prompts, replies)


@pytest.mark.parametrize("warm_up", [True, False])
def test_take_turns(warm_up):
    """A B C, B C A, …; the warm-up turn is not counted."""
    done = []
    seconds = take_turns({name: partial(done.append, name) for name in "abc"}, 3, warm_up)
    assert "".join(done) == "abcbcacababc"[:3 * (3 + warm_up)] and [len(times) for times in seconds.values()] == [3] * 3


class Program:
    """A program for a Worker that adds two numbers, and fails in a given way at the third call."""

    def __init__(self, way: str):
        self.way, self.calls = way, 0

    def add(self, a: int, b: int) -> int:
        self.calls += 1
        if self.calls == 3:
            if self.way == "raises":
                raise ValueError("call 3")
            if self.way == "hangs":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGSEGV)
        print("not JSON")
        return a + b


@pytest.mark.parametrize("way, reason", [
    ("crashes", "crashed: SIGSEGV"), ("raises", "failed: ValueError: call 3"), ("hangs", "failed: no answer in 5 s")])
def test_a_failed_program_is_skipped(way, reason, capfd):
    """The other programs run in all turns; the failure message is kept for the table."""
    worker = Worker(Program, way)
    assert worker.call("add", 1, 2) == 3
    work = {"fails": lambda: worker.call("add", 1, 2, timeout=5), "other": lambda: 0.25}
    assert take_turns(work, 4) == {"other": [0.25] * 4}
    assert worker.failure == reason and not worker.process.is_alive()
    with pytest.raises(WorkerFailed, match=reason):
        worker.call("add", 1, 2)
    assert "not JSON" not in capfd.readouterr().out


def test_a_program_that_cannot_be_built():
    worker = Worker(Program)
    with pytest.raises(WorkerFailed, match="failed: TypeError: .* 'way'"):
        worker.call("add", 1, 2)


def test_an_interrupted_benchmark_prints_its_result(capsys):
    def work(result: dict, error: BaseException | None = None) -> None:
        result["ratios"]["a_vs_b"] = {"median": 2, "min": 1, "max": 3}
        if error:
            raise error

    for error, says in ((None, {}), (KeyboardInterrupt(), {"interrupted": True}),
                        (RuntimeError("not the same work"), {"failed": "not the same work"})):
        try:
            code = end({"ratios": {}, "failures": {"other": "failed"}}, partial(work, error=error))
            assert code == (130 if error else 0)
        except RuntimeError as raised:
            assert raised is error
        *_, last = capsys.readouterr().out.splitlines()
        assert json.loads(last) == {"ratios": {"a_vs_b": {"median": 2, "min": 1, "max": 3}},
                                    "failures": {"other": "failed"}} | says
    assert end({"ratios": {}, "failures": {"ours, fp32": "failed"}}, work) == 1


@pytest.mark.extra
def test_a_crash_is_shown_and_an_interrupt_keeps_finished_rows(tmp_path):
    """transformers crashes; after the first finished rows the benchmark gets SIGINT, as from `timeout -s INT`."""
    (tmp_path / "transformers.py").write_text("import os\nos.kill(os.getpid(), 11)\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "decode_throughput.py"), "--preset", "nano", "--device", "cpu",
               "--prompt_tokens", "8", "--new_tokens", "16", "--repeats", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}) as run:
        lines = []
        for line in run.stdout:
            lines.append(line)
            if line.startswith("| fp32, 1 row, sampled") and "transformers" in line:
                os.killpg(run.pid, signal.SIGINT)
    assert run.returncode == 130
    result = json.loads(lines[-1])
    assert result["interrupted"] and result["failures"] == {"transformers, fp32": "crashed: SIGSEGV"}
    assert result["cases"]["fp32, 1 row, greedy, transformers"] == {"failed": "crashed: SIGSEGV"}
    assert len(result["cases"]["fp32, 1 row, greedy, ours"]["tokens_per_second"]) == 2
    assert not any("transformers" in name for name in result["ratios"])
    assert any("transformers" in line and "crashed: SIGSEGV" in line for line in lines if line.startswith("| fp32"))


# ---------------------------------------------------------------------------------------------
# compare_runs.py


def write_run(folder, bpb: list[float], tokens: int = 4096, speed: float = 4096, **changes) -> str:
    """Write the output of a finished pretraining run that validates after each step."""
    rows = [{"step": step, "epoch": 1, "loss": 3.0, "lr": 1e-3, "tokens": step * tokens, "tokens_per_second": speed,
             "grad_norm": 1.0, "minutes_left": 0.0, "val_loss": value + 1, "val_ppl": 9.0, "val_bpb": value}
            for step, value in enumerate(bpb, start=1)]
    meta = dict(stage="pretrain", step=len(rows), tokenizer_sha256="a", val_sha256="v",
                val={"targets": 900, "bytes": 4000},
                settings={"seed": 1, "max_seq_len": 512, "learning_rate": 4e-3}) | changes
    (folder / "log").mkdir(parents=True)
    write_jsonl(folder / "log" / "pretrain.jsonl", rows)
    save_weights(folder / "pretrain.pth", WeakWater(LLMConfig.preset("nano", vocab_size=16)), meta)
    return str(folder)


def test_compare_runs(tmp_path, capsys):
    """Figures, ratios to the run named by --beside, and differing settings; --jsonl gets the curves."""
    a = write_run(tmp_path / "a", [2.5, 2.0])
    b = write_run(tmp_path / "b", [2.4, 2.1, 1.9], speed=2048, settings={
        "seed": 1, "max_seq_len": 512, "learning_rate": 2e-3})
    for _ in range(2):
        compare_runs.main(["--stage", "pretrain", a, b, "--jsonl", str(tmp_path / "curves.jsonl")])
    *table, differing, last = capsys.readouterr().out.splitlines()
    assert "b differs from a in learning_rate (0.004 → 0.002)" == differing
    assert any("| b " in line and "12,288" in line and "-0.1000" in line and "150.0%" in line for line in table)
    result = json.loads(last)
    assert (result["stage"], result["beside"]) == ("pretrain", "a")
    first, second = result["runs"]
    assert (first["steps"], first["tokens"], first["val_bpb"], first["val_loss"]) == (2, 8192, 2.0, 3.0)
    assert second["tokens_ratio"] == 1.5 and second["minutes_ratio"] == pytest.approx(3, rel=1e-3)
    assert second["minutes"] == pytest.approx(0.1) and second["val_bpb_difference"] == pytest.approx(-0.1)
    curves = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [run["run"] for run in curves] == ["a", "b", "a", "b"]
    assert curves[1]["curve"][0] == {"step": 1, "tokens": 4096, "val_loss": 3.4, "val_bpb": 2.4}
    compare_runs.main(["--stage", "pretrain", a, b, "--beside", "b"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]["tokens_ratio"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("changes, reason", [
    (dict(tokenizer_sha256="b"), "the tokenizer differs"),
    (dict(val_sha256="w"), "the validation data differs"),
    (dict(settings={"seed": 1, "max_seq_len": 256}), "--max_seq_len differs"),
    (dict(step=3), "b: the pretrain run is not finished"), (dict(val={}), "lacks validation scores"),
])
def test_runs_that_cannot_be_compared(tmp_path, changes, reason):
    """The error names what differs."""
    a, b = write_run(tmp_path / "a", [2.0]), write_run(tmp_path / "b", [1.9], **changes)
    with pytest.raises(UserError, match=reason):
        compare_runs.main(["--stage", "pretrain", a, b])


def test_invalid_arguments_of_compare_runs(tmp_path):
    a = write_run(tmp_path / "a", [2.0])
    for argv, reason in ((["--stage", "SFT", a], "no such file"), (["--stage", "pretrain", a, "--beside", "x"],
                                                                   "--beside x: not one of a")):
        with pytest.raises(UserError, match=reason):
            compare_runs.main(argv)
    done = subprocess.run([sys.executable, str(ROOT / "experiments" / "compare_runs.py"), "--stage", "SFT", a],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout


# ---------------------------------------------------------------------------------------------
# recipe scripts

LEFT_OUT = {"pretrain": CHAT_ONLY + DISTILL_ONLY, "SFT": DISTILL_ONLY, "SFT_long": DISTILL_ONLY, "distill": ()}


def calls_of(script: str, tmp_path, *flags: str, **settings) -> list[tuple[str, argparse.Namespace]]:
    """(stage, parsed flags) of each stage that a shell script would run, with a stub in place of Python."""
    stub, calls = tmp_path / "stub", tmp_path / "calls"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n', encoding="utf-8")
    stub.chmod(0o755)
    done = subprocess.run(["bash", str(ROOT / script), *flags], capture_output=True, text=True,
                          env=os.environ | {"PYTHON": str(stub), "OUT": str(tmp_path / "out")} | settings)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in calls.read_text(encoding="utf-8").splitlines()]
    calls.unlink()
    return [(stage, parse_args(stage, "", argv, leave_out=LEFT_OUT[stage])) for name, *argv in lines
            if (stage := name.removesuffix(".py")) in LEFT_OUT]


def test_the_original_recipe(tmp_path):
    """Every stage gets the settings of the original runs and its data alone; flags on the command line go to every
    stage."""
    calls = calls_of("runs/original.sh", tmp_path, "--dtype", "fp16", "--out_dir", "out/x")
    assert [(stage, args.data_path) for stage, args in calls] == [
        ("pretrain", ["pretrain"]), ("SFT", ["sft_512"]), ("SFT_long", ["sft_1024"]), ("distill", ["r1_1024"])]
    for stage, args in calls:
        expected = dict(optimizer="adamw", beta2=0.999, weight_decay=0.01, weight_decay_on="all", lr_schedule="cosine",
                        warmup_ratio=0.0, min_lr_ratio=0.1, output_init="normal", dtype="fp16", out_dir="out/x",
                        resume=True, learning_rate=1e-6 if stage == "distill" else 5e-4)
        assert expected.items() <= vars(args).items()
        rows = (84, 2) if stage in ("pretrain", "SFT") else (21, 8)
        assert (args.batch_size, args.accumulation_steps) == rows


def test_two_cores_train_on_mixtures(tmp_path):
    """Every later stage also reads text, and distill chats without thoughts; each resumes a stopped run."""
    (tmp_path / "out").mkdir()
    calls = calls_of("runs/cpu.sh", tmp_path, DATA="d", STEPS="4 3 2 1")
    chats, text = "d/sft.jsonl.xz", "d/pretrain-*.jsonl.xz"
    mixture = [f"{chats}=0.9", f"{text}=0.1"]
    assert [(stage, args.data_path) for stage, args in calls] == [
        ("pretrain", [text]), ("SFT", mixture), ("SFT_long", mixture),
        ("distill", [f"{tmp_path}/out/data/chats.jsonl=0.7", f"{chats}=0.2", f"{text}=0.1"])]
    assert [args.max_steps for _, args in calls] == [4, 3, 2, 1] and all(args.resume for _, args in calls)


def test_prepared_and_unprepared_text_are_trained_on_alike(tmp_path):
    """runs/data.sh trains all stages on what prepare_data.py writes, then pretrains on the raw text in the same way."""
    (tmp_path / "out" / "run").mkdir(parents=True)
    calls = calls_of("runs/data.sh", tmp_path, DATA="d", STEPS="4 3 2 1")
    data = f"{tmp_path}/out/data"
    chats, text = f"{data}/sft_512-*.jsonl.zst", f"{data}/pretrain-*.jsonl.zst"
    assert [(stage, args.data_path) for stage, args in calls] == [
        ("pretrain", [text]), ("SFT", [f"{chats}=0.9", f"{text}=0.1"]),
        ("SFT_long", [f"{data}/sft_1024-*.jsonl.zst=0.9", f"{text}=0.1"]),
        ("distill", [f"{tmp_path}/out/run/data/chats.jsonl=0.7", f"{chats}=0.2", f"{text}=0.1"]),
        ("pretrain", ["d/pretrain-*.jsonl.xz"])]
    (_, prepared), (_, raw) = calls[0], calls[-1]
    assert {name for name, value in vars(prepared).items() if vars(raw)[name] != value} == {
        "data_path", "out_dir", "cache_dir", "command"}


def test_the_arms_of_data_choices(tmp_path):
    """All arms of a kind have the same steps; --order file is for sorted text alone; each seed has its runs."""
    (tmp_path / "out" / "runs" / "scoring_0").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "scoring_0" / "pretrain.pth").touch()
    calls = calls_of("experiments/data_choices.sh", tmp_path, "--device", "cpu", DATA="x", ORDER_DATA="y", GOOD="g",
                     VAL="v w", TOKENS="409600", SEEDS="1 2")
    runs = {os.path.basename(args.out_dir): args for _, args in calls}
    arms = ("all", "model", "good", "both", "shuffled", "length", "score", "weight")
    assert set(runs) == {"scoring_0"} | {f"{arm}_{seed}" for arm in arms for seed in (1, 2)}
    for name, args in runs.items():
        arm, seed = name.split("_")
        assert (args.seed, args.device, args.val_path) == (int(seed), "cpu", ["v"])
        assert args.order == ("file" if arm in ("length", "score") else "shuffled")
        assert args.max_steps == {"scoring": 50}.get(arm, 100 if arm in arms[:4] else 0)
        assert arm == "scoring" or args.data_path == [f"{tmp_path}/out/data_{arm}/pretrain-*.jsonl.zst"]


@pytest.mark.parametrize("stage", LEFT_OUT)
def test_the_flags_of_recipes(stage, tmp_path):
    """The stage accepts the command of every recipe. The default recipe has the settings of pretrain.py except for
    fewer rows. A share of the tokens is a share of the steps."""
    calls = calls_of("experiments/recipe.sh", tmp_path, "--device", "cpu", STAGE=stage, RECIPES="all", SEEDS="1 2",
                     TOKENS="8000000", DATA="x", INIT_FROM="y", TOKENIZER="z", VAL="v", DOC_TOKENS="409")
    by_name = {os.path.basename(args.out_dir): args for _, args in calls}
    assert len(by_name) == len(calls) >= 10 and {name for name, _ in calls} == {stage}
    for name, args in by_name.items():
        assert (args.device, args.resume, args.data_path, args.val_path) == ("cpu", True, ["x"], ["v"])
        assert args.seed == int(name.rpartition("_")[2]) and args.init_from == ("none" if stage == "pretrain" else "y")
    if stage == "pretrain":
        changed = {name for name, flag in FLAGS.items() if flag.trajectory and name not in CHAT_ONLY + DISTILL_ONLY
                   and getattr(by_name["default_1"], name) != flag.default}
        assert changed == {"preset", "epochs", "batch_size", "max_steps", "seed"}
        steps = {name: args.max_steps for name, args in by_name.items()}
        assert (steps["default_third_1"], steps["default_35_2"], steps["muon_half_1"]) == (652, 684, 977)
        assert 2430 <= steps["original_8_1"] <= 2700  # enough padded rows of 409 real tokens for TOKENS
        assert steps["original_8_1"] > 20 * steps["original_1"]


@pytest.mark.parametrize("settings, reason", [
    (dict(RECIPES="default nothing"), "nothing is not one of all, original, original_8,"), (dict(STAGE="x"), "STAGE=x"),
    (dict(TOKENS="8M"), "whole numbers"), (dict(STAGE="SFT"), "needs DATA and INIT_FROM"),
    (dict(JOBS="0"), "at least 1")])
def test_invalid_settings_of_recipes(tmp_path, settings, reason):
    done = subprocess.run(["bash", str(ROOT / "experiments/recipe.sh")], capture_output=True, text=True,
                          env=os.environ | {"OUT": str(tmp_path / "out")} | settings)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_failed_recipe_ends_the_script(tmp_path, jobs):
    """The exit code is that of the stage, and later recipes are not started."""
    stub, calls = tmp_path / "stub", tmp_path / "calls"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit 3\n', encoding="utf-8")
    stub.chmod(0o755)
    settings = {"PYTHON": str(stub), "OUT": str(tmp_path), "DATA": "x", "TOKENIZER": "z", "RECIPES": "all",
                "JOBS": jobs}
    done = subprocess.run(["bash", str(ROOT / "experiments/recipe.sh")], capture_output=True, text=True,
                          env=os.environ | settings)
    started = calls.read_text(encoding="utf-8").splitlines()
    assert done.returncode == 3 and len(started) <= int(jobs) and "compare_runs" not in started[-1]


@pytest.mark.extra
def test_recipes_end_with_a_comparison(tmp_path):
    """Recipes run in parallel and share one table. A finished run is not trained again, a missing one is."""
    settings = {"PYTHON": sys.executable, "OUT": str(tmp_path), "PRESET": "nano", "TOKENS": "40000", "SEEDS": "1",
                "JOBS": "2", "RECIPES": "original_8 default_half muon_4e-3", "OMP_NUM_THREADS": "1"}

    def recipes() -> list[str]:
        done = subprocess.run(["bash", str(ROOT / "experiments/recipe.sh"), "--device", "cpu", "--log_interval", "1"],
                              capture_output=True, text=True, env=os.environ | settings)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    result = json.loads(recipes()[-1])
    first, half, muon = result["runs"]
    assert [run["run"] for run in result["runs"]] == ["original_8_1", "default_half_1", "muon_4e-3_1"]
    assert half["tokens"] == 5 * 4096 and muon["tokens"] == 10 * 4096 and 40000 <= first["tokens"] < 40512
    folder = tmp_path / "pretrain" / "default_half_1"
    log = (folder / "log" / "pretrain.jsonl").read_text(encoding="utf-8")
    curve = [json.loads(line) for line in log.splitlines()]
    assert len(curve) == 5 and curve[-1]["val_bpb"] < curve[0]["val_bpb"]
    (tmp_path / "pretrain" / "muon_4e-3_1").rename(tmp_path / "away")
    assert json.loads(recipes()[-1])["runs"][2]["val_bpb"] == pytest.approx(muon["val_bpb"], rel=1e-6)
    assert (folder / "log" / "pretrain.jsonl").read_text(encoding="utf-8") == log
    assert "finished before" in (folder / "log" / "pretrain.log").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# experiments/shares.sh


@pytest.mark.parametrize("settings, reason", [
    (dict(VAL=""), "must be set"), (dict(STAGE="pretrain"), "STAGE=pretrain"), (dict(STEPS="0"), "at least 1"),
    (dict(SEEDS="1 b"), "whole numbers"), (dict(MIXTURES="a=1; ;b=1"), "an empty mixture"),
    (dict(VAL="no.jsonl"), "no.jsonl: no such file")])
def test_invalid_settings_of_shares(tmp_path, tokenizer_dir, text_file, settings, reason):
    """Nothing is trained."""
    train("pretrain", text_file, tokenizer_dir, tmp_path, preset="nano", max_seq_len=64, max_steps=1)
    usual = {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "INIT_FROM": str(tmp_path / "pretrain.pth"),
             "MIXTURES": "a=1; b=1", "VAL": str(text_file)}
    done = subprocess.run(["bash", str(ROOT / "experiments/shares.sh")], capture_output=True, text=True,
                          env=os.environ | usual | settings)
    assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*/?_1*"))


@pytest.mark.extra
def test_shares_end_with_a_table(tmp_path, data_dir, tokenizer_dir):
    """Each mixture, also one over two lines, is trained with each seed and scored on each file."""
    train("pretrain", data_dir / "pretrain.jsonl", tokenizer_dir, tmp_path, preset="nano", max_steps=2)
    chats, text = data_dir / "sft.jsonl", data_dir / "pretrain.jsonl"
    settings = {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "INIT_FROM": str(tmp_path / "pretrain.pth"),
                "MIXTURES": f"{chats}=1;\n{chats}=0.5\n{text}=0.5", "VAL": f"{text} {chats}", "STEPS": "2", "JOBS": "2",
                "OMP_NUM_THREADS": "1", "DEVICE": "cpu"}
    done = subprocess.run(["bash", str(ROOT / "experiments/shares.sh"), "--batch_size", "2", "--save_interval", "1000"],
                          capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["mixture", "seed", "pretrain.jsonl", "sft.jsonl"] and len(rows) == 7
    scores = [tuple(map(float, row[2:])) for row in rows[2:]]
    assert len(set(scores)) == 5 and all(0 < bpb < 10 for row in scores for bpb in row)
