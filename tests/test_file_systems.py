"""common/files.py: file systems that lack something, leftovers of killed processes, names that are not UTF-8."""

import errno
import json
import os
import stat
import subprocess
import sys
import time

import pytest
from conftest import ROOT, make_texts, train, write_jsonl
from faults import course, run

from common import checkpoint, files
from Config import UserError
from fastpath import native

SMALL = dict(preset="nano", max_seq_len=64, max_steps=2, epochs=9, lr_schedule="constant", warmup_ratio=0)


def names(folder) -> set[str]:
    """What is in a folder."""
    return {path.name for path in folder.iterdir()}


def fill(folder) -> None:
    """Two files, as of a token cache."""
    for name in ("a", "b"):
        (folder / name).write_text(name)


# ---------------------------------------------------------------------------------------------
# file systems that cannot sync, or refuse a rename once


def failing_fsync(monkeypatch, number: int, folders_only: bool) -> None:
    fsync = os.fsync

    def fails(descriptor: int) -> None:
        if not folders_only or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)


@pytest.mark.parametrize("folders_only", [True, False])
@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF", "EACCES", "EPERM"])
def test_a_file_system_that_cannot_sync_saves_all_the_same(tmp_path, monkeypatch, name, folders_only):
    failing_fsync(monkeypatch, getattr(errno, name), folders_only)
    files.write_lines(tmp_path / "file", ["text"])
    assert files.write_folder(tmp_path / "folder", fill)
    assert (tmp_path / "file").read_text() == "text\n" and names(tmp_path / "folder") == {"a", "b"}
    assert names(tmp_path) == {"file", "folder"}


@pytest.mark.parametrize("folders_only", [True, False])
@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_sync_that_fails_is_a_failed_save(tmp_path, monkeypatch, name, folders_only):
    (tmp_path / "file").write_text("old")
    failing_fsync(monkeypatch, getattr(errno, name), folders_only)
    for save in (lambda: files.write_lines(tmp_path / "file", ["new"]),
                 lambda: files.write_folder(tmp_path / "folder", fill)):
        with pytest.raises(UserError, match="cannot save .*everything saved before is intact"):
            save()
    assert (tmp_path / "file").read_text() in ({"old", "new\n"} if folders_only else {"old"})
    assert not list(tmp_path.glob(".*"))


def test_a_stage_trains_where_nothing_can_be_synced(text_file, tokenizer_dir, tmp_path, monkeypatch):
    failing_fsync(monkeypatch, errno.EINVAL, folders_only=False)
    assert len(train("pretrain", text_file, tokenizer_dir, tmp_path, **SMALL)) == 2
    assert len(train("pretrain", text_file, tokenizer_dir, tmp_path, resume=True, **SMALL | dict(max_steps=3))) == 3


class Refusals:
    """os.replace and os.rename refuse the first few times, as where a virus scanner holds the file."""

    def __init__(self, monkeypatch, count: int):
        self.count, self.calls = count, 0
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self.around(getattr(os, name)))

    def around(self, rename):
        def renaming(source, target):
            self.calls += 1
            if self.calls <= self.count:
                raise PermissionError(errno.EACCES, "Access is denied")
            rename(source, target)

        return renaming


def write_file(folder) -> None:
    files.write_lines(folder / "new", ["text"])


def write_folder(folder) -> None:
    assert files.write_folder(folder / "new", fill)


def set_aside(folder) -> None:
    """The rename of a damaged state."""
    states = checkpoint.checkpoint_folder(folder, "pretrain")
    for step in (1, 2):
        checkpoint.save_state({"step": step}, folder, "pretrain", keep=2)
    (states / "step_00000002.pth").write_bytes(b"")
    state, _ = checkpoint.newest_state(folder, "pretrain", ("step",))
    assert state == {"step": 1}
    os.rename(states / "step_00000002.pth.damaged", folder / "new")


def compile_c(folder) -> None:
    compiler = folder / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    compiler.chmod(0o755)
    native.compile_to(folder / "new", [str(compiler)])


@pytest.mark.parametrize("write", [write_file, write_folder, set_aside, compile_c])
def test_a_rename_refused_for_a_moment_is_tried_again(tmp_path, monkeypatch, write):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    Refusals(monkeypatch, 3)
    write(tmp_path)
    assert (tmp_path / "new").exists()


def test_a_rename_refused_for_good_is_a_failed_save_after_a_second(tmp_path, monkeypatch):
    (tmp_path / "new").write_text("old")
    refusals, begin = Refusals(monkeypatch, 99), time.monotonic()
    with pytest.raises(UserError, match="cannot save .*new: .*denied"):
        write_file(tmp_path)
    assert 0.8 < time.monotonic() - begin < 5 and 4 < refusals.calls < 12
    assert (tmp_path / "new").read_text() == "old" and names(tmp_path) == {"new"}


