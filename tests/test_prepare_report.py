"""The report of prepare_data.py: its numbers against the manifest it is made from, and its bytes."""

import copy
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from common.files import UserError
from prepare.report import Account, _draw_lengths, _draw_sources, _draw_steps, plain, report_lines, write_report

STAGES = ("pretrain", "sft_512", "sft_1024", "r1_1024")
PNG = b"\x89PNG\r\n\x1a\n"
CLEAN = ("controls", "html", "length", "exact", "near", "too_long")


def make_manifest(sources: dict[str, int], kinds: tuple[str, ...] = ("text", "chat"), drop: float = 0.02,
                  tokens: bool = True, seed: int = 1) -> dict:
    """A manifest that adds up: `sources` maps names to numbers of records, of which each step drops about `drop`."""
    rng = random.Random(seed)
    kind_of = {source: kinds[number % len(kinds)] for number, source in enumerate(sources)}
    left, steps = dict(sources), []
    for name in CLEAN:
        gone = {source: sum(rng.random() < drop for _ in range(n)) for source, n in left.items()}
        step = {"name": name, "rule": f"The rule of {name}.", "origin": "Ours.", "on": "whole", "reasons": {},
                "by_source": {source: n for source, n in gone.items() if n}, "counts": {"lines cut": 7}}
        for key, numbers in (("in", left), ("dropped", gone), ("changed", dict.fromkeys(left, 1))):
            step[key] = {kind: sum(n for source, n in numbers.items() if kind_of[source] == kind)
                         for kind in ("text", "chat")}
        if any(gone.values()):
            step["reasons"] = {"too short": sum(gone.values())}
        left = {source: n - gone[source] for source, n in left.items()}
        steps.append(step)
    outputs = []
    for name in STAGES:
        kind, part = ("text", 1) if name == "pretrain" else ("chat", 3)
        own = {source: n // part + (n % part) * (name != "r1_1024") * (name == "sft_512")
               for source, n in left.items() if kind_of[source] == kind and n}
        outputs.append(make_output(name, own if part == 1 or own else {}, tokens))
    outputs = [output for output in outputs if output["records"]]
    if sft := next((output for output in outputs if output["name"] == "sft_512"), None):
        outputs.append(make_output("sft_mini_512", {s: n // 10 for s, n in sft["by_source"].items()}, tokens))
    inputs = [make_input(f"raw/{source}.jsonl", source, n) for source, n in sources.items()]
    inputs.append(make_input("val/held_out.jsonl", "held_out", 50, role="val"))
    return {"format": 1, "run": {"command": "python prepare_data.py", "started": "2026-01-02T03:04:05", "seconds": 61,
                                 "workers": 2, "versions": {"datatrove": "0.10.1"}},
            "settings": {"near": 0.6,
                         "skip": [], "blocklist": None},
            "inputs": inputs, "steps": steps, "outputs": outputs,
            "dropped": [{"file": "dropped/near.jsonl.zst", "records": 5, "bytes": 500, "sha256": "0"},
                        {"file": "dropped/length.jsonl.zst", "records": 9, "bytes": 900, "sha256": "1"}],
            "listed": [{"file": "listed/refusals.jsonl.zst", "records": 2, "bytes": 200, "sha256": "2"}],
            "near": {"pairs_compared": 41, "groups": 1, "largest": 3}}


def make_input(path: str, source: str, records: int, role: str = "train") -> dict:
    return {"path": path, "role": role, "source": source, "bytes": 1000 * records, "sha256": "0", "form": "JSON lines",
            "shape": "text",
            "records": records, "by_source": {source: records}, "malformed": 0, "reasons": {}, "examples": [],
            "unreadable": None}


def make_output(name: str, by_source: dict[str, int], tokens: bool) -> dict:
    n = sum(by_source.values())
    return {"name": name, "records": n, "bytes": 300 * n, "characters": 100 * n, "tokens": 60 * n if tokens else None,
            "files": [{"name": f"{name}-00000.jsonl.zst", "bytes": 90 * n, "sha256": "0", "records": n}],
            "by_source": by_source, "lengths": {"unit": "tokens" if tokens else "characters",
                                                "edges": [0, 64, 512, 4096], "counts": [n - n // 3, n // 3, 0]}}


def report_of(manifest: dict) -> str:
    """The text of the report; checks that its tables are tables."""
    report = "\n".join(report_lines(manifest))
    for line, before in zip(report.splitlines()[1:], report.splitlines(), strict=False):
        if line.startswith("|") and before.startswith("|"):
            assert len(cells(line)) == len(cells(before)), (before, line)
    return report


def written_in(folder: Path, manifest: dict) -> dict[str, bytes]:
    """Write the report; returns the files."""
    write_report(folder, manifest)
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert sorted(files) == ["charts/lengths.png", "charts/sources.png", "charts/steps.png", "data_report.md"]
    assert files["data_report.md"].decode("utf-8") == report_of(manifest) + "\n"
    assert all(data[:8] == PNG for name, data in files.items() if name.endswith(".png"))
    return files


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def section(report: str, title: str) -> str:
    return report.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(report: str, title: str) -> list[list[str]]:
    """The rows of the first table in a section, without its titles."""
    rows = [cells(line) for line in section(report, title).splitlines() if line.startswith("|")]
    return rows[2:]


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


# ---------------------------------------------------------------------------------------------


def test_the_account_adds_up_in_total_by_step_and_by_source():
    manifest = make_manifest({"web": 4000, "chats": 3000, "books": 100})
    report = report_of(manifest)
    line = next(line for line in section(report, "The account").splitlines() if " read = " in line)
    sums = re.match(r"([\d,]+) read = ([\d,]+) dropped \+ ([\d,]+) written", line)
    read, dropped, written = map(number, sums.groups())
    assert read == 7100 == dropped + written
    terms = dict(re.findall(r"(\w+) ([\d,]+)(?: \+|\.)", line.partition("Dropped: ")[2]))
    assert {step: number(n) for step, n in terms.items()} == {
        step["name"]: sum(step["by_source"].values()) for step in manifest["steps"]}
    assert sum(map(number, terms.values())) == dropped
    rows = {row[1]: [number(cell) for cell in row[3:6]] for row in table(report, "The account")}
    assert {source: n[0] for source, n in rows.items()} == {"web": 4000, "chats": 3000, "books": 100}
    for source, (n_read, n_dropped, n_written) in rows.items():
        assert n_read == n_dropped + n_written
        assert n_dropped == sum(step["by_source"].get(source, 0) for step in manifest["steps"])


def test_records_that_name_their_source_are_counted_under_it(tmp_path):
    manifest = make_manifest({f"site {n}": 10 + n for n in range(120)}, kinds=("text",), drop=0.1)
    names = manifest["inputs"][:-1]
    merged = make_input("raw/web.parquet", "web", sum(item["records"] for item in names))
    merged["by_source"] = {item["source"]: item["records"] for item in names}
    manifest["inputs"] = [merged, manifest["inputs"][-1]]
    report = report_of(manifest)
    assert "does not add up" not in report and "**The difference" not in report
    rows = table(report, "The account")
    assert len(rows) == 100 and rows[-1][:2] == ["", "21 others"]
    assert [sum(number(row[column]) for row in rows) for column in (3, 4, 5)] == [
        merged["records"], sum(sum(step["by_source"].values()) for step in manifest["steps"]),
        manifest["outputs"][0]["records"]]
    manifest["steps"][0]["by_source"] = {name: n // 2 for name, n in merged["by_source"].items()}
    warnings = section(report_of(manifest), "Warnings")
    about = [line for line in warnings.splitlines() if "site" in line]
    assert len(about) == 20 and about[0].startswith("- site 119")  # those with the most records
    assert "more like these: see manifest.json." in warnings


def test_thousands_of_files_take_a_table_of_a_hundred_rows():
    manifest = make_manifest({f"{n:05d}": 1 + n % 7 for n in range(3000)}, kinds=("text",), drop=0.1)
    for item in manifest["inputs"]:
        item |= {"malformed": 1, "reasons": {"not JSON": 1}, "examples": [f"{item['path']} line 2: not JSON"]}
    report = report_of(manifest)
    rows = table(report, "What came in")
    assert len(rows) == 101 and rows[99][0] == "2,901 others" and rows[100][1] == "validation"
    assert sum(number(row[6]) for row in rows[:100]) == sum(n for n in (1 + n % 7 for n in range(3000)))
    assert len(report.splitlines()) < 700


def test_a_sample_is_shown_but_not_counted_twice():
    manifest = make_manifest({"web": 40, "chats": 300})
    report = report_of(manifest)
    assert "sft_mini_512" in [row[0] for row in table(report, "What came out")]
    assert "sft_mini_512 is a sample: its records are in sft_512 too." in report
    written = sum(output["records"] for output in manifest["outputs"] if output["name"] != "sft_mini_512")
    assert f"**{written:,}** written" in report and "does not add up" not in report


def test_what_does_not_add_up_is_said():
    manifest = make_manifest({"web": 400, "chats": 300})
    manifest["outputs"][0]["by_source"]["web"] -= 2
    report = report_of(manifest)
    assert "- web: the account does not add up, +2 records." in section(report, "Warnings")
    assert "**The difference is +2.**" in section(report, "The account")


def test_equal_manifests_give_equal_bytes_whatever_the_run(tmp_path):
    manifest = make_manifest({"web": 400, "chats": 300, "more": 7})
    manifest["steps"][2]["reasons"] = {"too short": 3, "too long": 3, "other": 9}
    other = copy.deepcopy(manifest)
    other["run"] = {"command": "another", "started": "later", "seconds": 9, "workers": 16, "versions": {}}
    other["steps"][2]["reasons"] = {"other": 9, "too long": 3, "too short": 3}  # counted in another order
    files = written_in(tmp_path / "a", manifest)
    assert files == written_in(tmp_path / "b", other)
    report = files["data_report.md"].decode("utf-8")
    assert "2026" not in report and "datatrove" not in report
    assert not any(chunk in data for data in files.values() for chunk in (b"Software", b"tEXt", b"tIME"))


def test_a_clean_run_has_no_warnings():
    assert section(report_of(make_manifest({"web": 400, "chats": 300})), "Warnings").strip() == "None."


def test_warnings():
    manifest = make_manifest({"web": 400, "chats": 300, "lost": 20, "void": 0})
    web, _, lost, void, val = manifest["inputs"]
    web |= {"malformed": 5, "reasons": {"not JSON": 4, "no known shape": 1}, "examples": ["web.jsonl line 3: not JSON"]}
    lost["unreadable"] = "truncated after line 20"
    val["role"] = "train"
    for output in manifest["outputs"]:
        output["by_source"].pop("lost", None)
    manifest["outputs"] = [output for output in manifest["outputs"] if output["name"] not in ("sft_1024", "r1_1024")]
    manifest["steps"] = [step | {"by_source": {}} for step in manifest["steps"]]
    manifest["steps"][3] |= {"by_source": {"lost": 20, "chats": 90}}
    warnings = section(report_of(manifest), "Warnings")
    for expected in (
            "- raw/lost.jsonl could not be read to its end: truncated after line 20. 20 records before that are used.",
            "- web: 5 of 405 records (1.2 %) are malformed and were left out.",
            "- lost vanished: none of its 20 records is left.", "- exact dropped 100.0 % of lost (20 of 20).",
            "- void: no record could be read.", "- No validation files were given (`--val_path`)",
            "- Nothing was written for `SFT_long.py` (sft_1024) and `distill.py` (r1_1024)."):
        assert expected in warnings, expected
    assert "of chats (" not in warnings  # 30 % are not more than 30 %


def test_a_share_of_malformed_records_up_to_a_hundredth_is_no_warning():
    manifest = make_manifest({"web": 990, "chats": 300})
    examples = ["raw/web.jsonl line 3: a" * 99]
    manifest["inputs"][0] |= {"malformed": 10, "reasons": {"not JSON": 10}, "examples": examples}
    report = report_of(manifest)
    assert section(report, "Warnings").strip() == "None."
    shown = section(report, "What came in")
    assert "- web, malformed: not JSON 10" in shown
    assert "  - raw/web.jsonl line 3: a" in shown and max(map(len, shown.splitlines())) < 260


def test_examples_and_reasons_are_of_all_files_of_a_source():
    manifest = make_manifest({"web": 400, "chats": 300})
    more = make_input("raw/more.jsonl", "web", 0)
    for item, letter in ((manifest["inputs"][0], "a"), (more, "b")):
        item |= {"malformed": 4, "reasons": {"not JSON": 3, "no known shape": 1},
                 "examples": [f"{letter}.jsonl line {n}: not JSON" for n in range(4)]}
    manifest["inputs"].insert(1, more)
    report = report_of(manifest)
    assert table(report, "What came in")[0][4:8] == ["2", "400.0 kB", "400", "8"]
    assert table(report, "What came in")[-1][:2] == ["held_out", "validation"]
    assert "web, malformed: not JSON 6 · no known shape 2" in report
    assert re.findall(r"^  - (\w)\.jsonl line", report, re.MULTILINE) == list("aaaab")


HOSTILE = ["a|b.jsonl", "`rm`", "two\nlines", "新闻 2024", "<b>bold</b>", "*x* _y_ $z$ [l](u)", "back\\slash",
           "\u202eevil", "bad\udcff", "x" * 300, " ", "🌊"]


def test_any_name_is_shown_as_it_is():
    manifest = make_manifest(dict.fromkeys(HOSTILE, 40))
    for item in manifest["inputs"]:
        item |= {"malformed": 3, "reasons": {item["source"]: 3}, "examples": [f"{item['path']} line 1: | <img> \n# no"],
                 "unreadable": f"at {item['source']}"}
    report = report_of(manifest)
    rows = table(report, "What came in")
    assert len(rows) == len(HOSTILE) + 1  # and the validation files
    for row, name in zip(rows, HOSTILE, strict=False):
        assert row[0] == plain(name).strip()
    assert re.sub(r"\\([\W_])", r"\1", plain("a|b_c _d_ <e> 新\n")) == "a|b_c _d_ <e> 新\\n"
    assert "a\\|b" in report and "\\<b\\>" in report and "新闻 2024" in report and "two\\\\nlines" in report
    assert "\\u202e" in report and "\u202e" not in report and not re.search(r"^# no", report, re.MULTILINE)


@pytest.mark.parametrize("sources, kinds", [
    ({"one": 50}, ("text",)), ({"one": 50}, ("chat",)), ({f"s{n}": 30 + n for n in range(45)}, ("text", "chat")),
    ({"none": 0}, ("text",)), ({}, ("text",))], ids=["text", "chats", "45 sources", "zeros", "nothing"])
def test_any_size(tmp_path, sources, kinds):
    manifest = make_manifest(sources, kinds)
    if not sources:
        manifest |= {"inputs": [], "steps": [], "dropped": [], "listed": [], "near": None}
    report = written_in(tmp_path, manifest)["data_report.md"].decode("utf-8")
    assert len([row for row in table(report, "What came in") if row[1] == "training"]) == len(sources)
    titles = next((line for line in section(report, "What the steps did").splitlines() if line.startswith("| ")), "")
    if len(kinds) == 1 and sum(sources.values()):
        assert ("documents in" in titles) == (kinds == ("text",)) and ("chats in" in titles) == (kinds == ("chat",))
    warnings = section(report, "Warnings")
    assert ("`pretrain.py` (pretrain)" in warnings) == ("text" not in kinds or not sum(sources.values()))
    assert ("`SFT.py` (sft_512)" in warnings) == ("chat" not in kinds)
    if not sum(sources.values()):
        assert "Nothing was written, so there is nothing to train on." in report


def test_what_to_run_next():
    manifest = make_manifest({"web": 400, "chats": 300})

    def commands() -> list[str]:
        shown = section(report_of(manifest), "What to run next")
        return [line for line in shown.splitlines() if line.startswith("python ")]

    stages = [f"python {name}.py" for name in ("train_tokenizer", "pretrain", "SFT", "SFT_long", "distill")]
    assert commands() == stages
    assert "zstd -dc data/dropped/length.jsonl.zst | head -n 3" in report_of(manifest)

    manifest = make_manifest({"web": 400}, kinds=("text",), tokens=False)
    assert commands() == stages[:2]
    assert "not counted" in report_of(manifest)


def test_chats_that_wait_for_a_tokenizer():
    manifest = make_manifest({"web": 400, "chats": 300}, tokens=False)
    chats = [output for output in manifest["outputs"] if output["name"] in STAGES[1:]]
    manifest["waiting"] = {"chats": sum(output["records"] for output in chats)}
    manifest["outputs"] = manifest["outputs"][:1]
    report = report_of(manifest)
    assert "does not add up" not in report and "vanished" not in report
    assert f"{manifest['waiting']['chats']} chats wait for a tokenizer" in section(report, "Warnings")
    assert "```bash\npython train_tokenizer.py\n```\n\nThen the command that wrote this, with `--resume`" in report


def test_the_charts_show_the_numbers():
    sources = {f"s{n}": 100 + n for n in range(12)}
    manifest = make_manifest(sources, drop=0.1)
    account = Account(manifest)
    steps = _draw_steps(manifest, account).axes[0]
    widths = Counter()
    for bar in steps.patches:
        widths[round(bar.get_y() + bar.get_height() / 2)] += round(bar.get_width())
    assert [widths[row] for row in range(len(CLEAN))] == [sum(step["by_source"].values()) for step in manifest["steps"]]
    ends = [max(bar.get_x() + bar.get_width() for bar in steps.patches if round(bar.get_y() + 0.4) == row)
            for row in range(len(CLEAN))]
    assert ends == [widths[row] for row in range(len(CLEAN))]  # the bars of a step begin where the one before ends
    assert [label.get_text() for label in steps.get_yticklabels()] == list(CLEAN)
    bars = [round(bar.get_width()) for bar in _draw_sources(manifest, account).axes[0].patches]
    assert bars == [*sources.values(), *(account.written[source] for source in sources)]
    for axes, output in zip(_draw_lengths(manifest, account).axes, manifest["outputs"], strict=True):
        assert [round(bar.get_height()) for bar in axes.patches] == output["lengths"]["counts"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "64", "512", "4,096"]


def test_a_report_that_cannot_be_written_is_an_error_and_the_old_one_stays(tmp_path):
    (tmp_path / "data_report.md").write_text("old", encoding="utf-8")
    (tmp_path / "charts").write_text("a file", encoding="utf-8")
    with pytest.raises(UserError, match="cannot save"):
        write_report(tmp_path, make_manifest({"web": 40}))
    assert (tmp_path / "data_report.md").read_text(encoding="utf-8") == "old"
