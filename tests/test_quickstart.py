"""The verdict of the quickstart: thresholds and gains, on results made by hand."""

import json

import pytest
from conftest import write_jsonl

from Config import UserError
from experiments import quickstart

RIGHT = {  # row of the report: how many of 100 questions of each source are right, so that thresholds are just met
    "pretrain": {"facts/asked": 0, "facts/never_asked": 0, "one_step": 0},
    "SFT": {"facts/asked": 90, "facts/never_asked": 70, "one_step": 90},
    "SFT_long": {"facts/asked": 95, "facts/never_asked": 80, "one_step": 90, "multi_step/2": 4, "elsewhere/a": 9,
                 "elsewhere/b": 9, "elsewhere/c": 9, "elsewhere/d": 9, "elsewhere/e": 9},
    "control": {"facts/asked": 50, "facts/never_asked": 50, "one_step": 50, "multi_step/2": 30, "elsewhere/a": 60,
                "elsewhere/b": 55, "elsewhere/c": 55, "elsewhere/d": 50, "elsewhere/e": 9},
    "distill": {"facts/asked": 90, "facts/never_asked": 80, "one_step": 92, "multi_step/2": 93, "elsewhere/a": 90,
                "elsewhere/b": 85, "elsewhere/c": 85, "elsewhere/d": 80, "elsewhere/e": 9, "follow_up/step": 85,
                "unknown/people": 90},
    "distill_off": {"facts/asked": 90, "facts/never_asked": 80, "one_step": 50, "multi_step/2": 9, "elsewhere/a": 9,
                    "follow_up/step": 9, "unknown/people": 9},
}
LIMITS = [0.9, 0.95, 0.8, 0.93, 0.92, 0.98, 0.9, 0.85, 0.85, 0.8, 0.3, 0.9, 0.8, 0.9, 0.8, 0.85, 0.9, 0.97, 0.98, 0.98]
THOUGHT = ["有3", "买2：3+2=5", "问有多少"]


def write_run(out, changes=None, well_formed=98, thought_answers=98, declined=3):
    """What quickstart.sh leaves for the report. `changes`: {row: {source: how many are right}}; the others: of 100."""
    write_jsonl(out / "data" / "eval" / "multi_step.jsonl", [{"thought": THOUGHT}] * 100)
    replies = {}
    for row, right in RIGHT.items():
        stage, thinking, _ = quickstart.STAGES[row]
        right = right | (changes or {}).get(row, {})
        for number, source in enumerate(right):
            for line in range(1, 101):
                given = 5 if line <= thought_answers else 6
                reply = "<think>\n" + "\n".join(THOUGHT) + f"\n</think>\n<answer>有{given}个。</answer>"
                replies.setdefault(stage, []).append({
                    "source": source, "line": line + 100 * number * source.startswith("elsewhere"),
                    "thinking": thinking,
                    "correct": line <= right[source], "reply": reply, "file": "anywhere.jsonl",
                    "declined": line <= declined, "well_formed": line <= well_formed})
    for stage, written in replies.items():
        write_jsonl(out / "eval" / f"{stage}.jsonl", written)
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
    assert [round(v["value"], 9) for v in result["thresholds"]] == LIMITS
    assert all(v["met"] and v["interval95"][0] < v["value"] < v["interval95"][1] for v in result["thresholds"])
    assert result["stages"]["distill"]["thoughts_right"]["accuracy"] == 1.0
    text = (out / "report.md").read_text(encoding="utf-8")
    for words in ("1.0 minutes", "thinking is 30 points", "60 conversations where distill sees 20"):
        assert words in text
    assert (out / "stages.png").stat().st_size > 5000


