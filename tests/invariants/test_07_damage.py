"""Invariant 7: a damaged, truncated or foreign checkpoint, cache or tokenizer is refused by name; the newest whole
checkpoint is used instead and that is said. A full disk loses nothing that was saved."""

import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import make_chats, make_texts, write_jsonl
from faults import bits, course

import dataset
from common import checkpoint, files
from common.run_state import STATE_KEYS
from common.weights import load_weights
from Config import UserError
from text.tokenizer import TextEncoder, load_tokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir):
    """Undisturbed runs of all stages."""
    return course(tmp_path_factory, tokenizer_dir)


# ---------------------------------------------------------------------------------------------
# kinds of damage: each a function of a whole file's bytes and of a path that malicious content would create


class Malice:
    """A pickle that runs a command when it is loaded without care."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch '{self.witness}'",)


def in_memory(write) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def with_malice(whole: bytes, witness: Path) -> bytes:
    """The same zip with a malicious pickle where torch's is, its checksum right."""

    def write(stream):
        with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(stream, "w") as target:
            for name in source.namelist():
                malicious = pickle.dumps(Malice(witness), protocol=2)
                target.writestr(name, malicious if name.endswith("data.pkl") else source.read(name))

    return in_memory(write)


def zip_of_something_else(whole: bytes, witness: Path) -> bytes:
    def write(stream):
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("letter.txt", "not weights")

    return in_memory(write)


def flipped(whole: bytes, place: int, mask: int = 1) -> bytes:
    damaged = bytearray(whole)
    damaged[place] ^= mask
    return bytes(damaged)


