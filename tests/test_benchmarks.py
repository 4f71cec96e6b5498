"""Each benchmark runs at a tiny size and ends with one JSON object that holds its ratios."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

RATIOS = {
    "train_throughput.py --rows 2 --max_seq_len 64": {
        "useful_vs_padded_fp32", "positions_vs_fp32", "positions_vs_transformers_bf16"},
    "decode_throughput.py --prompt_tokens 8 --new_tokens 4 --batch 2": {"batch1_vs_transformers"},
}


@pytest.mark.extra
@pytest.mark.parametrize("command", RATIOS)
def test_a_benchmark_ends_with_its_ratios(command):
    script, *flags = command.split()
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--preset", "nano", "--repeats", "1",
                           "--device", "cpu", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert RATIOS[command] <= set(result["ratios"])
    for value in result["ratios"].values():
        assert 0 < value["min"] <= value["median"] <= value["max"]