@pytest.mark.parametrize("changes, others, missed", [
    ({"SFT_long": {"one_step": 89}}, {}, "SFT_long answers one-step"),
    ({"SFT_long": {"facts/asked": 94}}, {}, "SFT_long answers facts asked"),
    ({"SFT_long": {"facts/never_asked": 79}}, {}, "SFT_long answers facts never"),
    ({"distill": {"multi_step/2": 89}}, {}, "2 to 8 steps"), ({"distill": {"one_step": 91}}, {}, "sums and one-step"),
    ({"distill": {"elsewhere/a": 89}, "control": {"elsewhere/a": 59}}, {}, "elsewhere a"),
    ({"distill": {"elsewhere/b": 84}, "control": {"elsewhere/b": 54}}, {}, "elsewhere b"),
    ({"distill": {"elsewhere/c": 84}, "control": {"elsewhere/c": 54}}, {}, "elsewhere c"),
    ({"distill": {"elsewhere/d": 79}, "control": {"elsewhere/d": 49}}, {}, "elsewhere d"),
    ({"control": {"elsewhere/d": 51}}, {}, "above the control"),
    ({"distill": {"facts/asked": 89}}, {}, "thinking: facts asked"),
    ({"distill": {"facts/never_asked": 79}}, {}, "thinking: facts never"),
    ({"distill_off": {"facts/asked": 89}}, {}, "off: facts asked"),
    ({"distill_off": {"facts/never_asked": 79}}, {}, "off: facts never"),
    ({"distill": {"follow_up/step": 84}}, {}, "follow-ups"), ({"distill": {"unknown/people": 89}}, {}, "unknown"),
    ({}, {"thought_answers": 97}, "the thought's number"), ({}, {"declined": 6}, "not declined"),
    ({}, {"well_formed": 97}, "well-formed; thinking off: without tags"),
])
def test_a_threshold_that_is_missed(out, monkeypatch, capsys, changes, others, missed):
    """By one question: exit code 1 and its name on stderr; in a smoke test it does not count."""
    write_run(out, changes, **others)
    monkeypatch.setattr(quickstart, "draw", lambda out, scores: None)
    assert report(monkeypatch, out) == 1
    complaint = capsys.readouterr().err
    assert missed in complaint and complaint.count(";") == missed.count(";")
    assert report(monkeypatch, out, "--smoke") == 0


def test_elsewhere_e_is_reported_without_a_threshold(out, monkeypatch):
    write_run(out, {"distill": {"elsewhere/e": 0}})
    monkeypatch.setattr(quickstart, "draw", lambda out, scores: None)
    assert report(monkeypatch, out) == 0
    assert "| distill: thinks first | 90% (83–94) | 85% (77–91) | 85% (77–91) | 80% (71–87) | 0% (0–4) |" in (
        out / "report.md").read_text(encoding="utf-8")


def test_the_interval_of_a_gain():
    """Only questions on which two stages differ count: Bonett & Price's interval by hand, and no gain covers 0."""
    scores = {"distill": {"elsewhere": {"n": 98}, "right_elsewhere": list(range(40))},
              "control": {"elsewhere": {"n": 98}, "right_elsewhere": list(range(31, 50))}}
    found = quickstart.gain(scores, "control")  # 31 only distill, 10 only the control
    assert found["accuracy"] == pytest.approx(21 / 98)
    reach = 1.959964 * ((0.32 + 0.11 - 0.21**2) / 100) ** 0.5
    assert found["interval95"] == pytest.approx([0.21 - reach, 0.21 + reach])
    scores["control"]["right_elsewhere"] = list(range(40))
    found = quickstart.gain(scores, "control")
    assert found["accuracy"] == 0 and found["interval95"][0] < 0 < found["interval95"][1]


@pytest.mark.parametrize("reply, right", [
    ("<think>\n3+2=5\n</think>\n<answer>等于5。</answer>", True),
    ("<think>\n3+2=5\n</think>\n<answer>等于6。</answer>", False),
    ("<think>\n有3\n买2：3+2=5\n问有多少\n</think>\n<answer>有5个。</answer>", True),
    ("等于5。", False), ("<think>\n不", False)])
def test_the_answer_is_the_last_number_of_the_thought(reply, right):
    assert quickstart.gives_its_thought(reply) is right


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
    for seed, right in ((1, 96), (2, 92), (3, 89)):
        write_run(out, {"SFT_long": {"one_step": right}})
        report(monkeypatch, out, "--seed", str(seed))
        paths.append(str((out / "report.json").rename(out / f"seed_{seed}.json")))
    capsys.readouterr()
    assert quickstart.compare(paths[1::-1]) == 0
    assert "| 96.0% | 92.0% | **92.0%** |" in capsys.readouterr().out
    assert quickstart.compare(paths) == 1
    (out / "other.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match="not a report"):
        quickstart.compare([*paths, str(out / "other.json")])
