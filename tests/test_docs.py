"""The documents keep their word: (extra) a smoke run of the quickstart, and every command of the READMEs after it.

The commands are run unchanged, in a copy of the repository with data in data/, with flags added that make them small.
"""

import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from experiments.quickstart import STAGES, THRESHOLDS
from make_demo_data import Counting

READMES = ("README.md", "README_zh.md")
TINY = ["--batch_size", "2", "--accumulation_steps", "1", "--max_steps", "2"]
SMALLER = {  # flags that make a command small; of a flag that is given twice the last counts
    "train_tokenizer.py": [], "make_demo_data.py": [],
    "pretrain.py": [*TINY, "--preset", "nano"], "SFT.py": TINY, "SFT_long.py": TINY, "distill.py": TINY,
    "eval_model.py": ["--max_new_tokens", "8"],
    "evaluate.py": ["--max_new_tokens", "8", "--max_questions", "4", "--eval_tokens", "2000"], "export.py": [],
    "prepare_data.py": ["--data_path", "data/val", "--val_path", "data/eval", "--out_dir", "prepared",
                        "--max_bad_ratio", "1"],
}
OTHERS = ("bash quickstart.sh", "bash test.sh", "python3 -m venv .venv", "source .venv/bin/activate",
          "pip install -r requirements.txt", "pip install -r requirements-extra.txt", "pip install fastapi uvicorn")
# run by the fixture, by CI, and by runs/venv.sh, which both source


def blocks(document: str, language: str) -> list[str]:
    """The commands in a document's code blocks of a language."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [line for block in found for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> tuple[Path, str]:
    """A copy of the repository in which `bash quickstart.sh --smoke` has run, and what that printed."""
    path = tmp_path_factory.mktemp("docs") / "repo"
    ignored = shutil.ignore_patterns(".git", ".venv", ".carry", "out", "data", "weakwater_tokenizer", "__pycache__",
                                     ".*_cache")
    shutil.copytree(ROOT, path, ignore=ignored)
    venv = path / ".venv"
    venv.mkdir()
    for part in Path(sys.prefix).iterdir():
        if part.name != "installed":
            (venv / part.name).symlink_to(part)
    # runs/venv.sh must not install the pinned torch into an environment that has another one on purpose
    mark = 'echo "$(cksum < requirements.txt) requirements.txt" > .venv/installed'
    subprocess.run(["bash", "-c", mark], cwd=path, check=True)
    done = run("bash quickstart.sh --smoke --seed 7", path)
    shutil.copytree(path / "out" / "quickstart" / "data", path / "data")
    return path, done.stdout + done.stderr


def run(command: str, path: Path, stdin: str = "") -> subprocess.CompletedProcess:
    """Run a command line in the copy; it must succeed."""
    scripts = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=path, env=env, capture_output=True, text=True, input=stdin)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def serve(command: str, path: Path) -> None:
    """Start a server in the copy, run the README's client against it, and end it."""
    said, listening = [], queue.Queue()

    def read() -> None:
        """To the end: a server whose pipe is full waits."""
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"serving on (http://\S+)", line):
                listening.put(found[1])
        listening.put(None)

    with subprocess.Popen(shlex.split(command.replace("python", shlex.quote(sys.executable), 1)), cwd=path,
                          stderr=subprocess.PIPE, text=True) as server:
        reader = threading.Thread(target=read)
        reader.start()
        try:
            address = listening.get(timeout=120)
            assert address is not None, f"{command}\n{''.join(said)}"
            (client,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / READMES[0]).read_text(encoding="utf-8"),
                                   re.DOTALL | re.MULTILINE)
            assert "http://127.0.0.1:8000/v1" in client
            run(f"python -c {shlex.quote(client.replace('http://127.0.0.1:8000', address))}", path)
        finally:
            server.terminate()
            code = server.wait(60)
            reader.join()
        assert code == 0, f"{command}\n{''.join(said)}"


@pytest.mark.extra
def test_the_quickstart_runs_whole(copy):
    """Smoke: every stage, the control, all scores, a conversation and the report."""
    path, printed = copy
    out = path / "out" / "quickstart"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["seed"] == 7 and report["smoke"] is True
    assert set(report["stages"]) == set(STAGES)
    for row, scores in report["stages"].items():
        longer = ("multi_step", "elsewhere") if row not in ("pretrain", "SFT") else ()
        assert set(scores["bpb"]) == {"pretrain", "sft_512", "sft_1024", "r1_1024"}
        assert min(scores[kind]["n"] for kind in ("facts/asked", "facts/never_asked", "one_step", *longer)) >= 200
        assert sum(n for n in (scores[f"multi_step/{steps}"]["n"] for steps in range(2, 9) if longer)) == (
            scores["multi_step"]["n"] if longer else 0)
    assert 0 <= report["targets"]["control_targets"] - report["targets"]["targets"] < 10_000
    assert len(report["thresholds"]) == len(THRESHOLDS)
    assert (out / "thinking.png").stat().st_size > 5000 and (out / "stages.png").stat().st_size > 5000
    assert "[think] > 小明有3个苹果" in printed and "[no think] > 58加7等于多少？" in printed
    assert "## Does thinking help?" in printed
    assert "python eval_model.py --checkpoint out/quickstart/distill.pth" in printed.splitlines()[-2]
    assert "python serve.py --out_dir out/quickstart" in printed.splitlines()[-1]
    assert (out / "report.md").read_text(encoding="utf-8").startswith("# Quickstart (smoke test")


