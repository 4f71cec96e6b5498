"""Each benchmark runs at a tiny size and ends with one JSON object that holds its ratios; recipes are compared."""

import argparse
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

from benchmarks import train_throughput as benchmark
from benchmarks.measure import take_turns
from Config import LLMConfig, parse_args
from experiments.recipe import DEFAULT

RATIOS = {
    "train_throughput.py --device cpu --rows 2 --max_seq_len 64 --sweep": {
        "useful_vs_padded_fp32", "positions_vs_fp32"},
    "decode_throughput.py --device cpu --prompt_tokens 8 --new_tokens 4 --batch 2": {"batch1_vs_transformers"},
    "data_throughput.py --megabytes 0.5 --batches 3": {
        "first_batch_warm_cache_vs_getitem", "tokens_vs_getitem", "memory_as_text_grows"},
    "tokenizer_training.py --megabytes 1": {
        f"plain_over_ours_{what}_{times}x" for what in ("seconds", "mebibytes") for times in (1, 2, 4)},
}


@pytest.mark.extra
@pytest.mark.parametrize("command", RATIOS)
def test_a_benchmark_ends_with_its_ratios(command):
    script, *flags = command.split()
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--preset", "nano", "--repeats", "2",
                           *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert RATIOS[command] <= set(result["ratios"])
    for value in result["ratios"].values():
        assert 0 < value["min"] <= value["median"] <= value["max"]
    if script == "train_throughput.py":
        assert len(result["script_to_first_step"]) == 2
        assert len(result["sweep"]) == 7 and all(case["ours"]["peak_mebibytes"] > 100 for case in result["sweep"])


def test_work_that_differs_is_not_timed():
    """A loop that trains on other targets is found by its loss or its gradient."""
    args = argparse.Namespace(rows=2, max_seq_len=64, compile=False, data_path=None, seed=0)
    config, device = LLMConfig.preset("nano"), torch.device("cpu")
    loops = benchmark.make_loops(args, config, device, ["ours", "transformers fp32"])
    start = {name: tensor.clone() for name, tensor in loops["ours"].model.state_dict().items()}
    for documents in benchmark.work_of(args, config).values():
        benchmark.check_agreement(loops, documents, start)
    step = loops["ours"].step
    ids, is_target = documents[0]
    one_less = [(ids, is_target & (ids != ids[-1])), *documents[1:]]
    loops["ours"].step = lambda documents: step(one_less)
    with pytest.raises(RuntimeError, match="not the same work"):
        benchmark.check_agreement(loops, documents, start)


@pytest.mark.parametrize("warm_up", [True, False])
def test_turns_are_taken(warm_up):
    """A B A B ..., and what warms up is not counted."""
    done = []
    seconds = take_turns({"a": lambda: done.append("a"), "b": lambda: done.append("b")}, 3, warm_up)
    assert done == ["a", "b"] * (3 + warm_up) and [len(times) for times in seconds.values()] == [3, 3]


def test_the_default_recipe_is_that_of_the_script():
    """But for its rows, which two cores would not train in reasonable time."""
    parse = partial(parse_args, "pretrain", "", learning_rate=4e-3)  # pretrain.py's own default, which test_help holds
    shipped, compared = (vars(parse(["--data_path", "x", *flags.split()])) for flags in ("", DEFAULT))
    assert {name for name in shipped if shipped[name] != compared[name]} == {"command"}


@pytest.mark.extra
def test_recipes_are_compared(tmp_path):
    """Two recipes and the original learn, are timed, and stand in one table; nothing is run twice."""
    def recipe(*flags: str) -> str:
        done = subprocess.run([sys.executable, str(ROOT / "experiments" / "recipe.py"), "--preset", "nano",
                               "--tokens", "20000", "--max_seq_len", "64", "--out_dir", "out", *flags],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    names = ["original_8", "default_half", "muon_4e-3"]
    learned = recipe("--seeds", "1", "--jobs", "2", "--recipes", *names)
    for name in names:
        folder = tmp_path / "out" / "pretrain" / f"{name}_1"
        curve = json.loads((folder / "result.json").read_text(encoding="utf-8"))["curve"]
        assert len(curve) >= 5 and curve[-1]["bpb"] < curve[0]["bpb"]
        share = 0.5 if name == "default_half" else 1
        assert share * 20000 <= curve[-1]["tokens"] < share * 20000 + 8 * 64 and f"| {name} " in learned
    recipe("--time", "--repeats", "2", "--recipes")
    (tmp_path / "out" / "pretrain" / "default_half_1" / "result.json").unlink()  # as if it had been stopped
    again = recipe("--seeds", "1", "--recipes", *names)
    assert again.count(", seed 1") == 1 and "100.0%" in again
