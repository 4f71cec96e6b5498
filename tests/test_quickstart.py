"""The verdict of the quickstart: thresholds and gains, on results made by hand."""

import json

import pytest
from conftest import write_jsonl

from Config import UserError
from experiments import quickstart

RIGHT = {  # stage: how many of 100 questions of each kind are right, so that every threshold is just met
    "pretrain": dict(facts=0, never=0, one=0, many=0), "SFT": dict(facts=90, never=70, one=90, many=0),
    "SFT_long": dict(facts=90, never=70, one=90, many=10), "control": dict(facts=50, never=50, one=50, many=15),
    "distill": dict(facts=50, never=50, one=50, many=30),
}
SOURCES = {"facts": "facts/asked", "never": "facts/never_asked", "one": "one_step", "many": "multi_step/2"}
THOUGHT = ["原来有3个。", "又买了2个：3+2=5。"]


def write_run(out, changes=None, well_formed=95):
    """What quickstart.sh leaves for the report. `changes`: {stage: {kind: how many are right}}."""
    write_jsonl(out / "data" / "eval" / "multi_step.jsonl", [{"thought": THOUGHT}] * 100)
    reply = "<think>\n" + "\n".join(THOUGHT) + "\n</think>\n<answer>5</answer>"
    for stage, right in RIGHT.items():
        right = right | (changes or {}).get(stage, {})
        replies = [{"source": SOURCES[kind], "line": line, "correct": line <= right[kind], "reply": reply,
                    "file": "anywhere.jsonl", "well_formed": line <= well_formed} for kind in SOURCES
                   for line in range(1, 101)]
        write_jsonl(out / "eval" / f"{stage}.jsonl", replies)
        result = {"files": [{"file": "val/pretrain.jsonl", "bpb": 0.5}]}
        (out / "eval" / f"{stage}.json").write_text("questions\n" + json.dumps(result) + "\n")
    (out / "seconds").write_text("tokenizer 12\npretrain 48\n")
    (out / "control.json").write_text(json.dumps(
        {"targets": 1000, "control_targets": 1001, "conversations": 20, "control_conversations": 60}))


def report(monkeypatch, out, *flags) -> int:
    monkeypatch.setattr("sys.argv", ["quickstart.py", "report", "--out_dir", str(out), *flags])
    return quickstart.main()


@pytest.fixture
def out(tmp_path):
    for folder in ("eval", "data/eval"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_thresholds_that_are_just_met(out, monkeypatch):
    """Each at its limit: 0, and all of it is in report.json and report.md."""
    write_run(out)
    assert report(monkeypatch, out) == 0
    result = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [round(v["value"], 9) for v in result["thresholds"]] == [0.9, 0.9, 0.7, 0.95, 0.2, 0.15]
    assert all(v["met"] for v in result["thresholds"])
    assert result["stages"]["distill"]["thoughts_right"]["accuracy"] == 1.0
    text = (out / "report.md").read_text(encoding="utf-8")
    for words in ("1.0 minutes", "Thinking is 15 points", "60 conversations where distill sees 20"):
        assert words in text
    assert (out / "stages.png").stat().st_size > 5000


@pytest.mark.parametrize("changes, well_formed, missed", [
    ({"SFT_long": {"one": 89}}, 95, "one-step"), ({"SFT_long": {"facts": 89}}, 95, "asked in other words"),
    ({"SFT_long": {"never": 69}}, 95, "never asked"), ({}, 94, "well-formed"),
    ({"SFT_long": {"many": 11}}, 95, "above SFT_long"), ({"control": {"many": 16}}, 95, "above the control"),
])
def test_a_threshold_that_is_missed(out, monkeypatch, capsys, changes, well_formed, missed):
    """By one question: exit code 1 and its name on stderr; in a smoke test it does not count."""
    write_run(out, changes, well_formed)
    monkeypatch.setattr(quickstart, "draw", lambda out, scores: None)
    assert report(monkeypatch, out) == 1
    complaint = capsys.readouterr().err
    assert missed in complaint and complaint.count(";") == 0
    assert report(monkeypatch, out, "--smoke") == 0


def test_the_interval_of_a_gain():
    """Only questions on which two stages differ count: Bonett & Price's interval by hand, and no gain covers 0."""
    scores = {"distill": {"multi_step": {"n": 98}, "right_lines": list(range(40))},
              "control": {"multi_step": {"n": 98}, "right_lines": list(range(31, 50))}}
    difference, low, high = quickstart.gain(scores, "control")  # 31 only distill, 10 only the control
    assert difference == pytest.approx(21 / 98)
    reach = 1.959964 * ((0.32 + 0.11 - 0.21**2) / 100) ** 0.5
    assert (low, high) == pytest.approx((0.21 - reach, 0.21 + reach))
    scores["control"]["right_lines"] = list(range(40))
    difference, low, high = quickstart.gain(scores, "control")
    assert difference == 0 and low < 0 < high


@pytest.mark.parametrize("broken", ["eval/SFT.json", "eval/SFT.jsonl", "seconds", "control.json"])
def test_a_run_that_is_not_whole(out, monkeypatch, broken):
    write_run(out)
    for damage in ("", "{}\n"):
        (out / broken).write_text(damage)
        with pytest.raises(UserError, match="no whole run"):
            report(monkeypatch, out)


def test_reports_side_by_side(out, monkeypatch, capsys):
    """The smallest of each threshold; 1 where one is missed; other JSON is refused."""
    monkeypatch.setattr(quickstart, "draw", lambda out, scores: None)
    paths = []
    for seed, right in ((1, 95), (2, 91), (3, 89)):
        write_run(out, {"SFT_long": {"one": right}})
        report(monkeypatch, out, "--seed", str(seed))
        paths.append(str((out / "report.json").rename(out / f"seed_{seed}.json")))
    capsys.readouterr()
    assert quickstart.compare(paths[1::-1]) == 0
    assert "| 95.0% | 91.0% | **91.0%** |" in capsys.readouterr().out
    assert quickstart.compare(paths) == 1
    (out / "other.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match="not a report"):
        quickstart.compare([*paths, str(out / "other.json")])
