"""Every script ends by the same rules: where stdout is closed or full, and where a console has another encoding."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, stage_argv
from faults import run

import evaluate
import pretrain
from common import exits

FULL = "error: stdout: No space left on device\n"


def entry_points() -> list[str]:
    """All files that may be run, by their paths from the root."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name[0] != "." and name not in ("tests", "out", "data")]
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py" and 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
                found.append(str(path.relative_to(ROOT)))
    return sorted(found)


def test_entry_points_are_found():
    assert {"pretrain.py", "evaluate.py", "docs/refresh.py", "fastpath/known.py", "benchmarks/step_profile.py",
            "experiments/quickstart.py", "make_demo_data.py", "train_tokenizer.py"} <= set(entry_points())


@pytest.mark.parametrize("script", entry_points())
def test_help_of_every_script_on_another_console_in_a_closed_pipe_and_on_a_full_disk(script):
    ended = run(script, ["--help"], encoding="cp1252")
    assert ended.code == 0 and ended.err == "" and ended.out.startswith("usage: "), ended
    ended = run(script, ["--help"], stdout="closed")
    assert ended.code == 141 and ended.err == "", ended
    ended = run(script, ["--help"], stdout="/dev/full")
    assert ended.code == 2 and ended.err == FULL, ended


@pytest.mark.extra
@pytest.mark.parametrize("script", entry_points())
def test_help_of_every_script_in_real_processes(script):
    as_module = script.startswith(("fastpath/", "text/"))
    command = [sys.executable, *(["-m", script.removesuffix(".py").replace("/", ".")] if as_module else [script])]
    options = dict(cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    started = subprocess.Popen([*command, "--help"], stdout=subprocess.PIPE, **options)
    started.stdout.close()
    ended = [(subprocess.run([*command, "--help"], stdout=subprocess.PIPE, **options), 0)]
    with open("/dev/full", "w") as full:
        ended.append((subprocess.run([*command, "--help"], stdout=full, **options), 2))
    errors = [started.stderr.read(), *(done.stderr for done, _ in ended)]
    assert started.wait() == 141
    for done, code in ended:
        assert done.returncode == code, done
    for text in errors:
        assert b"Traceback" not in text and b"Exception ignored" not in text


# ---------------------------------------------------------------------------------------------
# stdout fails at some line of a script's output


class FailingStdout:
    """A stdout whose write or flush fails from the line on that has a word in it."""

    def __init__(self, word: str, number: int):
        self.word, self.number, self.failing = word, number, False

    def write(self, text: str) -> int:
        self.failing |= self.word in text
        self.flush()
        return len(text)

    def flush(self) -> None:
        if self.failing:
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number, code, said", [(errno.EPIPE, 141, ""), (errno.ENOSPC, 2, FULL),
                                                (errno.EIO, 2, "error: stdout: Input/output error\n")])
@pytest.mark.parametrize("word", ["tokenizing", "data: ", "sample: ", "charts"])
def test_a_failing_stdout_is_not_blamed_on_a_file(text_file, tokenizer_dir, tmp_path, monkeypatch, capsys, word, number,
                                                  code, said):
    """The lines of a stage stand between reading, writing and drawing, each of which has failures of its own."""
    def no_charts(*arguments, **flags):
        raise OSError("no charts")

    argv = stage_argv(text_file, tokenizer_dir, tmp_path / "out", preset="nano", max_seq_len=64, max_steps=1)
    monkeypatch.setattr("matplotlib.use", no_charts)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", FailingStdout(word, number))
        assert exits.run(lambda: pretrain.main(argv)) == code
        assert isinstance(sys.stdout, FailingStdout), "it is put back"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failing_stdout_of_an_evaluation(text_file, tokenizer_dir, tmp_path, monkeypatch, capsys):
    argv = stage_argv(text_file, tokenizer_dir, tmp_path, preset="nano", max_seq_len=64, max_steps=1)
    monkeypatch.setattr("common.runlog.RunLog.charts", lambda self: None)
    pretrain.main(argv)
    capsys.readouterr()
    for number, code, said in ((errno.EPIPE, 141, ""), (errno.ENOSPC, 2, FULL)):
        argv = ["--checkpoint", str(tmp_path / "pretrain.pth"), "--out_dir", str(tmp_path / str(code)), "--device",
                "cpu", "--data_path", str(text_file)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", FailingStdout("tokenizing", number))
            assert exits.run(lambda argv=argv: evaluate.main(argv)) == code
        assert capsys.readouterr().err == said


# ---------------------------------------------------------------------------------------------
# real ends of a Python process


def end_of(code: str, redirect: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a `main` with this body, of a process whose streams a shell redirects."""
    body = "".join(f"    {line}\n" for line in code.splitlines())
    program = f"import os, sys\nfrom common import exits\nfrom Config import UserError\n\ndef main():\n{body}\n"
    program += "sys.exit(exits.run(main))\n"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", f'set -o pipefail; "$0" -c "$1" {redirect}', sys.executable, program],
                          cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


ERROR = 'raise UserError("wrong")'


@pytest.mark.parametrize("code, redirect, expected", [
    ('print("a")', "> /dev/full", (2, "", FULL)),
    ('print("a" * 99999)', "> /dev/full", (2, "", FULL)),
    ('print("a" * 99999, flush=True)', "| true", (141, "", "")),
    ('import time; time.sleep(0.3); print("a")', "| true", (141, "", "")),
    ('print("a"); return 1', "> /dev/full", (1, "", "")),  # the script's own end comes first
    (f'print("a"); {ERROR}', "> /dev/full", (2, "", "error: wrong\n")),
    ('print("a"); sys.exit("stop")', "", (1, "a\n", "stop\n")),
    ("sys.exit(3)", "> /dev/full", (3, "", "")),
    ("print('a')", ">&-", (0, "", "")),
    (ERROR, "2> /dev/full", (2, "", "")),
    (ERROR, "2>&-", (2, "", "")),
    ("print('a', file=sys.stderr)", "2> /dev/full", (0, "", "")),
    ("print('a'); 1 / 0", "> /dev/full 2> /dev/full", (1, "", "")),
    ("print('a')", "> /dev/full 2> /dev/full", (2, "", "")),
    ("print('数', os.fsdecode(bytes([255])))", "", (0, "数 \\udcff\n", "")),
    ("raise UserError('数' + os.fsdecode(bytes([255])))", "", (2, "", "error: 数\\udcff\n")),
])
def test_how_a_process_ends(code, redirect, expected):
    assert end_of(code, redirect) == expected


def test_a_broken_pipe_that_is_not_stdout_is_a_defect():
    code, _, errors = end_of("raise BrokenPipeError(32, 'Broken pipe')")
    assert code == 1 and "Traceback" in errors


def test_the_guarded_stdout_is_stdout_in_all_else(capsys):
    seen = []
    assert exits.run(lambda: seen.extend([sys.stdout.encoding, sys.stdout.errors, sys.stdout.isatty()])) == 0
    assert seen == ["utf-8", "backslashreplace", False]
