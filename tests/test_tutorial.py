"""The tutorial keeps its word: every command in it runs, what it asserts can fail, and its outputs can be refreshed."""

import re
import shlex
import shutil
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT, write_jsonl

from common.exits import run
from common.generation import Decoder
from common.weights import save_weights
from Config import LLMConfig
from dataset import StepLoader, evaluation_batches
from make_demo_data import World, make_files
from model import Packing, WeakWater
from text.tokenizer import TextEncoder

sys.path.insert(0, str(ROOT / "docs"))
import refresh
import tutorial

TUTORIAL = (ROOT / "docs" / "TUTORIAL_zh.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"python docs/tutorial\.py ([^`\n]+)", TUTORIAL)))
SAYS = {  # what each sub-command has to print, whatever the weights
    "tokenizer": r"<unk> 0  <s> 1  </s> 2  <think> 3 .*\n(.*\n)*<think>  assistant +\[3\]",
    "sample --part record": r"messages, \d+ ids, \d+ with a loss\n(.*\n)*.* REPLY +1  </s>\n",
    "sample --part batch": r"total_weight of the step: (.*\n)*.*boundaries \[0, .*positions 0\.\.\d+, 0\.\.",
    "sample --part forward": r"logits +\(\d+, \d+\) .*\nweighted sum of the cross-entropies",
    "sample --part loss": r"after > comes\n(.*\n)*.* > </s>\n(.*\n)*micro-batch 2: sum .*\n\(.* \+ .*\) / \d+ = ",
    "step": r"4 x 1: \d+ documents.*\n.*\n2 x 2: .*\n.*\n1 x 4: ",
    "attention": r"1\.00 (   \. ){7}.*\n(.*\n)*packed, against alone +0\.000\n.* changed +0\.000\n.*without lengths",
    "precision": r"fp16 +6\.6e\+04 +6\.1e-05 +9\.8e-04 +0\.0e\+00",
    "optimizer": r"Muon, decay 0\.1: 14 weights(.*\n)*AdamW, decay 0\.0: 5 weights(.*\n)*root mean square",
    "schedule": r"  999     1\.000     0\.000      0\.003       0\.100",
    "resume": r"at once: (losses( +\d+\.\d+){6})\nresumed: \1\n",
    "distill": r"total_weight: \d+ REPLY x 1 \+ 4 TAG x ([\d.]+) \+ \d+ THINK x ([\d.]+) = ",
    "control": r"distill: \d+ targets\n    without loss '', then '<think>\\n.*\n"
               r"control: \d+ targets\n    without loss '<think>\\n\\n</think>\\n', then '[^<]+' and </s>\n",
    "answer": r"\(2, 1, 2, \d+, 32\), of which \d+ slots are filled; logits \(1, \d+\)",
    "score": r"together: loss .*\n(.*\n)*   28  from .*\n(.*\n)*  18 of  20:  90%, 69\.9% to 97\.2%",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, tokenizer_dir):
    """What quickstart.sh leaves, as far as the tutorial reads it: a little of the demo's data, and random weights."""
    out, files = tmp_path_factory.mktemp("tutorial"), make_files(World(seed=5), share=0.01)
    (out / "data" / "val").mkdir(parents=True)
    shutil.copytree(tokenizer_dir, out / "tokenizer")
    for name in ("pretrain", "sft_512", "r1_1024"):
        write_jsonl(out / "data" / "val" / f"{name}.jsonl", files[f"val/{name}.jsonl"][:80])
    torch.manual_seed(0)
    model = WeakWater(LLMConfig.preset("nano", vocab_size=TextEncoder.of(tokenizer).vocab_size))
    for stage in ("pretrain", "SFT", "SFT_long", "distill"):
        save_weights(out / f"{stage}.pth", model, {"stage": stage})
    return out


def printed_by(command: str, folder, capsys) -> str:
    """What a command of the tutorial prints, on the folder."""
    with mock.patch("common.runlog.RunLog.charts"):  # a second each, and tested elsewhere
        tutorial.main([*shlex.split(command), "--out_dir", str(folder)])
    return capsys.readouterr().out


def test_every_subcommand_stands_in_the_tutorial():
    names = {command.split()[0] for command in COMMANDS}
    assert names == {show.__name__.removeprefix("show_") for show in tutorial.COMMANDS}
    assert names == {says.split()[0] for says in SAYS}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_tutorial_runs(command, folder, capsys):
    """The commands assert what the text claims; here they have to run through and print it."""
    part = re.search(r" --part \w+", command)
    assert re.search(SAYS[command.split()[0] + (part.group() if part else "")], printed_by(command, folder, capsys))


def test_the_tutorial_shows_what_the_commands_print(folder, capsys):
    """The one output that depends on neither data nor weights."""
    printed = printed_by("schedule", folder, capsys)
    assert f"```bash\npython docs/tutorial.py schedule\n```\n```text\n{printed}```\n" in TUTORIAL


def test_weights_follow_the_flags(folder, capsys):
    plain = printed_by("distill", folder, capsys)
    weighted = printed_by("distill --tag_weight 5 --think_weight 0.5", folder, capsys)
    counts = re.search(r": (\d+) REPLY x 1 \+ (\d+) TAG x 1 \+ (\d+) THINK x 1", plain)
    replies, tags, thoughts = map(int, counts.groups())
    assert f" = {replies + 5 * tags + 0.5 * thoughts:g}\n" in weighted
    assert re.search(r"TAG +5  <think>\n.* THINK +0\.5  ", weighted)


def test_a_model_that_thinks_answers_behind_think(folder, capsys):
    printed = printed_by("answer --stage distill --max_new_tokens 2", folder, capsys)
    assert re.search(r"assistant \| \\n \| <think>\n(.*\n)*'<think>", printed)
    assert "<think>" not in printed_by("answer --stage SFT --max_new_tokens 2", folder, capsys).splitlines()[2]


class Doubled(Decoder):
    """Decodes with other logits than the model gives."""

    native = None

    def logits(self, *arguments):
        return 2 * super().logits(*arguments)


class FirstWeight(StepLoader):
    """A step's weight is that of its first micro-batch only."""

    def step(self, epoch, step_in_epoch):
        step = super().step(epoch, step_in_epoch)
        step.total_weight = float(step.micro_batches[0].weights.sum())
        return step


class OneDocument(Packing):
    """Puts the documents of a buffer into one, from which positions and attention then do not start anew."""

    def __init__(self, lengths, boundaries):
        super().__init__([sum(lengths)], boundaries[[0, -1]])


@pytest.mark.parametrize("command, name, broken", [
    ("sample", "tutorial.apply_rotary", lambda x, cos, sin: x),
    ("sample", "tutorial.attention", lambda q, k, v: v),
    ("sample", "tutorial.StepLoader", FirstWeight),
    ("sample", "model.attention", lambda q, k, v, mask=None: v),
    ("step", "tutorial.StepLoader", FirstWeight),
    ("attention", "model.attention", lambda q, k, v, mask=None: v),
    ("attention", "model.Packing", OneDocument),
    ("attention", "tutorial.Packing", OneDocument),
    ("answer", "tutorial.Decoder", Doubled),
    ("score", "tutorial.evaluation_batches",
     lambda documents, *window: evaluation_batches(documents.take([0, 1]), *window)),
])
def test_what_is_computed_by_hand_must_agree(command, name, broken, folder, monkeypatch):
    """With a part of the project replaced by something else the assertions do not hold."""
    monkeypatch.setattr(name, broken)
    with pytest.raises(AssertionError):
        tutorial.main([command, "--out_dir", str(folder)])


def test_without_a_quickstart_it_says_what_to_do(tmp_path, capsys):
    assert run(lambda: tutorial.main(["sample", "--out_dir", str(tmp_path / "none")])) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "run `bash quickstart.sh` first" in error


def test_a_line_that_is_not_there_is_the_users_mistake(folder, capsys):
    assert run(lambda: tutorial.main(["sample", "--line", "5000", "--out_dir", str(folder)])) == 2
    assert "--line 5000" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# docs/refresh.py

DOCUMENT = """# 题目

```bash
echo 你好; echo "a \\1 b  "
```
```text
old
…
```

```bash
exit 3
```

between

```text
not an output
```
```bash
ls README.md
```

```text
```
"""


def test_refresh_replaces_the_outputs_and_nothing_else(tmp_path):
    path = tmp_path / "document.md"
    path.write_text(DOCUMENT, encoding="utf-8")
    refresh.main([str(path)])
    wanted = DOCUMENT.replace("old\n…\n", "你好\na \\1 b\n").replace("```text\n```", "```text\nREADME.md\n```")
    assert path.read_text(encoding="utf-8") == wanted
    refresh.main([str(path)])
    assert path.read_text(encoding="utf-8") == wanted


def test_check_changes_nothing(tmp_path):
    path = tmp_path / "document.md"
    path.write_text(DOCUMENT, encoding="utf-8")
    refresh.main([str(path), "--check"])
    assert path.read_text(encoding="utf-8") == DOCUMENT


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_a_command_that_fails_leaves_the_document_and_exits_1(tmp_path, capsys, check):
    path = tmp_path / "document.md"
    broken = DOCUMENT.replace("ls README.md", "ls no_such_file\ntrue")
    path.write_text(broken, encoding="utf-8")
    assert run(lambda: refresh.main([str(path), *check])) == 1
    assert "no_such_file" in capsys.readouterr().err and path.read_text(encoding="utf-8") == broken