DAMAGES = {
    "empty": lambda whole, witness: b"",
    "truncated": lambda whole, witness: whole[:len(whole) * 2 // 3],
    "its last byte is missing": lambda whole, witness: whole[:-1],
    "a flipped byte": lambda whole, witness: flipped(whole, len(whole) // 2),
    "a block of zeros": lambda whole, witness: whole[:4096] + bytes(4096) + whole[8192:],
    "text": lambda whole, witness: b"these are no weights\n" * 100,
    "a pickle": lambda whole, witness: pickle.dumps({"model": {}, "config": {}, "meta": {}}),
    "a malicious pickle": lambda whole, witness: pickle.dumps(Malice(witness)),
    "a malicious pickle in torch's zip": with_malice,
    "a zip of something else": zip_of_something_else,
    "a tensor": lambda whole, witness: in_memory(lambda stream: torch.save(torch.zeros(3), stream)),
    "another torch file": lambda whole, witness: in_memory(lambda stream: torch.save({"epoch": 3}, stream)),
    "a torch file in the old format": lambda whole, witness: in_memory(
        lambda stream: torch.save({"model": {}}, stream, _use_new_zipfile_serialization=False)),
}


# ---------------------------------------------------------------------------------------------
# files of torch


def refused_or_unchanged(file: Path, needed: tuple, expected) -> bool:
    """Whether loading the file is refused, by its name and in one line; if it is not, its content must be right."""
    try:
        content = checkpoint.load(file, needed)
    except UserError as error:
        assert str(file) in str(error) and "\n" not in str(error)
        return True
    assert bits(content) == expected, "damaged content was loaded"
    return False


def test_a_flip_of_any_byte_of_a_small_file_is_refused_or_harmless(tmp_path):
    """Every byte; in the zip's directory, which no checksum covers, every bit."""
    file = tmp_path / "weights.pth"
    content = {"model": {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.float16)}, "config": {"dim": 1},
               "meta": {"stage": "pretrain", "loss": 1.5}}
    checkpoint.save(content, file)
    whole, expected, draw = file.read_bytes(), bits(content), random.Random(7)
    directory = whole.index(b"PK\x01\x02")
    flips = [(place, 1 << draw.randrange(8)) for place in range(directory)]
    flips += [(place, 1 << bit) for place in range(directory, len(whole)) for bit in range(8)]
    refused = 0
    for place, mask in flips:
        file.write_bytes(flipped(whole, place, mask))
        refused += refused_or_unchanged(file, ("model", "config", "meta"), expected)
    assert refused > len(flips) / 3  # the others are torch's padding, times and the like
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert refused_or_unchanged(file, ("model",), expected)


@pytest.mark.parametrize("which", ["weights", "state"])
def test_a_flip_anywhere_in_a_stage_s_file_is_refused_or_harmless(runs, tmp_path, which):
    runs.reference("pretrain")
    folder = runs.undisturbed
    source = folder / "pretrain.pth" if which == "weights" else max(folder.glob("checkpoints/pretrain/*.pth"))
    whole, needed = source.read_bytes(), ("model", "config")
    expected, draw, file = bits(checkpoint.load(source, needed)), random.Random(which), tmp_path / "damaged.pth"
    refused = 0
    for _ in range(60):
        file.write_bytes(flipped(whole, draw.randrange(len(whole)), draw.randrange(1, 256)))
        refused += refused_or_unchanged(file, needed, expected)
    assert refused > 30
    for _ in range(20):
        file.write_bytes(whole[:draw.randrange(len(whole))])
        assert refused_or_unchanged(file, needed, expected)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_by_name(runs, tmp_path, damage):
    """--init_from: exit 2, one line, nothing executed, and nothing left that would be in the way later."""
    runs.reference("pretrain")
    file, witness, out = tmp_path / "weights.pth", tmp_path / "executed", tmp_path / "out"
    file.write_bytes(DAMAGES[damage]((runs.undisturbed / "pretrain.pth").read_bytes(), witness))
    ended = runs.run("SFT", out, resume=False, flags=dict(init_from=file))
    assert ended.code == 2, ended
    assert str(file) in ended.one_line
    assert not witness.exists(), "a pickle was executed"
    assert not (out / "SFT.pth").exists()


@pytest.mark.parametrize("change", ["config", "shape", "name", "type"])
def test_weights_that_do_not_fit_their_config_are_refused_by_name(runs, tmp_path, change):
    runs.reference("pretrain")
    content = torch.load(runs.undisturbed / "pretrain.pth", weights_only=True)
    if change == "config":
        content["config"]["n_layers"] = 3
    elif change == "shape":
        content["model"]["model.norm.weight"] = torch.ones(3)
    elif change == "name":
        content["model"]["something.else"] = content["model"].pop("model.norm.weight")
    else:
        content["config"]["dim"] = "wide"
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    ended = runs.run("SFT", tmp_path / "out", resume=False, flags=dict(init_from=file))
    assert ended.code == 2, ended
    assert str(file) in ended.one_line


@pytest.fixture(scope="module")
def half_way(runs, tmp_path_factory):
    """out_dir of a pretraining that was killed after its second checkpoint."""
    out = tmp_path_factory.mktemp("half way") / "out"
    ended = runs.run("pretrain", out, fault={"at": "after rename checkpoint", "nth": 2})
    assert ended.code == -signal.SIGKILL
    assert len(list(out.glob("checkpoints/pretrain/step_*.pth"))) == 2
    return out


@pytest.mark.parametrize("damage", [*DAMAGES, "weights of the stage", "a state of another stage"])
def test_the_newest_whole_checkpoint_is_used_instead_of_a_damaged_one(runs, half_way, tmp_path, damage):
    out, witness = tmp_path / "out", tmp_path / "executed"
    shutil.copytree(half_way, out)
    older, newest = sorted(out.glob("checkpoints/pretrain/step_*.pth"))
    if damage == "weights of the stage":
        shutil.copy(out / "pretrain.pth", newest)
    elif damage == "a state of another stage":
        runs.reference("SFT")
        shutil.copy(max(runs.undisturbed.glob("checkpoints/SFT/*.pth")), newest)
    else:
        newest.write_bytes(DAMAGES[damage](newest.read_bytes(), witness))
    ended = runs.run("pretrain", out)
    assert not witness.exists(), "a pickle was executed"
    if damage == "a state of another stage":  # whole, and of a run with other settings: the user must decide
        assert ended.code == 2 and "--resume with other settings" in ended.one_line, ended
        return
    assert ended.code == 0, ended
    refusal = [line for line in ended.out.splitlines() if "refused" in line]
    assert len(refusal) == 1 and str(newest) in refusal[0]
    assert f"resuming from {older}" in ended.out
    runs.reference("pretrain").assert_same(out)


def test_where_all_checkpoints_are_damaged_the_run_ends_with_2_and_touches_nothing(runs, half_way, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(half_way, out)
    files = sorted(out.glob("checkpoints/pretrain/step_*.pth"))
    for file in files:
        file.write_bytes(flipped(file.read_bytes(), file.stat().st_size // 2))
    weights = (out / "pretrain.pth").read_bytes()
    for _ in range(2):  # nor does the second time begin anew over what the first refused
        ended = runs.run("pretrain", out)
        assert ended.code == 2, ended
        assert "every checkpoint is damaged" in ended.one_line and "checkpoints/pretrain" in ended.one_line
        assert all(f"refused: {file}" in ended.out for file in files)
    assert (out / "pretrain.pth").read_bytes() == weights


# ---------------------------------------------------------------------------------------------
# the token cache


def cache_bits(cache: dataset.TokenCache) -> tuple:
    arrays = (cache.tokens, cache.documents, cache.replies) + ((cache.types,) if cache.is_chat else ())
    return cache.is_chat, cache.tokens.dtype, [a[:].tobytes() for a in arrays], cache.meta


def test_a_flip_of_any_byte_of_the_token_cache_is_refused_or_harmless(runs, tmp_path, tokenizer):
    cache = dataset.open_cache([runs.data["SFT"]], tokenizer, "chat", str(tmp_path))
    expected, draw, refused, tried = cache_bits(cache), random.Random(7), 0, 0
    assert {file.name for file in cache.folder.iterdir()} == {
        "tokens.bin", "types.bin", "documents.bin", "replies.bin", "meta.json"}
    for file in cache.folder.iterdir():
        whole = file.read_bytes()
        every = 1 if file.name == "meta.json" else 11
        for place in range(0, len(whole), every):
            file.write_bytes(flipped(whole, place, 1 << draw.randrange(8)))
            tried += 1
            try:
                damaged = dataset.TokenCache(cache.folder, cache.files)
            except UserError as error:
                assert str(file) in str(error) or file.name == "meta.json"
                refused += 1
            else:
                assert file.name == "meta.json" and cache_bits(damaged) == expected
        file.write_bytes(whole)
    assert refused > 0.9 * tried


@pytest.mark.parametrize("name", ["tokens.bin", "types.bin", "documents.bin", "replies.bin", "meta.json"])
def test_a_damaged_token_cache_is_named_and_made_again(runs, tmp_path, name):
    """Missing, empty, truncated, flipped and foreign, one after another; training ends as it should."""
    flags = dict(cache_dir=tmp_path / "cache", max_steps=2)
    runs.run("SFT", tmp_path / "0", flags=flags)
    folder, = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    file, expected = folder / name, load_weights(tmp_path / "0" / "SFT.pth")[2]["weights_sha256"]
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for number, damage in enumerate(["missing", "empty", "truncated", "a flipped byte", "text"], start=1):
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(DAMAGES[damage](whole[name], None))
        out = tmp_path / str(number)
        ended = runs.run("SFT", out, resume=False, flags=flags)
        assert ended.code == 0, f"{damage}: {ended}"
        named = [line for line in ended.out.splitlines() if line.startswith("token cache refused")]
        assert len(named) == 1 and str(file) in named[0] and "building it again" in named[0], f"{damage}: {ended}"
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
        assert load_weights(out / "SFT.pth")[2]["weights_sha256"] == expected


def test_what_a_kill_left_half_written_is_cleared_away(runs, tmp_path):
    """Temporary files of saves, and half-made caches, which can be as large as the data."""
    out = tmp_path / "out"
    for what in ("cache tokens.bin", "checkpoint", "weights", "best"):
        ended = runs.run("pretrain", out, fault={"at": f"half written {what}"}, flags=dict(cache_dir=None))
        assert ended.code == -signal.SIGKILL
        assert [f for f in out.rglob("*") if f.suffix == ".tmp"], "something half-written is there"
    assert runs.run("pretrain", out, flags=dict(cache_dir=None)).code == 0
    assert not [f for f in out.rglob("*") if f.suffix == ".tmp"]
    runs.reference("pretrain").assert_same(out)


def test_a_half_made_cache_of_the_same_process_number_is_not_in_the_way(runs, tmp_path):
    """In a container every run has the same process number."""
    fault = {"at": "half written cache tokens.bin"}
    ended = runs.run("pretrain", tmp_path, fault=fault, flags=dict(cache_dir=None), pid=7)
    assert ended.code == -signal.SIGKILL
    assert runs.run("pretrain", tmp_path, flags=dict(cache_dir=None), pid=7).code == 0
    runs.reference("pretrain").assert_same(tmp_path)


def test_damaged_lines_of_metrics_are_passed_over(runs, tmp_path):
    """They are only a record: neither the resume nor the charts may end a run because of one."""
    ended = runs.run("pretrain", tmp_path, fault={"at": "after rename weights"})
    assert ended.code == -signal.SIGKILL
    file = tmp_path / "log" / "pretrain.jsonl"
    file.write_bytes(file.read_bytes() + b'[1]\n{"step": "x"}\n{"step": 1}\n\xff\x00\n3\n{"step": 2, "lo')
    ended = runs.run("pretrain", tmp_path, charts=True)
    assert ended.code == 0, ended
    runs.reference("pretrain").assert_same(tmp_path)


# ---------------------------------------------------------------------------------------------
# the tokenizer


TOKENIZER_DAMAGES = {
    "missing": None, "empty": b"", "text": b"no tokenizer\n", "another JSON": b"[1, 2]", "an empty object": b"{}",
    "no UTF-8": b"\xff\xfe\x00{"}


def with_added_tokens(change):
    """What makes of tokenizer.json's content that with each added token changed, or dropped where None."""
    def damage(whole: bytes) -> bytes:
        state = json.loads(whole)
        state["added_tokens"] = [t for t in map(change, state["added_tokens"]) if t]
        return json.dumps(state).encode()

    return damage


FOREIGN_TOKENIZERS = {  # sound JSON, and a tokenizer, but not with what ours all have
    "no <s>": with_added_tokens(lambda token: token if token["content"] != "<s>" else None),
    "no </s>": with_added_tokens(lambda token: token if token["content"] != "</s>" else None),
    "no added tokens": with_added_tokens(lambda token: None),
    "shown control tokens": with_added_tokens(lambda token: token | {"special": False})}


@pytest.mark.parametrize("damage", FOREIGN_TOKENIZERS)
def test_a_tokenizer_without_its_control_tokens_is_refused(tokenizer_dir, tmp_path, damage):
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_bytes(FOREIGN_TOKENIZERS[damage](file.read_bytes()))
    with pytest.raises(UserError, match="tokenizer.json has no control token <") as refused:
        load_tokenizer(str(tmp_path / "tokenizer"))
    assert str(tmp_path / "tokenizer") in str(refused.value)


@pytest.mark.parametrize("damage", [*TOKENIZER_DAMAGES, "truncated", "the folder is missing"])
def test_a_damaged_tokenizer_is_refused_by_name(runs, tokenizer_dir, tmp_path, damage):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    file = folder / "tokenizer.json"
    if damage == "the folder is missing":
        shutil.rmtree(folder)
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(TOKENIZER_DAMAGES.get(damage, file.read_bytes()[:-2000]))
    ended = runs.run("pretrain", tmp_path / "out", resume=False, flags=dict(tokenizer_path=folder))
    assert ended.code == 2, ended
    assert str(folder) in ended.one_line
    assert "tokenizer.json" in ended.one_line or damage == "the folder is missing"


def test_a_flip_of_any_byte_of_the_tokenizer_is_refused_or_recognized_or_harmless(tokenizer_dir, tmp_path):
    """A flip that leaves a tokenizer must change its fingerprint, by which later stages and --resume know it."""

    def meaning() -> tuple:
        tokenizer = load_tokenizer(str(folder))
        conversation = [{"role": "user", "content": "水 <think>"},
                        {"role": "assistant", "content": "<think>1 + 1</think><answer>2</answer>"}]
        encoder = TextEncoder.of(tokenizer)
        return encoder.fingerprint, dataset.encode_chat(tokenizer, conversation), encoder.encode_texts(["水"])[0].ids

    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    expected, draw, seen = meaning(), random.Random(7), {"refused": 0, "recognized": 0, "harmless": 0}
    for name, every in (("tokenizer_config.json", 1), ("tokenizer.json", 211)):
        file = folder / name
        whole = file.read_bytes()
        vocabulary = whole.find(b'"vocab"')
        places = [*range(0, len(whole), every), *(range(vocabulary, vocabulary + 150) if vocabulary > 0 else ())]
        for place in places:
            file.write_bytes(flipped(whole, place, 1 << draw.randrange(8)))
            try:
                found = meaning()
            except UserError as error:
                assert str(folder) in str(error) and "\n" not in str(error)
                seen["refused"] += 1
                continue
            assert found == expected or found[0] != expected[0], f"{name}: a flip at {place} goes unnoticed"
            seen["harmless" if found == expected else "recognized"] += 1
        file.write_bytes(whole)
    assert all(count >= 3 for count in seen.values()), seen


def test_another_tokenizer_is_refused_by_name_on_resume_and_in_the_next_stage(runs, half_way, tokenizer_dir, tmp_path):
    folder, out = tmp_path / "tokenizer", tmp_path / "out"
    shutil.copytree(tokenizer_dir, folder)
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["merges"] = state["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    shutil.copytree(half_way, out)
    ended = runs.run("pretrain", out, flags=dict(tokenizer_path=folder))
    assert ended.code == 2 and "another tokenizer" in ended.one_line, ended
    ended = runs.run("SFT", tmp_path / "next", resume=False, flags=dict(tokenizer_path=folder))
    assert ended.code == 2 and str(folder) in ended.one_line, ended


# ---------------------------------------------------------------------------------------------
# a full disk


class FullDisk(io.FileIO):
    """A file on a disk that is full at the nth write."""

    def __init__(self, path, mode, counter: list[int]):
        super().__init__(path, mode)
        self.counter = counter

    def write(self, data):
        self.counter[0] -= 1
        if self.counter[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_full_at_any_write_of_a_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    checkpoint.save({"model": {"a": torch.zeros(500)}}, file)
    before, n = file.read_bytes(), 0
    counter = [0]
    monkeypatch.setattr(files, "open", lambda path, mode: FullDisk(path, mode, counter), raising=False)
    while True:
        counter[0] = n
        try:
            checkpoint.save({"model": {"a": torch.ones(900)}}, file)
            break
        except UserError as error:
            assert str(file) in str(error) and "No space left on device" in str(error) and "\n" not in str(error)
        assert file.read_bytes() == before
        assert [f.name for f in tmp_path.iterdir()] == [file.name], "the half-written file is gone: it takes space"
        n += 1
    assert n > 20
    assert torch.equal(checkpoint.load(file, ("model",))["model"]["a"], torch.ones(900))


@pytest.mark.parametrize("what", ["checkpoint", "weights", "best", "metrics", "cache"])
def test_a_disk_full_while_a_stage_writes_ends_it_with_2_and_resuming_ends_the_same(runs, tmp_path, what):
    out, flags = tmp_path / "out", dict(cache_dir=tmp_path / "cache")
    phases = ["nothing written {}", "before sync {}", "before rename {}", "before sync folder of {}"]
    if what == "cache":
        moments = ["nothing written cache tokens.bin", "half written cache meta.json", "before rename cache"]
    else:
        moments = [phase.format(what) for phase in phases[:3 if what == "metrics" else 4]]
    if what == "metrics":  # these are written anew only where there are some
        runs.run("pretrain", out, fault={"at": "after rename checkpoint", "nth": 2}, flags=flags)
    for moment in moments:
        ended = runs.run("pretrain", out, fault={"at": moment, "do": "enospc"}, flags=flags)
        assert ended.code == 2, f"{moment}: {ended}"
        assert "No space left on device" in ended.one_line
        for file in out.glob("*.pth"):
            load_weights(file)
        for file in out.glob("checkpoints/pretrain/*.pth"):
            checkpoint.load(file, STATE_KEYS)
        assert not [f for f in tmp_path.rglob("*") if f.name.startswith(".")]
    assert runs.run("pretrain", out, flags=flags).code == 0
    runs.reference("pretrain").assert_same(out)


def test_a_file_that_may_not_grow_ends_a_stage_with_2_and_resuming_ends_the_same(runs, tmp_path):
    """The system's own refusal (RLIMIT_FSIZE): in the middle and at the very end of a checkpoint."""
    runs.reference("pretrain")
    size = min(file.stat().st_size for file in runs.undisturbed.glob("checkpoints/pretrain/*.pth"))
    for number, limit in enumerate([size // 3, size - 64 * 1024, size - 1]):
        out = tmp_path / str(number)
        ended = runs.run("pretrain", out, limit=limit)
        assert ended.code == 2, f"{limit}: {ended}"
        assert "cannot save" in ended.one_line and "File too large" in ended.one_line
        assert runs.run("pretrain", out).code == 0
        runs.reference("pretrain").assert_same(out)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_token_cache_cut_short_by_a_full_disk_is_never_used(tmp_path, tokenizer, kind):
    """Also where only the last, buffered bytes of a file do not fit."""
    records = make_texts(5, 60) if kind == "text" else make_chats(5, 60)
    path = str(write_jsonl(tmp_path / "data.jsonl", records))
    good = dataset.open_cache([Path(path)], tokenizer, kind, str(tmp_path / "good"))
    sizes = [file.stat().st_size for file in good.folder.iterdir()]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sizes:
        for limit in (size - 1, size - 100, size // 2):
            cache_dir = tmp_path / f"limit {limit}"
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
                with pytest.raises(UserError, match="cannot save"):
                    dataset.open_cache([Path(path)], tokenizer, kind, str(cache_dir))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert not list(cache_dir.iterdir())


def test_a_stage_whose_console_output_fills_the_disk_ends_with_2(runs, tmp_path):
    """`python pretrain.py > train.log`, and the disk is full; Python's own end must not turn the 2 into another."""
    ended = runs.run("pretrain", tmp_path, stdout="/dev/full")
    assert ended.code == 2, ended
    assert "No space left on device" in ended.one_line


def test_a_tiny_disk_that_fills_up_loses_nothing_and_resuming_ends_the_same(runs, tmp_path):
    """A real file system with room for some of the files only; then it is made larger."""
    runs.reference("pretrain")
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk],
                                            capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        out = disk / "out"
        ended = runs.run("pretrain", out, resume=False)
        assert ended.code == 2, ended
        assert "cannot save" in ended.one_line and "No space left on device" in ended.one_line
        saved = sorted(out.glob("checkpoints/pretrain/*.pth"))
        assert saved, "what was saved before is there"
        for file in saved:
            checkpoint.load(file, STATE_KEYS)
        again = runs.run("pretrain", out)
        assert again.code == 2 and sorted(out.glob("checkpoints/pretrain/*.pth")), again
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert runs.run("pretrain", out).code == 0
        runs.reference("pretrain").assert_same(out)
    finally:
        subprocess.run(["umount", disk], check=True)
