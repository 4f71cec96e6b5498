"""common/lock.py: one training run at a time in an --out_dir."""

import contextlib
import errno
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, train
from faults import course, metrics, run, start

from common import lock
from common.lock import OutDirLock
from Config import UserError

SMALL = dict(preset="nano", max_seq_len=64, max_steps=2, lr_schedule="constant", warmup_ratio=0)
HOLD = """
import sys, time
from common.lock import OutDirLock
lock = OutDirLock.take(sys.argv[1], "python pretrain.py --out_dir x")
print("held", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def held_elsewhere(out_dir):
    """Another process has the lock of `out_dir`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def refusal(out_dir) -> str:
    """The message with which this process is refused."""
    with pytest.raises(UserError) as refused:
        OutDirLock.take(str(out_dir), "mine")
    return str(refused.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir):
    """Undisturbed runs of all stages."""
    return course(tmp_path_factory, tokenizer_dir)


# ---------------------------------------------------------------------------------------------
# runs


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_runs_started_at_the_same_moment_one_trains_and_the_other_names_it(runs, tmp_path, resume):
    out = tmp_path / "out"
    argv = runs.argv("pretrain", out, resume, epochs=20, save_interval=30, cache_dir=out / "cache")
    ended = [wait() for wait in [start("pretrain", argv), start("pretrain", argv)]]
    assert sorted(each.code for each in ended) == [0, 2], ended
    refused = next(each for each in ended if each.code == 2)
    holder = json.loads((out / "run.lock").read_text(encoding="utf-8"))
    assert holder.keys() == {"host", "process", "command"} and "pretrain.py --data_path" in holder["command"]
    assert refused.one_line == (
        f"error: --out_dir {out}: in use by process {holder['process']} on {socket.gethostname()}: "
        f"{holder['command']}; wait for it, or choose another --out_dir")
    steps = [row["step"] for row in metrics("pretrain", out)]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) > 20
    assert not list(out.rglob("*.tmp"))


def test_another_stage_is_refused_and_nothing_is_made(runs, tmp_path):
    runs.reference("pretrain")
    with held_elsewhere(tmp_path):
        for stage in ("pretrain", "SFT"):
            ended = runs.run(stage, tmp_path, resume=False)
            assert ended.code == 2 and "in use by process" in ended.one_line, ended
    assert {path.name for path in tmp_path.iterdir()} == {"run.lock"}
    assert runs.run("SFT", tmp_path, resume=False).code == 0


def test_chats_and_evaluations_are_not_hindered(runs, tmp_path):
    runs.reference("pretrain")
    weights = ["--checkpoint", runs.undisturbed / "pretrain.pth", "--out_dir", tmp_path, "--device", "cpu"]
    with held_elsewhere(tmp_path):
        ended = run("evaluate.py", [*weights, "--data_path", runs.data["pretrain"]])
        assert ended.code == 0, ended
        assert run("eval_model.py", [*weights, "--prompt", "你好", "--max_new_tokens", "2"]).code == 0


def test_a_killed_run_leaves_no_lock(runs, tmp_path):
    ended = runs.run("pretrain", tmp_path, fault={"at": "after rename checkpoint", "nth": 2})
    assert ended.code == -signal.SIGKILL
    assert runs.run("pretrain", tmp_path).code == 0
    runs.reference("pretrain").assert_same(tmp_path)


