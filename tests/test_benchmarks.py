"""Each benchmark runs at a tiny size and ends with one JSON object that holds its ratios, also when a program crashes
or the user interrupts it; recipes are compared."""

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
from conftest import ROOT

from benchmarks import decode_throughput as decoding
from benchmarks import step_profile
from benchmarks import train_throughput as benchmark
from benchmarks.measure import Worker, WorkerFailed, copy_texts, end, sample_records, take_turns
from Config import LLMConfig, UserError, parse_args
from evaluate import kind_of
from experiments import recipe

CPU = torch.device("cpu")

RATIOS = {
    "train_throughput.py --device cpu --rows 2 --max_seq_len 64 --sweep": {
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
            assert len(result["sweep"]) == 7 and all(case["ours"]["peak_mebibytes"] > 100 for case in result["sweep"])


class Here:
    """A program as a Worker calls it, but in this process."""

    def __init__(self, program):
        self.program = program

    def call(self, method: str, *args):
        return getattr(self.program, method)(*args)


def test_where_a_step_goes(monkeypatch, capsys):
    """Every part of a step is in the profile: matmuls, the C kernels' or torch's rest, the optimizers."""
    monkeypatch.setattr(sys, "argv", "step_profile.py --preset nano --rows 2 --max_seq_len 64 --repeats 2".split())
    step_profile.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    calls = {name: calls for name, calls, *_ in result["operations"]}
    # two layers of four matmuls, each once forward and twice backward, and the output's three
    assert calls["aten::mm"] == 2 * 4 * 3 + 3
    assert calls["aten::baddbmm"] and calls["aten::_fused_adamw_"] and len(result["step_ms"]) == 2
    assert all(host > 0 for _, _, host, _ in result["operations"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_work_that_differs_is_not_timed(dtype):
    """A loop that trains on other targets is found by its loss or its gradient."""
    args = argparse.Namespace(rows=2, max_seq_len=64, data_path=None, seed=0, repeats=2)
    config = LLMConfig.preset("nano")
    ours = benchmark.Ours(config, CPU, dtype, 128, "adamw", compiled=False)
    loops = {"ours": Here(ours), "transformers": Here(benchmark.Transformers(config, CPU, dtype, 64, compiled=False))}
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
    """As StepLoader does: a buffer is full with the document that reaches its size, not before it."""
    ours = benchmark.Ours(LLMConfig.preset("nano"), CPU, "fp32", 100, "adamw", compiled=False)
    for lengths, sizes in (([60, 39, 30], [129]), ([60, 40, 30], [100, 30]), ([150, 50], [150, 50])):
        buffers = ours.micro_batches(benchmark.make_rows(np.random.default_rng(0), 6400, 1, n)[0] for n in lengths)
        assert [len(buffer.tokens) for buffer in buffers] == sizes


@pytest.mark.parametrize("file", ["sft.jsonl", "pretrain.jsonl"])
def test_each_turn_takes_other_documents_of_any_kind(data_dir, tokenizer_dir, file):
    """Conversations or texts, whole or cut to the row; of a conversation only the reply has targets."""
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


def test_texts_of_any_file(data_dir, tmp_path):
    """Texts and conversations become texts, as many as asked for; where there are none, that is said."""
    for file in ("pretrain.jsonl", "sft.jsonl"):
        copy_texts(str(data_dir / file), tmp_path / "texts.jsonl", 0.01)
        texts = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
        assert all(set(text) == {"text"} for text in texts)
        assert 10_000 <= sum(len(text["text"].encode()) for text in texts) < 20_000
    assert kind_of(data_dir / "pretrain.jsonl") == "text" and kind_of(data_dir / "sft.jsonl") == "chat"
    (tmp_path / "none.jsonl").write_text('{"other": 1}\nno JSON\n', encoding="utf-8")
    with pytest.raises(UserError, match="no text"):
        copy_texts(str(tmp_path / "none.jsonl"), tmp_path / "texts.jsonl", 1)


def test_a_sample_is_drawn_from_the_whole_file(tmp_path):
    path, target = tmp_path / "lines.jsonl", tmp_path / "sample.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(1000)), encoding="utf-8")
    sample_records(str(path), target, "text", 100, seed=1)
    numbers = [int(json.loads(line)["text"]) for line in target.read_text(encoding="utf-8").splitlines()]
    assert len(set(numbers)) == 100 and min(numbers) < 100 and max(numbers) >= 900
    with pytest.raises(UserError, match="no chat record"):
        sample_records(str(path), target, "chat", 100, seed=1)


@pytest.mark.parametrize("preset", ["nano", "qwen3"])
def test_decoders_that_differ_are_found(preset):
    """Ours, by the code that one prompt takes and by that of several, says what transformers says; another does not."""
    config = LLMConfig.preset("nano", **({"qk_norm": True, "n_kv_heads": 1} if preset == "qwen3" else {}))
    model = decoding.make_model(config, CPU)
    decoders = {"ours": decoding.Ours(model, CPU, "fp32"), "transformers": decoding.Transformers(model, CPU, "fp32")}
    prompts = torch.randint(0, 6400, (3, 8)).tolist()
    replies = decoding.check_equal(decoders, prompts, 12)
    shares = decoding.check_found(decoders, prompts, replies)
    assert len(shares) == 4 and set(shares.values()) == {1}
    wrong = {"ours": lambda call, n, sampled: [ids[:-1] + [ids[-1] ^ 1] for ids in decoders["ours"](call, n, sampled)],
             "transformers": decoders["transformers"]}
    with pytest.raises(RuntimeError, match="the 12th token is not ours"):
        decoding.check_equal(wrong, prompts, 12)
    with pytest.raises(RuntimeError, match="ours, 1 at once, finds"):
        decoding.check_found(wrong, prompts, replies)


def test_runs_with_other_settings_are_not_compared(tmp_path):
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    recipe.check_comparable({first: {"tokens": 1, "recipe": "a"}, second: {"tokens": 1, "recipe": "b"}})
    recipe.check_comparable({first: {"tokens": 1, "recipe": "a"}, second: {"preset": "nano"}})
    with pytest.raises(UserError, match=r"tokens is 1 in .*1\.json and 2 in .*2\.json"):
        recipe.check_comparable({first: {"tokens": 1}, second: {"tokens": 2}})


@pytest.mark.parametrize("warm_up", [True, False])
def test_turns_are_taken(warm_up):
    """A B C, B C A, ..., and what warms up is not counted."""
    done = []
    seconds = take_turns({name: partial(done.append, name) for name in "abc"}, 3, warm_up)
    assert "".join(done) == "abcbcacababc"[:3 * (3 + warm_up)] and [len(times) for times in seconds.values()] == [3] * 3


class Program:
    """For a Worker: one that adds, and ends in a given way at the third call."""

    def __init__(self, way: str):
        self.way, self.calls = way, 0

    def add(self, a: int, b: int) -> int:
        self.calls += 1
        if self.calls == 3:
            if self.way == "raises":
                raise ValueError("no more")
            if self.way == "hangs":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGSEGV)
        print("not JSON")
        return a + b


@pytest.mark.parametrize("way, reason", [
    ("crashes", "crashed: SIGSEGV"), ("raises", "failed: ValueError: no more"), ("hangs", "failed: no answer in 5 s")])
def test_a_program_that_fails_is_left_out(way, reason, capfd):
    """The others go on, each in all turns; the reason stays, for the table."""
    worker = Worker(Program, way)
    assert worker.call("add", 1, 2) == 3
    work = {"fails": lambda: worker.call("add", 1, 2, timeout=5), "other": lambda: 0.25}
    assert take_turns(work, 4) == {"other": [0.25] * 4}
    assert worker.failure == reason and not worker.process.is_alive()
    with pytest.raises(WorkerFailed, match=reason):
        worker.call("add", 1, 2)
    assert "not JSON" not in capfd.readouterr().out


def test_a_program_that_cannot_be_built_says_why():
    worker = Worker(Program)
    with pytest.raises(WorkerFailed, match="failed: TypeError: .* 'way'"):
        worker.call("add", 1, 2)


def test_an_interrupted_benchmark_prints_what_it_has(capsys):
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
def test_a_crash_is_a_cell_and_an_interrupt_keeps_finished_rows(tmp_path):
    """transformers crashes; after the first finished row the benchmark is interrupted, as `timeout -s INT` does."""
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


def test_the_default_recipe_is_that_of_the_script():
    """But for its rows, which two cores would not train in reasonable time."""
    parse = partial(parse_args, "pretrain", "", learning_rate=4e-3)  # pretrain.py's own default, which test_help holds
    shipped, compared = (vars(parse(["--data_path", "x", *flags.split()])) for flags in ("", recipe.DEFAULT))
    assert {name for name in shipped if shipped[name] != compared[name]} == {"command"}


@pytest.mark.extra
def test_recipes_are_compared(tmp_path):
    """Two recipes and the original learn, are timed, and stand in one table; nothing is run twice."""
    def run(*flags: str) -> str:
        done = subprocess.run([sys.executable, str(ROOT / "experiments" / "recipe.py"), "--preset", "nano",
                               "--tokens", "20000", "--max_seq_len", "64", "--out_dir", "out", *flags],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    names = ["original_8", "default_half", "muon_4e-3"]
    learned = run("--seeds", "1", "--jobs", "2", "--recipes", *names)
    for name in names:
        folder = tmp_path / "out" / "pretrain" / f"{name}_1"
        curve = json.loads((folder / "result.json").read_text(encoding="utf-8"))["curve"]
        assert len(curve) >= 5 and curve[-1]["bpb"] < curve[0]["bpb"]
        share = 0.5 if name == "default_half" else 1
        assert share * 20000 <= curve[-1]["tokens"] < share * 20000 + 8 * 64 and f"| {name} " in learned
    run("--time", "--repeats", "2", "--recipes")
    (tmp_path / "out" / "pretrain" / "default_half_1" / "result.json").unlink()  # as if it had been stopped
    again = run("--seeds", "1", "--recipes", *names)
    assert again.count(", seed 1") == 1 and "100.0%" in again