def test_an_old_state_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    """It is removed with the next save."""
    for step in (1, 2):
        checkpoint.save_state({"step": step}, tmp_path, "pretrain", keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", Refusals(monkeypatch, 1).around(lambda *arguments: None))
        patch.setattr("pathlib.Path.unlink", lambda path, missing_ok=False: os.unlink(path, None))
        checkpoint.save_state({"step": 3}, tmp_path, "pretrain", keep=1)
    checkpoint.save_state({"step": 4}, tmp_path, "pretrain", keep=1)
    assert names(checkpoint.checkpoint_folder(tmp_path, "pretrain")) == {"step_00000004.pth"}


# ---------------------------------------------------------------------------------------------
# leftovers

DAY = 24 * 3600


def ended_process() -> int:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.fixture
def host(monkeypatch):
    """A machine whose name is not one for files."""
    program = ("import socket; socket.gethostname = lambda: 'node/7.example: lab'\n"
               "from common import files; print(files.HOST)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    monkeypatch.setattr(files, "HOST", done.stdout.strip())
    return "node-7-example-lab"


def leave(folder, name: str, age: float = 0, is_folder: bool = False):
    """A leftover, last written so many seconds ago."""
    path = folder / name
    inside = [path]
    if is_folder:
        path.mkdir()
        inside = [path / "tokens.bin", path]
    for file in inside:
        if not file.is_dir():
            file.write_bytes(b"half")
        os.utime(file, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize("is_folder", [False, True])
def test_leftovers_of_ended_processes_are_removed(tmp_path, host, is_folder):
    ended, lives = ended_process(), os.getppid()
    removed = [f".a.pth.{host}.{ended}.tmp", f".a.pth.{ended}.tmp", f".a.pth.{os.getpid()}.tmp"]
    kept = [f".a.pth.{host}.{lives}.tmp", f".a.pth.{lives}.tmp", f".a.pth.other.{ended}.tmp", f".b.pth.{ended}.tmp",
            f".b.pth.{host}.{ended}.tmp", f".a.pth.{host}.x.tmp", ".a.pth.tmp", "a.pth"]
    old = [f".a.pth.other.{number}.tmp" for number in (ended, lives)]
    for name in removed + kept:
        leave(tmp_path, name, is_folder=is_folder)
    old.pop(0)  # fresh above
    leave(tmp_path, old[0], 1.1 * DAY, is_folder)
    leave(tmp_path, f".a.pth.{host}.{os.getpid()}.tmp", is_folder=is_folder)
    files.remove_leftovers(tmp_path, "a.pth")
    assert names(tmp_path) == set(kept)
    files.remove_leftovers(tmp_path, "*.pth", locked=True)
    assert names(tmp_path) == {f".a.pth.{host}.x.tmp", ".a.pth.tmp", "a.pth"}


def test_a_folder_is_as_fresh_as_the_freshest_of_its_files(tmp_path):
    """A cache is made for hours, and only the files inside are written."""
    for number, (of_file, of_folder, stays) in enumerate([(0, 2 * DAY, True), (2 * DAY, 2 * DAY, False)]):
        folder = leave(tmp_path, f".0123.elsewhere.{number}.tmp", of_folder, is_folder=True)
        os.utime(folder / "tokens.bin", (time.time() - of_file,) * 2)
        os.utime(folder, (time.time() - of_folder,) * 2)
        files.remove_leftovers(tmp_path, "[0-9]" * 4)
        assert folder.exists() == stays


def test_a_temporary_name_has_host_and_process(tmp_path, host):
    seen = []
    files.write_whole(tmp_path / "a.pth", lambda stream: seen.append(os.path.basename(stream.name)))
    files.write_folder(tmp_path / "b", lambda folder: seen.append(folder.name))
    assert seen == [f".{name}.{host}.{os.getpid()}.tmp" for name in ("a.pth", "b")]


def test_a_run_clears_away_what_killed_runs_left_in_its_out_dir(text_file, tokenizer_dir, tmp_path):
    """Of another host too, at once: the lock says that no other run is there. In a cache, which others may share, that
    of another host stays for a day; evaluate.py's files are not its own."""
    places = {".": "pretrain.pth", "log": "pretrain.jsonl", "charts_pretrain": "loss_pretrain.png",
              "checkpoints/pretrain": "step_00000001.pth"}
    for folder, name in places.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        leave(tmp_path / folder, f".{name}.elsewhere.77.tmp")
    for folder, name in (("cache", "0123456789abcdef"), ("eval", "pretrain.jsonl")):
        (tmp_path / folder).mkdir()
        leave(tmp_path / folder, f".{name}.elsewhere.77.tmp")
    train("pretrain", text_file, tokenizer_dir, tmp_path, **SMALL)
    assert {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*.tmp")} == {"cache", "eval"}


# ---------------------------------------------------------------------------------------------
# names that are not UTF-8, Git LFS

NAME = os.fsdecode(b"\xff\xfe\xe9")


def test_lone_surrogates_are_written_as_json_s_escapes(tmp_path):
    records = [{"file": NAME, "text": "水"}]
    files.write_jsonl(tmp_path / "a.jsonl", records)
    line = (tmp_path / "a.jsonl").read_bytes()
    assert line == '{"file": "\\udcff\\udcfe\\udce9", "text": "水"}\n'.encode()
    assert [json.loads(line)] == records


def test_a_run_whose_files_have_names_that_are_not_utf_8(tmp_path_factory, tokenizer_dir, tmp_path):
    runs = course(tmp_path_factory, tokenizer_dir)
    try:
        data = write_jsonl(tmp_path / f"{NAME}.jsonl", make_texts(1, 9, longest=40))
    except OSError:
        pytest.skip("this file system has no such names")
    questions = write_jsonl(tmp_path / f"q {NAME}.jsonl", [{"question": "1+1=", "answer": "2"}])
    tokenizer, out = tmp_path / NAME, tmp_path / f"out {NAME}"
    tokenizer.symlink_to(tokenizer_dir)
    flags = dict(data_path=data, tokenizer_path=tokenizer, cache_dir=None)
    for max_steps in (2, 4):
        ended = runs.run("pretrain", out, resume=max_steps == 4, charts=max_steps == 4,
                         flags=flags | dict(max_steps=max_steps, lr_schedule="constant", warmup_ratio=0))
        assert ended.code == 0 and ended.err == "", ended
    assert "resuming from" in ended.out and "out \\udcff\\udcfe\\udce9" in ended.out
    weights = ["--checkpoint", out / "pretrain.pth", "--device", "cpu", "--max_new_tokens", "2"]
    ended = run("evaluate.py", [*weights, "--out_dir", out, "--data_path", data, questions])
    assert ended.code == 0, ended
    result = json.loads(ended.out.splitlines()[-1])
    assert result["checkpoint"] == str(out / "pretrain.pth") and result["files"][0]["file"] == str(data)
    ended = run("eval_model.py", [*weights, "--prompt", "你好", "--tokenizer_path", tokenizer])
    assert ended.code == 0, ended
    ended = runs.run("pretrain", out, resume=False, flags=flags)
    assert ended.code == 2 and "out \\udcff\\udcfe\\udce9" in ended.one_line
    assert not list(tmp_path.rglob("*.tmp"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_a_git_lfs_pointer_is_known(tmp_path):
    file = tmp_path / "file"
    for content, pointer in ((POINTER, True), (POINTER[:30], False), (b"", False), (b'{"text": "version"}', False)):
        file.write_bytes(content)
        assert files.lfs_pointer(file) == files.lfs_pointer(str(file)) == pointer
    os.mkfifo(tmp_path / "pipe")
    assert not files.lfs_pointer(tmp_path / "pipe") and not files.lfs_pointer(tmp_path)
    assert not files.lfs_pointer(tmp_path / "missing")


@pytest.mark.parametrize("what", ["init_from", "state", "checkpoint"])
def test_a_git_lfs_pointer_is_named(text_file, tokenizer_dir, tmp_path, what):
    """No state is set aside for it: it is not damaged, and the file will come under its name."""
    flags = SMALL | dict(save_interval=1)
    train("pretrain", text_file, tokenizer_dir, tmp_path, **flags)
    file = tmp_path / ("checkpoints/pretrain/step_00000002.pth" if what == "state" else "pretrain.pth")
    file.write_bytes(POINTER)
    with pytest.raises(UserError) as refused:
        if what == "checkpoint":
            import eval_model

            eval_model.main(["--checkpoint", str(file), "--prompt", "a"])
        elif what == "state":
            train("pretrain", text_file, tokenizer_dir, tmp_path, resume=True, **flags | dict(max_steps=3))
        else:
            train("pretrain", text_file, tokenizer_dir, tmp_path / "out", **flags | dict(init_from=file, preset=False))
    assert str(refused.value) == f"{file}: a Git LFS pointer, not the file itself: git lfs pull"
    assert file.read_bytes() == POINTER
