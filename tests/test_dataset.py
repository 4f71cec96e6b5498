"""dataset.py: files and records in all their shapes, and the token cache."""

import gzip
import hashlib
import json
import lzma
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_chats, make_texts, save_tokenizer, write_jsonl

import dataset
from Config import UserError
from dataset import load_documents, open_cache
from text.records import MalformedRecord, parse_record, read_lines
from text.sources import find_files, find_sources
from text.tokenizer import load_tokenizer

# ---------------------------------------------------------------------------------------------
# records


@pytest.mark.parametrize("line, reason", [
    (b'{"text": "a", "text": "b"}', "duplicate key"),
    (b'{"text": "a", "meta": {"k": 1, "k": 2}}', "duplicate key"),
    (b'{"text": "a", "weight": NaN}', "NaN is not JSON"),
    (b'{"text": "a", "other": -Infinity}', "-Infinity is not JSON"),
    (b'{"text": "a", "weight": -1}', "weight"),
    (b'{"text": "a", "weight": 1e400}', "weight"),
    (b'{"text": "a", "weight": true}', "weight"),
    (b'{"text": "a", "weight": "1"}', "weight"),
    (b'{"text": "a", "weight": null}', "weight"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    ('{"text": "水"}'.encode("utf-16"), "not UTF-8 at byte 0"),
    (b'{"text": "\\ud800"}', "lone surrogate at character 0"),
    (b'{"text": "ok \\udc00\\ud800"}', "lone surrogate at character 3"),
    (b'{"text": 5}', "not a string"),
    (b'{"text": null}', "not a string"),
    (b'{"texts": "a"}', 'no "text"'),
    (b'{"conversations": []}', "chat stages"),
    (b'["text"]', "not an object"),
    (b'"text"', "not an object"),
    (b'{"text": "a"', "not JSON"),
    (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    (b'{"text": "a\tb"}', "not JSON"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "digits"),
])
def test_malformed_text(line, reason):
    """Each fault has its reason in words."""
    with pytest.raises(MalformedRecord, match=reason):
        parse_record(line, "text")


@pytest.mark.parametrize("conversation, reason", [
    ('"hello"', "not a list"),
    ('[{"role": "user"}]', "message 1 is not an object"),
    ('[{"role": "user", "content": "a"}, "b"]', "message 2 is not an object"),
    ('[{"role": "User", "content": "a"}]', "role 'User' is not one of"),
    ('[{"role": ["user"], "content": "a"}]', "message 1"),
    ('[{"role": "user", "content": ["a"]}]', "message 1.*not a string"),
    ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ud83d"}]', "message 2.*lone surrogate"),
    ('[{"role": "user", "role": "user", "content": "a"}]', "duplicate key"),
    ('[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]', "system message may only come first"),
])
def test_malformed_chat(conversation, reason):
    """A conversation's faults name the message."""
    with pytest.raises(MalformedRecord, match=reason):
        parse_record(f'{{"conversations": {conversation}}}'.encode(), "chat")
    with pytest.raises(MalformedRecord, match="pretrain.py"):
        parse_record(b'{"text": "a"}', "chat")


def test_good_records():
    """Escapes, pairs of surrogates, other keys and weights are read as they are."""
    assert parse_record(b'{"text": "\\ud83c\\udf0a\\u0000", "weight": 0.5, "x": [null]}', "text")["text"] == "🌊\0"
    assert parse_record(b'{"text": ""}', "text") == {"text": ""}
    assert parse_record('{"conversations": [{"role": "user", "content": "水", "id": 1}]}'.encode(), "chat")
    assert parse_record(b'{"text": "a", "weight": 0}', "text")["weight"] == 0


# ---------------------------------------------------------------------------------------------
# files


def test_lines(tmp_path):
    """A byte order mark, CRLF, blank lines and a last line without an end; lines keep their numbers in the file."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\xe2\x80\xa8c"}\n\n{"text": "d"}')
    lines = list(read_lines(file))
    assert [number for number, _ in lines] == [1, 4, 6]
    assert [parse_record(line, "text")["text"] for _, line in lines] == ["a", "b\u2028c", "d"]
    file.write_bytes(b"")
    assert list(read_lines(file)) == []


def compress(file, suffix: str):
    """A copy of a file compressed as `suffix` says."""
    if suffix == ".zst":
        pack = pytest.importorskip("zstandard").compress
    else:
        pack = {".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    packed = file.with_name(file.name + suffix)
    packed.write_bytes(pack(file.read_bytes()))
    return packed


def test_without_zstandard(tmp_path, monkeypatch):
    """The package is needed for .zst alone, and a message says which it is."""
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="a.jsonl.zst: reading .zst needs a package: pip install zstandard"):
        list(read_lines(tmp_path / "a.jsonl.zst"))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed(tmp_path, suffix):
    """Compressed files read as the plain one; a truncated or damaged one is named with the line it ends at."""
    records = [{"text": f"{number} {'好' * 300}{number * 7919 % 1009}"} for number in range(4000)]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    packed = compress(file, suffix)
    assert list(read_lines(packed)) == list(read_lines(file))
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-len(whole) // 3])
    good = []
    with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: cannot be read beyond line (\d+)") as refused:
        for number, line in read_lines(packed):
            good.append((number, line))
    assert f"beyond line {len(good)}:" in str(refused.value)
    assert good == list(read_lines(file))[:len(good)] and 0 < len(good) < 4000
    packed.write_bytes(file.read_bytes()[:1000])  # not compressed at all
    with pytest.raises(UserError, match="cannot be read beyond line 0"):
        list(read_lines(packed))


def test_truncated_data_stops_the_run(tokenizer, tmp_path):
    """A truncated archive is no smaller data set: it is refused, and leaves no cache."""
    file = compress(write_jsonl(tmp_path / "a.jsonl", make_texts(1, 300)), ".xz")
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"a\.jsonl\.xz: cannot be read beyond line \d+"):
        open_cache([file], tokenizer, "text", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*"))


def test_find_files(tmp_path):
    """A file, a folder (its data files only, sorted) and a glob; what is not there is named."""
    for name in ("b.jsonl", "a.jsonl.gz", "c.jsonl.xz", "d.jsonl.zst", "notes.txt", "e.json", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "f.jsonl").touch()
    (tmp_path / "empty").mkdir()

    def names(path):
        return [file.name for file in find_files(str(path))]

    assert names(tmp_path / "notes.txt") == ["notes.txt"]
    assert names(tmp_path) == ["a.jsonl.gz", "b.jsonl", "c.jsonl.xz", "d.jsonl.zst"]
    assert names(tmp_path / "[bc].jsonl*") == ["b.jsonl", "c.jsonl.xz"]
    assert names(tmp_path / "**" / "*.jsonl") == ["b.jsonl", "f.jsonl"]
    (tmp_path / "odd[1].jsonl").touch()  # a name that is also a pattern
    assert names(tmp_path / "odd[1].jsonl") == ["odd[1].jsonl"]
    for missing, reason in (("nothing.jsonl", "nothing.*no such file"), ("*.csv", "no such"), ("empty", "holds no")):
        with pytest.raises(UserError, match=reason):
            find_files(str(tmp_path / missing))


def test_a_file_beside_its_packed_copy_is_refused(tmp_path):
    """In a folder, a glob and a list; hidden files are none."""
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("x.jsonl", "y.jsonl", "._y.jsonl", ".y.jsonl.gz"):
        (folder / name).touch()
    assert [file.name for file in find_files(str(folder))] == ["x.jsonl", "y.jsonl"]
    (folder / "x.jsonl.gz").touch()
    for path in (folder, folder / "*.jsonl*"):
        with pytest.raises(UserError, match="x.jsonl and .*x.jsonl.gz are there, the same data twice"):
            find_files(str(path))
    for first in (str(folder / "x.jsonl"), os.path.relpath(folder / "x.jsonl")):
        with pytest.raises(UserError, match="the same data twice"):
            find_sources([first, str(folder / "x.jsonl.gz")])


def test_a_large_window_of_zstd_is_read(tmp_path):
    """As of `zstd --long=31`; and frames one after another with frames to be skipped between them."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    skipped = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"abcd"
    packed = writer.compress(b'{"text": "a"}\n') + writer.flush()
    second = zstandard.compress(b'{"text": "b"}\n')
    (tmp_path / "a.jsonl.zst").write_bytes(skipped + packed + skipped + second + skipped)
    assert [line for _, line in read_lines(tmp_path / "a.jsonl.zst")] == [b'{"text": "a"}', b'{"text": "b"}']


def test_xz_streams_one_after_another(tmp_path):
    """With zeros between them, as `xz --stdout` and archivers pad; what else follows a stream is damage."""
    first, second = (lzma.compress(f'{{"text": "{name}"}}\n'.encode()) for name in "ab")
    file = tmp_path / "a.jsonl.xz"
    for packed in (first + second, first + bytes(8) + second + bytes(4)):
        file.write_bytes(packed)
        assert [line for _, line in read_lines(file)] == [b'{"text": "a"}', b'{"text": "b"}']
    for packed in (first + second[:-9], first + b"junk", first + second[:8] + b"x" + second[9:]):
        file.write_bytes(packed)
        with pytest.raises(UserError, match="cannot be read beyond line [12]: "):
            list(read_lines(file))


@pytest.mark.parametrize("content, words", [
    ('[{"text": "a"}, {"text": "b"}]', "one array"), ("version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
    ('{"instruction": "a", "output": "b"}', "Alpaca")])
def test_a_file_without_any_record_is_refused_among_many_good_lines(tokenizer, tmp_path, content, words):
    """One line of a thousand is below every ratio, but here it is a whole file."""
    folder = tmp_path / "d"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"text": f"{n}"} for n in range(1000)])
    (folder / "b.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"b\.jsonl.*{words}"):
        load_documents(str(folder), tokenizer, "text", str(tmp_path / "c"), 64)


def test_bad_ratio(tokenizer, tmp_path):
    """Malformed lines are counted over all lines, named by file and number, and stop the run above the ratio."""
    lines = [json.dumps(record) for record in make_texts(2, 97, longest=40)]
    lines[10:10] = ["{", '{"text": "\\ud800"}', '{"txt": 1}']
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    said = []

    def load(ratio):
        return load_documents(str(file), tokenizer, "text", str(tmp_path / "c"), 64, max_bad_ratio=ratio,
                              say=said.append)

    documents = load(0.03)  # not more than 3 of 100
    assert len(documents) == 97 and documents.counts[0]["malformed"] == 3
    assert [f"{file}:{n}: " in line for n, line in zip((11, 12, 13), said, strict=False)] == [True] * 3
    with pytest.raises(UserError, match="3 of 100 lines are malformed.*0.029.*a.jsonl:11: not JSON"):
        load(0.029)
    file.write_text("{\n" * 5, encoding="utf-8")
    with pytest.raises(UserError, match="5 of 5"):
        load(0.5)
    with pytest.raises(UserError, match="no document is left"):
        load(1.0)


def test_weights(tokenizer, tmp_path):
    """A record's weight scales its documents' loss and is no part of what it is."""
    records = [{"text": "一"}, {"text": "二", "weight": 0.25}, {"text": "二", "weight": 3}]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    documents = load_documents(str(file), tokenizer, "text", str(tmp_path / "c"), 64)
    assert documents.weight.tolist() == [1.0, 0.25, 3.0]
    assert documents.hash[1] == documents.hash[2] != documents.hash[0]
    step = dataset.StepLoader(documents, 64, 1, 1, seed=0, order="file").step(0, 0)
    expected = np.repeat([1.0, 0.25, 3.0], documents.targets)
    assert step.micro_batches[0].weights.tolist() == expected.tolist() and step.total_weight == expected.sum()


def test_several_files_are_one_data_set(tokenizer, tmp_path):
    """The documents of a folder come file by file, and each can be named."""
    records = make_texts(3, 9, longest=40)
    write_jsonl(tmp_path / "b.jsonl", records[4:])
    compress(write_jsonl(tmp_path / "a.jsonl", records[:4]), ".gz")
    (tmp_path / "a.jsonl").unlink()
    documents = load_documents(str(tmp_path), tokenizer, "text", str(tmp_path / "c"), 64)
    assert documents.hash.tolist() == [dataset.text_hash(record) for record in records]
    assert documents.name(3) == f"{tmp_path / 'a.jsonl.gz'}:4" and documents.name(4) == f"{tmp_path / 'b.jsonl'}:1"


# ---------------------------------------------------------------------------------------------
# the token cache


@pytest.fixture
def file(tmp_path):
    """A small chat file."""
    return write_jsonl(tmp_path / "chat.jsonl", make_chats(4, 12))


def folders(cache_dir) -> list[str]:
    """Names of the folders in a cache folder."""
    return sorted(path.name for path in cache_dir.iterdir() if path.is_dir()) if cache_dir.exists() else []


def test_made_once(tokenizer, file, tmp_path, monkeypatch):
    """The second time nothing is tokenized; after a change of the file it is."""
    cache_dir = tmp_path / "c"
    first = open_cache([file], tokenizer, "chat", str(cache_dir))
    tokens = first.tokens[:].tolist()
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_build_cache", lambda *a: pytest.fail("tokenized again"))
        assert open_cache([file], tokenizer, "chat", str(cache_dir)).tokens[:].tolist() == tokens
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(make_chats(5, 1)[0]) + "\n")
    assert len(open_cache([file], tokenizer, "chat", str(cache_dir)).tokens) > len(tokens)
    assert len(folders(cache_dir)) == 2


