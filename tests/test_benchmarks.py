"""Each benchmark runs at a tiny size and ends with one JSON object that holds its ratios; recipes are compared."""

import argparse
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

from benchmarks import decode_throughput as decoding
from benchmarks import train_throughput as benchmark
from benchmarks.measure import copy_texts, sample_records, take_turns
from Config import LLMConfig, UserError, parse_args
from evaluate import kind_of
from experiments import recipe

CPU = torch.device("cpu")

RATIOS = {
    "train_throughput.py --device cpu --rows 2 --max_seq_len 64 --sweep": {
        "useful_vs_padded_fp32", "positions_vs_fp32"},
    "train_throughput.py --device cpu --rows 1 --max_seq_len 400 --data_path {chats}": {"useful_vs_padded_fp32"},
    "decode_throughput.py --device cpu --prompt_tokens 8 --new_tokens 4 --batch 2": {"batch1_vs_transformers"},
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
    assert RATIOS[command] <= set(result["ratios"])
    for value in result["ratios"].values():
        assert 0 < value["min"] <= value["median"] <= value["max"]
    if script == "train_throughput.py":
        assert len(result["script_to_first_step"]) == 2
        if "--sweep" in flags:
            assert len(result["sweep"]) == 7 and all(case["ours"]["peak_mebibytes"] > 100 for case in result["sweep"])


def test_work_that_differs_is_not_timed():
    """A loop that trains on other targets is found by its loss or its gradient."""
    args = argparse.Namespace(rows=2, max_seq_len=64, data_path=None, seed=0, repeats=2)
    config, device = LLMConfig.preset("nano"), torch.device("cpu")
    loops = benchmark.make_loops(args, config, device, ["ours", "transformers fp32"])
    start = {name: tensor.clone() for name, tensor in loops["ours"].model.state_dict().items()}
    for draws in benchmark.work_of(args, config).values():
        documents = draws[0]
        benchmark.check_agreement(loops, documents, start)
    step = loops["ours"].step
    ids, is_target = documents[0]
    one_less = [(ids, is_target & (ids != ids[-1])), *documents[1:]]
    loops["ours"].step = lambda documents: step(one_less)
    with pytest.raises(RuntimeError, match="not the same work"):
        benchmark.check_agreement(loops, documents, start)


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
    """A B A B ..., and what warms up is not counted."""
    done = []
    seconds = take_turns({"a": lambda: done.append("a"), "b": lambda: done.append("b")}, 3, warm_up)
    assert done == ["a", "b"] * (3 + warm_up) and [len(times) for times in seconds.values()] == [3, 3]


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
