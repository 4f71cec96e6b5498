"""common/files.py, lock.py and exits.py on file systems, consoles and machines that are not this one."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, make_texts, stage_argv, train, write_jsonl

from common import checkpoint, files, lock
from common.lock import OutDirLock
from Config import UserError
from text.tokenizer import load_tokenizer

ENV = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


def refuse(monkeypatch, name: str, code: int, when=lambda *_: True, times: int = 10**9) -> list:
    """Let os.`name` fail with an error code in the first `times` calls for which `when` is true. Returns them."""
    operation, refused = getattr(os, name), []

    def attempt(*arguments, **options):
        if when(*arguments) and len(refused) < times:
            refused.append(arguments)
            raise OSError(code, os.strerror(code))
        return operation(*arguments, **options)

    monkeypatch.setattr(os, name, attempt)
    return refused


def is_folder(descriptor: int) -> bool:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir()


# ---------------------------------------------------------------------------------------------
# file systems


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("what", ["folders", "anything"])
def test_a_file_system_that_cannot_sync(tmp_path, monkeypatch, code, what):
    """CIFS, VirtualBox, FUSE: what was written is written, so it is not a failed save."""
    refused = refuse(monkeypatch, "fsync", code, is_folder if what == "folders" else lambda *_: True)
    files.write_lines(tmp_path / "a.txt", ["甲"])
    files.write_folder(tmp_path / "b", lambda folder: (folder / "c").write_text("乙", encoding="utf-8"))
    assert refused and (tmp_path / "a.txt").read_text(encoding="utf-8") == "甲\n"
    assert (tmp_path / "b" / "c").read_text(encoding="utf-8") == "乙" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_sync_that_loses_something_is_a_failed_save(tmp_path, monkeypatch, code):
    """The old content stays, and the file is named."""
    files.write_lines(tmp_path / "a.txt", ["old"])
    refuse(monkeypatch, "fsync", code, lambda descriptor: not is_folder(descriptor))
    with pytest.raises(UserError, match="cannot save .*a.txt"):
        files.write_lines(tmp_path / "a.txt", ["new"])
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old\n" and not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch):
    """As on Windows."""
    refuse(monkeypatch, "open", errno.EACCES)
    files.sync_folder(tmp_path)


@pytest.mark.parametrize("times", [1, 3])
def test_a_refused_rename_is_tried_again(tmp_path, monkeypatch, times):
    """On Windows a virus scanner may have the file open for a moment."""
    refused = refuse(monkeypatch, "replace", errno.EACCES, times=times)
    files.write_lines(tmp_path / "a.txt", ["甲"])
    assert len(refused) == times and (tmp_path / "a.txt").exists()
    refused = refuse(monkeypatch, "rename", errno.EACCES, times=times)
    assert files.write_folder(tmp_path / "b", lambda folder: (folder / "c").touch()) and len(refused) == times


def test_a_rename_that_is_always_refused_is_a_failed_save(tmp_path, monkeypatch):
    """After about a second."""
    begin = time.monotonic()
    refuse(monkeypatch, "replace", errno.EACCES)
    with pytest.raises(UserError, match="cannot save .*a.txt.*denied"):
        files.write_lines(tmp_path / "a.txt", ["甲"])
    assert time.monotonic() - begin < 3 and not list(tmp_path.iterdir())


def test_a_damaged_state_is_set_aside_also_at_the_second_try(tmp_path, monkeypatch):
    """Renames of checkpoints are tried again as well."""
    folder = checkpoint.checkpoint_folder(str(tmp_path), "pretrain")
    checkpoint.save_state({"step": 1}, str(tmp_path), "pretrain", 2)
    (folder / "step_00000002.pth").write_bytes(b"damaged")
    refuse(monkeypatch, "replace", errno.EACCES, times=1)
    assert checkpoint.newest_state(str(tmp_path), "pretrain", ("step",))[0] == {"step": 1}
    assert (folder / "step_00000002.pth.damaged").exists()


def leftover(folder: Path, host: str, process: int, age: float = 0.0) -> Path:
    """A half-written folder of a process, last written `age` seconds ago."""
    path = folder / f".cache.{host}.{process}.tmp"
    path.mkdir()
    for each in (path / "tokens.bin", path):
        each.touch()
        os.utime(each, (time.time() - age,) * 2)
    return path


def test_leftovers_of_another_host_are_judged_by_their_age(tmp_path):
    """The same process number means nothing there: its process is not seen from here."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = leftover(tmp_path, files.HOST, dead.pid)
    living = leftover(tmp_path, files.HOST, os.getppid())
    new, old = (leftover(tmp_path, host, dead.pid, age) for host, age in (("other", 3600), ("another", 100_000)))
    files.remove_leftovers(tmp_path, "cache")
    assert [path.exists() for path in (ours, living, new, old)] == [False, True, True, False]
    files.remove_leftovers(tmp_path, "cache", locked=True)
    assert not living.exists() and not new.exists()