@pytest.mark.parametrize("make", ["a mistake in the flags", "no weights", "output of an earlier run"])
def test_a_run_that_cannot_start_leaves_nothing(runs, tmp_path, make):
    out, stage, flags = tmp_path / "out", "SFT", dict(init_from=tmp_path / "gone.pth")
    if make == "a mistake in the flags":
        flags = dict(epochs=0)
    elif make == "output of an earlier run":
        runs.reference("pretrain")
        out.mkdir()
        shutil.copy(runs.undisturbed / "pretrain.pth", out)
        stage, flags = "pretrain", {}
    before = list(tmp_path.rglob("*"))
    assert runs.run(stage, out, resume=False, flags=flags).code == 2
    assert list(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_volume_without_locks_is_said(text_file, tokenizer_dir, tmp_path, monkeypatch, capsys, number):
    """Then no other run can be excluded, and its half-written files stay."""
    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    (tmp_path / ".pretrain.pth.elsewhere.77.tmp").write_bytes(b"half")
    assert len(train("pretrain", text_file, tokenizer_dir, tmp_path, **SMALL | dict(epochs=9))) == 2
    said = [line for line in capsys.readouterr().out.splitlines() if "do not start two runs there" in line]
    assert len(said) == 1 and f"--out_dir {tmp_path}: " in said[0] and os.strerror(number) in said[0]
    assert (tmp_path / ".pretrain.pth.elsewhere.77.tmp").exists()


# ---------------------------------------------------------------------------------------------
# the lock itself


def test_the_lock_ends_with_its_process(tmp_path):
    with held_elsewhere(tmp_path) as process:
        assert f"in use by process {process.pid} on {socket.gethostname()}: python pretrain.py" in refusal(tmp_path)
        process.kill()
        process.wait()
        assert OutDirLock.take(str(tmp_path), "mine").is_held
    assert json.loads((tmp_path / "run.lock").read_text())["command"] == "mine"


def test_a_process_may_enter_again_and_frees_the_lock_when_its_run_is_gone(text_file, tokenizer_dir, tmp_path):
    """Also while the frames of a failed run are kept."""
    out, bad = tmp_path / "out", tmp_path / "bad.jsonl"
    bad.write_text("no JSON\n")
    with pytest.raises(UserError, match="bad.jsonl") as kept:
        train("pretrain", bad, tokenizer_dir, out, **SMALL)
    assert not attempt(out), "its frames are kept"
    assert len(train("pretrain", text_file, tokenizer_dir, out, **SMALL)) == 1
    del kept
    gc.collect()
    assert attempt(out)
    with pytest.raises(UserError, match="add --resume"):
        train("pretrain", text_file, tokenizer_dir, out, **SMALL)
    assert len(train("pretrain", text_file, tokenizer_dir, out, **SMALL, resume=True)) == 1
    assert attempt(out)


def attempt(out_dir) -> bool:
    """True if another process can take the lock now."""
    code = "import sys; from common.lock import OutDirLock; OutDirLock.take(sys.argv[1], 'x')"
    return subprocess.run([sys.executable, "-c", code, str(out_dir)], cwd=ROOT, capture_output=True).returncode == 0


def test_a_folder_made_anew_is_locked_anew(tmp_path):
    out = tmp_path / "out"
    first, again = (OutDirLock.take(str(out), "mine") for _ in range(2))
    assert first is again
    shutil.rmtree(out)
    assert attempt(out)
    shutil.rmtree(out)
    third = OutDirLock.take(str(out), "mine")
    assert third is not first and third.is_held and not attempt(out)
    del third
    assert attempt(out), "with the last reference the lock is free"


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """Nor does a program that is started."""
    mine = OutDirLock.take(str(tmp_path), "mine")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        assert not attempt(tmp_path)
        del mine
        assert attempt(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        program.kill()
        program.wait()


def test_a_forked_child_is_another_run(tmp_path):
    mine = OutDirLock.take(str(tmp_path), "mine")
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(UserError):
            OutDirLock.take(str(tmp_path), "child's")
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert mine.is_held and json.loads((tmp_path / "run.lock").read_text())["command"] == "mine"


LATE = """
import fcntl, json, os, socket, sys, time
stream = open(sys.argv[1], "r+")
fcntl.flock(stream, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(0.5)
stream.truncate(0)
holder = {"host": socket.gethostname(), "process": os.getpid(), "command": "late"}
stream.write(json.dumps(holder) + "\\n")
stream.flush()
time.sleep(60)
"""


@pytest.mark.parametrize("left", ["", '{"host": "HERE", "process": ENDED, "command": "earlier"}\n', '{"ho', "[]\n"])
def test_a_holder_that_has_not_yet_written_who_it_is_is_waited_for(tmp_path, left):
    """What an earlier run left is not taken for it."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = left.replace("HERE", socket.gethostname()).replace("ENDED", str(ended.pid))
    file = tmp_path / "run.lock"
    file.write_text(left)
    process = subprocess.Popen([sys.executable, "-c", LATE, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert f"in use by process {process.pid} on {socket.gethostname()}: late; wait" in refusal(tmp_path)
    finally:
        process.kill()
        process.communicate()


def test_a_holder_on_another_host_is_named_at_once(tmp_path):
    with held_elsewhere(tmp_path):
        (tmp_path / "run.lock").write_text('{"host": "elsewhere", "process": 1, "command": "theirs"}\n')
        begin = time.monotonic()
        assert "in use by process 1 on elsewhere: theirs; wait" in refusal(tmp_path)
        assert time.monotonic() - begin < 0.5
        (tmp_path / "run.lock").write_text("")
        assert "in use by another process; wait" in refusal(tmp_path)


def test_an_out_dir_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/out"):
        with pytest.raises(UserError, match=f"--out_dir {tmp_path / out}: "):
            OutDirLock.take(str(tmp_path / out), "mine")
    (tmp_path / "out" / "run.lock").mkdir(parents=True)
    with pytest.raises(UserError, match="--out_dir .*out: "):
        OutDirLock.take(str(tmp_path / "out"), "mine")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(OutDirLock, "write", full)
    with pytest.raises(UserError, match="cannot save .*lock: .*No space left on device"):
        OutDirLock.take(str(tmp_path / "full"), "mine")