def test_the_key_is_what_the_file_holds(tokenizer, file, tmp_path, monkeypatch, capsys):
    """A file that is touched, copied or renamed is not tokenized again; messages then name the new file."""
    cache_dir = tmp_path / "c"
    first = open_cache([file], tokenizer, "chat", str(cache_dir)).folder
    monkeypatch.setattr(dataset, "_build_cache", lambda *a: pytest.fail("tokenized again"))
    for seconds in (1, 2, 3):
        os.utime(file, (seconds, seconds))
        assert open_cache([file], tokenizer, "chat", str(cache_dir)).folder == first
    copy = Path(shutil.copy(file, tmp_path / "copy.jsonl"))
    documents = load_documents(str(copy), tokenizer, "chat", str(cache_dir), 512)
    assert documents.caches[0].folder == first and documents.name(0) == f"{copy}:1"


@pytest.mark.parametrize("remembered", [False, True])
def test_an_edit_that_keeps_size_and_time_is_seen(tokenizer, file, tmp_path, monkeypatch, remembered):
    """The same size and time of change, but another content, written at once or later."""
    if remembered:
        monkeypatch.setattr(dataset.time, "time_ns", lambda: time.monotonic_ns() + 10**19)
    file.write_text('{"conversations": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]}\n',
                    encoding="utf-8")
    before, status = open_cache([file], tokenizer, "chat", str(tmp_path / "c")).tokens[:].tolist(), file.stat()
    file.write_text(file.read_text(encoding="utf-8").replace("乙", "丙"), encoding="utf-8")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_cache([file], tokenizer, "chat", str(tmp_path / "c")).tokens[:].tolist() != before