def test_leftovers_of_an_earlier_version_go_too(tmp_path):
    """Their names have no host."""
    (tmp_path / ".a.pth.4711.tmp").touch()
    os.utime(tmp_path / ".a.pth.4711.tmp", (0, 0))
    files.remove_leftovers(tmp_path, "*.pth")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# names that are no UTF-8

STRANGE = os.fsdecode(b"\xff\xfe\xe9 a")


def test_a_lone_surrogate_is_written_escaped(tmp_path):
    """In JSON, and in plain lines."""
    files.write_jsonl(tmp_path / "a.jsonl", [{"file": STRANGE, "甲": "\ud800"}])
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == {"file": STRANGE, "甲": "\ud800"}


def test_files_and_folders_with_names_that_are_no_utf8(tmp_path, tokenizer_dir):
    """Training, resuming, scoring and chatting work, and leave nothing half-written."""
    folder = tmp_path / STRANGE
    folder.mkdir()
    data = write_jsonl(folder / f"{STRANGE}.jsonl", make_texts(3, 40, longest=60))
    asked = write_jsonl(folder / f"q {STRANGE}.jsonl", [{"question": "1+1", "answer": "2", "source": "\ud800"}])
    os.symlink(tokenizer_dir, folder / f"t {STRANGE}")
    flags = dict(preset="nano", max_seq_len=64, batch_size=4, eval_interval=1)

    def run(*argv) -> subprocess.CompletedProcess:
        done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=ENV, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done

    for steps, resume in ((2, False), (3, True)):
        run("pretrain.py", *stage_argv(data, folder / f"t {STRANGE}", folder / "out", max_steps=steps, resume=resume,
                                       **flags))
    weights = folder / "out" / "pretrain.pth"
    scored = run("evaluate.py", "--checkpoint", weights, "--data_path", data, asked, "--out_dir", folder / "out",
                 "--max_new_tokens", 2, "--max_bad_ratio", 1)
    result = json.loads(scored.stdout.decode().splitlines()[-1])
    assert result["files"][0]["file"] == str(data) and result["exact"]["questions"] == 1
    run("eval_model.py", "--checkpoint", weights, "--prompt", "水", "--max_new_tokens", 2)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


# ---------------------------------------------------------------------------------------------
# one run in a folder


@pytest.fixture
def argv(text_file, tokenizer_dir, tmp_path) -> list[str]:
    """A pretraining run of many steps in tmp_path/out."""
    return stage_argv(text_file, tokenizer_dir, tmp_path / "out", preset="nano", max_seq_len=32, batch_size=1,
                      max_steps=10**6, epochs=10**5, save_interval=10)


def start(argv: list[str], script: str = "pretrain.py") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, script, *argv], cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_two_runs_started_in_one_folder(text_file, tokenizer_dir, tmp_path):
    """At the same moment: one trains, the other exits with 2 and names the host, the process and the command."""
    argv = stage_argv(text_file, tokenizer_dir, tmp_path / "out", preset="nano", max_seq_len=32, batch_size=1,
                      max_steps=40)
    runs = [start(argv) for _ in range(2)]
    ends = [run.communicate(timeout=120) for run in runs]
    winner = [run.returncode for run in runs].index(0)
    error = ends[1 - winner][1]
    assert runs[1 - winner].returncode == 2 and error.count("\n") == 1
    assert f"in use by process {runs[winner].pid} on " in error and "pretrain.py --data_path" in error
    steps = [json.loads(line)["step"] for line in open(tmp_path / "out" / "log" / "pretrain.jsonl", encoding="utf-8")]
    assert steps == sorted(set(steps))


def test_the_lock_ends_with_its_process_and_holds_for_every_stage(argv, text_file, tmp_path, tokenizer_dir):
    """While a run is at work the folder is its own; scoring is not hindered; after kill -9 it is free."""
    run = start(argv)
    weights = tmp_path / "out" / "pretrain.pth"
    try:
        deadline = time.monotonic() + 60
        while not weights.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert json.loads((tmp_path / "out" / "run.lock").read_text(encoding="utf-8"))["process"] == run.pid
        for script, more in (("pretrain.py", ["--resume"]), ("SFT.py", [])):
            other = start([word for word in argv if word not in ("--preset", "nano")] + more, script)
            _, error = other.communicate(timeout=60)
            assert other.returncode == 2 and f"in use by process {run.pid} on " in error
        scored = start(["--checkpoint", str(weights), "--data_path", str(text_file), "--out_dir",
                        str(tmp_path / "out")], "evaluate.py")
        assert scored.communicate(timeout=60) and scored.returncode == 0
    finally:
        run.kill()
        run.communicate()
    resumed = start([*argv, "--resume"])
    try:
        deadline = time.monotonic() + 60
        line = ""
        while "Epoch:" not in line and time.monotonic() < deadline:
            line = resumed.stdout.readline()
        assert "Epoch:" in line
    finally:
        resumed.send_signal(signal.SIGTERM)
        resumed.communicate()


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_volume_without_locks(text_file, tokenizer_dir, tmp_path, monkeypatch, capsys, code):
    """It is said, and the run goes on."""
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    assert train("pretrain", text_file, tokenizer_dir, tmp_path / "out", preset="nano", max_steps=1, max_seq_len=32)
    assert "this volume knows no file locks" in capsys.readouterr().out