def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(AssertionError, match="no weights in it"):
        serve(f"python {shlex.quote(str(ROOT / 'serve.py'))} --out_dir .", tmp_path)


def test_both_readmes_have_the_same_commands():
    for language in ("bash", "powershell"):
        assert blocks(READMES[0], language) == blocks(READMES[1], language) != []


@pytest.mark.extra
def test_every_command_of_the_readme_runs(copy):
    path, _ = copy
    commands = blocks(READMES[0], "bash")
    assert set(OTHERS) <= set(commands)
    seen = set()
    for command in commands:
        if command in OTHERS or command in seen:
            continue
        seen.add(command)
        words = shlex.split(command)
        if words[1] == "serve.py":
            serve(f"{command} --port 0", path)
            continue
        assert words[0] == "python" and words[1] in SMALLER, f"{command}: this test does not know how to run it"
        if words[1] == "pretrain.py" and (path / "out" / "pretrain.pth").exists():
            command += " --out_dir out/two_cores"  # the README's second way to run it
        run(f"{command} {shlex.join(SMALLER[words[1]])}", path, stdin="你好\n")
    assert {shlex.split(command)[1] for command in seen} == set(SMALLER) - {"make_demo_data.py"} | {"serve.py"}


@pytest.mark.extra
def test_every_windows_command_runs(copy):
    """The same words in bash; setting up is left to Windows."""
    path, _ = copy
    for command in blocks(READMES[0], "powershell")[3:]:
        script = shlex.split(command)[1]
        own = " --out_dir out/windows" * (script in ("pretrain.py", "eval_model.py"))
        if script == "make_demo_data.py":
            shutil.rmtree(path / "data", ignore_errors=True)
        elif script == "train_tokenizer.py":
            shutil.rmtree(path / "weakwater_tokenizer", ignore_errors=True)
        run(f"{command}{own} {shlex.join(SMALLER[script])}", path, stdin="你好\n")


@pytest.mark.parametrize("arguments", ["--seed", "--seed x", "--fast"])
def test_mistakes_of_the_quickstart_exit_2(arguments):
    done = subprocess.run(["bash", str(ROOT / "quickstart.sh"), *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "quickstart.sh: " in done.stderr


def test_the_readmes_show_the_recorded_run():
    """The tables hold the figures of docs/results/quickstart/seed_1.json; all recorded seeds, with today's corpus, met
    all thresholds."""
    results = ROOT / "docs" / "results" / "quickstart"
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("seed_*.json"))]
    assert [report["seed"] for report in reports] == [1, 2, 3, 4, 5]
    for report in reports:
        assert [(verdict["what"], verdict["least"]) for verdict in report["thresholds"]] == [
            (what, least) for what, least, _ in THRESHOLDS]
        assert all(verdict["met"] for verdict in report["thresholds"])
        assert report["stages"]["SFT_long"]["one_step"]["n"] == sum(Counting.HELD_OUT.values())
    scores = reports[0]["stages"]
    for document in READMES:
        text = (ROOT / document).read_text(encoding="utf-8").replace("*", "")
        for kind in ("facts/asked", "facts/never_asked", "one_step", "multi_step", *(f"elsewhere/{p}" for p in "abcde"),
                     "follow_up", "unknown"):
            found = [scores[row].get(kind) for row in ("SFT_long", "control", "distill", "distill_off")]
            cells = ["" if s is None else f"{100 * s['accuracy']:.0f} % ({100 * s['interval95'][0]:.0f}–"
                     f"{100 * s['interval95'][1]:.0f})" for s in found]
            assert " | ".join(cells) in text, (document, kind)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a document's headings, to be linked to."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    """Every relative link and picture in the documents, and the heading that a link names."""
    for document in (*READMES, *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))):
        here = ROOT / document
        text = re.sub(r"^```.*?^```$", "", here.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
            path = here.parent / target if target else here
            assert path.exists(), f"{document}: {target}"
            assert not anchor or anchor in anchors(path), f"{document}: {target}#{anchor}"