def test_a_file_is_read_once_to_know_what_it_holds(tokenizer, file, tmp_path, monkeypatch):
    """Its hash is remembered by path, size and times; a damaged memory, or one that cannot be written, is no error."""
    cache_dir = tmp_path / "c"
    monkeypatch.setattr(dataset.time, "time_ns", lambda: time.monotonic_ns() + 10**19)  # nothing is new
    folder = open_cache([file], tokenizer, "chat", str(cache_dir)).folder
    hashed, sha256 = [], hashlib.sha256
    monkeypatch.setattr(dataset.hashlib, "sha256", lambda *a: hashed.append(a) or sha256(*a))
    assert open_cache([file], tokenizer, "chat", str(cache_dir)).folder == folder
    assert () not in hashed  # sha256() without content is a file's
    for damage in ("[1", json.dumps({str(file.resolve()): [1, 2]}), json.dumps({str(file.resolve()): 5})):
        (cache_dir / "contents.json").write_text(damage, encoding="utf-8")
        hashed.clear()
        assert open_cache([file], tokenizer, "chat", str(cache_dir)).folder == folder and () in hashed
    (cache_dir / "contents.json").unlink()
    (cache_dir / "contents.json").mkdir()
    assert open_cache([file], tokenizer, "chat", str(cache_dir)).folder == folder