def test_a_process_may_enter_its_own_folder_again(tmp_path):
    """Also a folder that was removed and made again; the lock is free when nobody holds it any more."""
    first = OutDirLock.take(str(tmp_path / "out"), "a")
    assert OutDirLock.take(str(tmp_path / "out"), "b") is first
    (tmp_path / "out" / "run.lock").unlink()
    second = OutDirLock.take(str(tmp_path / "out"), "c")
    assert second is not first and second.is_held
    code = f"from common.lock import OutDirLock; OutDirLock.take({str(tmp_path / 'out')!r}, 'd')"

    def other() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert f"in use by process {os.getpid()} on " in other().stderr
    del second
    assert other().returncode == 0


def test_a_folder_that_cannot_be_made(tmp_path):
    """A user's error, with the flag's name."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out_dir .*file"):
        OutDirLock.take(str(tmp_path / "file"), "a")


# ---------------------------------------------------------------------------------------------
# Git LFS pointers

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def test_git_lfs_pointers_are_named(tmp_path, text_file, tokenizer_dir):
    """As weights, as a tokenizer and as data: what they are, and the command that fetches the file."""
    pointer = tmp_path / "x.pth"
    pointer.write_text(POINTER, encoding="utf-8")
    with pytest.raises(UserError, match="x.pth: a Git LFS pointer.*git lfs pull"):
        checkpoint.load(pointer, ())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = tmp_path / name.replace(".json", "")
        folder.mkdir()
        for file in tokenizer_dir.iterdir():
            (folder / file.name).write_bytes(POINTER.encode() if file.name == name else file.read_bytes())
        with pytest.raises(UserError, match=rf"{re.escape(name)}: a Git LFS pointer.*git lfs pull"):
            load_tokenizer(str(folder))
    data = tmp_path / "a.jsonl"
    data.write_text(POINTER, encoding="utf-8")
    with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
        train("pretrain", data, tokenizer_dir, tmp_path / "out", preset="nano", max_steps=1)


# ---------------------------------------------------------------------------------------------
# consoles

FOLDERS = (".", "benchmarks", "experiments", "docs", "text", "fastpath")
SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if
                 'if __name__ == "__main__":' in path.read_text("utf-8"))
CHEAP = ("train_tokenizer.py", "make_demo_data.py", "text/convert.py", "pretrain.py")


def module_of(script: str) -> str:
    return script.removesuffix(".py").replace("/", ".")


@pytest.mark.parametrize("script", [pytest.param(script, marks=() if script in CHEAP else pytest.mark.extra)
                                    for script in SCRIPTS])
def test_help_into_a_closed_pipe_a_full_disk_and_another_encoding(script):
    """Every entry point ends as all others do: no traceback, and the exit code of common/exits.py."""
    command = [sys.executable, "-m", module_of(script), "--help"]
    done = subprocess.run(command, cwd=ROOT, env=ENV | {"PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 0 and done.stdout.decode("utf-8") and not done.stderr, done.stderr.decode()
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, env=ENV, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: stdout: No space left on device\n")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, cwd=ROOT, env=ENV, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_all_entry_points_are_found():
    """The scripts that README names are among them."""
    assert {*CHEAP, "SFT.py", "SFT_long.py", "distill.py", "evaluate.py", "eval_model.py", "docs/tutorial.py",
            "experiments/compare_runs.py", "benchmarks/train_throughput.py", "fastpath/known.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("reader", ["pretrain.py", "evaluate.py"])
@pytest.mark.parametrize("sink, code, message", [("closed", 141, ""), ("full", 2, "stdout: No space left on device")])
def test_a_stdout_that_fails_is_not_blamed_on_the_token_cache(reader, sink, code, message, text_file, tokenizer_dir,
                                                              tmp_path):
    """`| head -1` and a full disk behind the log, while the cache is made."""
    argv = stage_argv(text_file, tokenizer_dir, tmp_path / "out", preset="nano", max_steps=1, max_seq_len=32)
    if reader == "evaluate.py":
        train("pretrain", text_file, tokenizer_dir, tmp_path / "p", preset="nano", max_steps=1, max_seq_len=32)
        argv = ["--checkpoint", str(tmp_path / "p" / "pretrain.pth"), "--data_path", str(text_file), "--out_dir",
                str(tmp_path / "out")]
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, reader, *argv], cwd=ROOT, env=ENV, text=True, stderr=subprocess.PIPE,
                              stdout=full if sink == "full" else writing)
    os.close(writing)
    assert done.returncode == code and "cannot save" not in done.stderr and message in done.stderr
    assert done.stderr.count("\n") <= 1


def test_a_stderr_that_fails_leaves_the_exit_code():
    """Nobody can be told."""
    with open("/dev/full", "w") as full:
        for argv, code in ((["--nope"], 2), (["--data_path", "nothing/there.jsonl"], 2)):
            done = subprocess.run([sys.executable, "train_tokenizer.py", *argv], cwd=ROOT, env=ENV, stderr=full,
                                  stdout=subprocess.PIPE)
            assert done.returncode == code
