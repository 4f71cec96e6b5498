"""docs/DATA.md names the steps and the flags that there are."""

import re

from conftest import ROOT

import prepare_data
from prepare.steps import LAST_STEPS, ORDER, STEPS

DOCUMENT = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")


def test_the_steps():
    table = re.search(r"\| step \| on \| .*?\n\n", DOCUMENT, re.DOTALL)[0]
    rows = [line.split(" | ")[:2] for line in table.splitlines()[2:]]
    on = {"text": "text", "message": "message", "whole": "whole", "chat": "chat"}
    expected = [[f"| `{step.name}`", on[step.on]] for step in STEPS] + [
        [f"| `{step.name}`", "all" if step.on == "whole" else step.on] for step in LAST_STEPS]
    assert [row for row in rows if row[0].startswith("| `")] == expected
    assert tuple(step.name for step in STEPS) == ORDER


def test_the_flags_and_their_defaults():
    table = re.search(r"\| flag \| default \| .*?\n\n", DOCUMENT, re.DOTALL)[0]
    documented = set(re.findall(r"`?(--\w+)", table))
    args = vars(prepare_data.parse_args(["--data_path", "x"]))
    assert documented == {f"--{name}" for name in args if name != "command"}
    for name in ("min_chars", "max_chars", "min_han", "near", "contained", "mini_share", "shard_mb", "task_mb",
                 "max_bad_ratio", "seed", "keep", "categories", "executor"):
        row = next(line for line in table.splitlines() if f"`--{name}`" in line)
        assert re.search(rf"(?<![\d.]){re.escape(str(args[name]))}(?![\d.])", row), row