def test_other_caches_of_a_file_are_named_and_kept(tokenizer, file, tmp_path, capsys):
    """Of an earlier content and of other flags; a copy of the file may still use them. Those of other files are not."""
    cache_dir, copy = tmp_path / "c", Path(shutil.copy(file, tmp_path / "copy.jsonl"))
    other = write_jsonl(tmp_path / "other.jsonl", make_chats(9, 3))
    before = [open_cache([each], tokenizer, reading, str(cache_dir)).folder for each, reading in (
        (file, "chat"), (file, dataset.Reading("chat", thoughts=True)), (other, "chat"))]
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    capsys.readouterr()
    open_cache([file], tokenizer, "chat", str(cache_dir))
    said = capsys.readouterr().out
    assert "older token caches of the same files" in said
    assert [str(folder) in said for folder in before] == [True, True, False]
    assert open_cache([copy], tokenizer, "chat", str(cache_dir)).folder == before[0] and len(folders(cache_dir)) == 4


def test_a_file_that_gets_the_right_suffix_is_read_anew(tokenizer, tmp_path):
    """The suffix decides how the same bytes are read."""
    wrong = tmp_path / "x.jsonl"
    wrong.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(UserError, match="malformed"):
        load_documents(str(wrong), tokenizer, "text", str(tmp_path / "c"), 64)
    right = wrong.rename(tmp_path / "x.jsonl.gz")
    assert len(load_documents(str(right), tokenizer, "text", str(tmp_path / "c"), 64)) == 1


def test_a_file_that_changes_while_it_is_read(tokenizer, file, tmp_path, monkeypatch):
    """What was tokenized is then not what was hashed: refused."""
    build = dataset._build_cache

    def and_append(*arguments):
        build(*arguments)
        with open(file, "a", encoding="utf-8") as stream:
            stream.write("\n")

    monkeypatch.setattr(dataset, "_build_cache", and_append)
    with pytest.raises(UserError, match="chat.jsonl: changed while it was read"):
        open_cache([file], tokenizer, "chat", str(tmp_path / "c"))
    assert not folders(tmp_path / "c")


@pytest.mark.parametrize("name", ["meta.json", "tokens.bin", "types.bin", "documents.bin", "replies.bin"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_cache(tokenizer, file, tmp_path, capsys, name, damage):
    """A damaged cache is named, and made again."""
    cache = open_cache([file], tokenizer, "chat", str(tmp_path / "c"))
    tokens, broken = cache.tokens[:].tolist(), cache.folder / name
    whole = bytearray(broken.read_bytes())
    if damage == "remove":
        broken.unlink()
    else:
        middle = whole.index(b'"crc32"') if name == "meta.json" else len(whole) // 2
        whole[middle + 2] ^= 4
        broken.write_bytes(whole if damage == "flip" else whole[:middle])
    capsys.readouterr()
    again = open_cache([file], tokenizer, "chat", str(tmp_path / "c"))
    said = capsys.readouterr().out
    assert "token cache refused" in said and str(broken) in said
    assert again.tokens[:].tolist() == tokens and folders(tmp_path / "c") == [cache.folder.name]


@pytest.mark.parametrize("moment", ["dataset._crc32", "common.files.os.rename", "dataset._record_blocks"])
def test_partial_cache_is_never_used(tokenizer, file, tmp_path, monkeypatch, moment):
    """Interrupted while it is made, a cache does not bear its name, and what is left of it is not used."""
    cache_dir = tmp_path / "c"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moment, interrupt)
        patch.setattr("common.files.shutil.rmtree", lambda *a, **k: None)  # as after kill -9
        with pytest.raises(KeyboardInterrupt):
            open_cache([file], tokenizer, "chat", str(cache_dir))
    assert len(folders(cache_dir)) == 1 and folders(cache_dir)[0].endswith(".tmp")
    for leftover in (cache_dir / folders(cache_dir)[0]).iterdir():
        leftover.write_bytes(b"\xff" * 64)
    cache = open_cache([file], tokenizer, "chat", str(cache_dir))
    assert len(cache.documents) == 13 and cache.tokens[:].max() < 800
    assert cache.folder.name in folders(cache_dir)


def test_two_tokenizers_two_caches(tokenizer, file, tmp_path):
    """Another tokenizer is another cache, though the data is the same; another folder for the same one is not."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    same = load_tokenizer(str(save_tokenizer(backend, tmp_path / "same")))
    backend.add_tokens(["小明"])
    other = load_tokenizer(str(save_tokenizer(backend, tmp_path / "other")))
    made = {open_cache([file], t, "chat", str(tmp_path / "c")).folder.name for t in (tokenizer, same)}
    assert len(made) == 1
    made.add(open_cache([file], other, "chat", str(tmp_path / "c")).folder.name)
    assert len(made) == 2 and folders(tmp_path / "c") == sorted(made)


def test_stages_share_a_cache(tokenizer, tmp_path):
    """SFT, SFT_long and distill read one cache of one file: lengths and weights are chosen afterwards."""
    file = write_jsonl(tmp_path / "a.jsonl", make_chats(6, 5) + make_chats(7, 5, shortest=800, longest=900))
    for max_seq_len, min_tokens, max_tokens in ((512, 0, 512), (1024, 513, 1024), (1024, 0, None)):
        load_documents(str(file), tokenizer, "chat", str(tmp_path / "c"), max_seq_len, min_tokens, max_tokens)
    assert len(folders(tmp_path / "c")) == 1


@pytest.mark.parametrize("entries, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_width_of_a_token(tmp_path, entries, dtype):
    """uint16 up to 65,536 entries, uint32 above, and the largest id is read back as it is."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, entries)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = load_tokenizer(str(save_tokenizer(backend, tmp_path / "tokenizer")))
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"w3 w{entries - 1} w{entries - 2}"}])
    cache = open_cache([file], tokenizer, "text", str(tmp_path / "c"))
    assert cache.tokens.dtype == np.dtype(dtype)
    assert cache.tokens[:].tolist() == [0, 3, entries - 1, entries - 2, 1]
    documents = load_documents(str(file), tokenizer, "text", str(tmp_path / "c"), 64)
    step = dataset.StepLoader(documents, 64, 1, 1, seed=0).step(0, 0)
    batch = step.micro_batches[0].to("cpu")
    assert batch["targets"][batch["weights"] > 0].tolist() == [3, entries - 1, entries - 2, 1]


@pytest.mark.parametrize("what, reason", [
    ("missing", "no such folder"), ("empty", "not a tokenizer that can be loaded"),
    ("damaged", "not a tokenizer that can be loaded"), ("no end", "has no end token")])
def test_unusable_tokenizers(tokenizer_dir, tmp_path, what, reason):
    """A tokenizer that is missing, damaged, or has no end token is refused by its path or by what it lacks."""
    folder = tmp_path / "tokenizer"
    if what != "missing":
        folder.mkdir()
    if what in ("damaged", "no end"):
        for file in tokenizer_dir.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    if what == "damaged":
        whole = (folder / "tokenizer.json").read_bytes()
        (folder / "tokenizer.json").write_bytes(whole[:len(whole) // 2])
    if what == "no end":
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=reason) as refused:
        load_tokenizer(str(folder))
    assert str(folder) in str(refused.value) or what == "no end"
    assert "\n" not in str(refused.value)
