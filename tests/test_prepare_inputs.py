"""Raw files: found, recognized, read to the last good record, and what is bad counted and named."""

import gzip
import hashlib
import io
import json
import lzma
import os
import random
from pathlib import Path

import fsspec
import pytest

from Config import UserError
from prepare.inputs import MOST_SOURCES, RawFile, RawReader, find_raw_files

TEXTS = ["河边的老磨坊早已不转了。", "她把晒好的豆子收进陶罐。", "山路上只剩下一行脚印。"]


def lines_of(records: list) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def read(path, rename=(), is_val=False, limit=None) -> tuple[RawReader, list]:
    reader = RawReader(RawFile(str(path), os.path.getsize(path) if "://" not in str(path) else 0, is_val), rename)
    return reader, list(reader.read(limit))


def texts_of(found: list) -> list[str]:
    return [record["text"] for _, record in found]


# ---------------------------------------------------------------------------------------------
# which files


def test_files_folders_globs_and_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("raw/b.jsonl", "raw/a.jsonl.gz", "raw/deep/c.parquet", "raw/README.md", "raw/.hidden.jsonl", "d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*paths):
        files, others = find_raw_files(list(paths), "--data_path")
        return [file.path for file in files], others

    assert names("raw") == (["raw/a.jsonl.gz", "raw/b.jsonl", "raw/deep/c.parquet"], ["raw/README.md"])
    assert names("raw/*.jsonl", "d.txt") == (["raw/b.jsonl", "d.txt"], [])
    assert names("d.txt", str(tmp_path / "d.txt")) == (["d.txt"], [])  # once
    with fsspec.open("memory://bucket/e.jsonl", "wb") as file:
        file.write(lines_of([{"text": text} for text in TEXTS]))
    found, _ = find_raw_files(["memory://bucket/"], "--val_path")
    assert [(file.path, file.is_val, file.source) for file in found] == [("memory:///bucket/e.jsonl", True, "e")]
    assert texts_of(read(found[0].path)[1]) == TEXTS


@pytest.mark.parametrize("path, message", [
    ("nowhere", "--data_path nowhere: no such file"), ("nope://x/y", "--data_path nope://x/y: "),
    ("empty", "no data files in the folder")])
def test_what_is_not_there_is_named(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_raw_files([path], "--data_path")


# ---------------------------------------------------------------------------------------------
# forms


@pytest.mark.parametrize("name, pack", [
    ("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress),
    ("named_wrong.jsonl", gzip.compress)])
def test_packed_or_not(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(lines_of([{"text": text} for text in TEXTS])))
    reader, found = read(path)
    assert texts_of(found) == TEXTS and [number for number, _ in found] == ["1", "2", "3"]
    assert reader.summary()["form"] == "JSON lines" and reader.malformed == 0 and len(reader.sha256) == 64


@pytest.mark.parametrize("content, form", [
    (json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False, indent=2), "one array"),
    ("\n\n".join(TEXTS), "plain text"), ("text\n" + "\n".join(TEXTS), "CSV"),
    (json.dumps({"data": [{"text": text} for text in TEXTS]}, ensure_ascii=False), "one object around")])
def test_other_forms(tmp_path, content, form):
    path = tmp_path / ("a.csv" if form == "CSV" else "a.json")
    path.write_text(content, encoding="utf-8")
    reader, found = read(path)
    assert texts_of(found) == TEXTS and reader.form.startswith(form), reader.form
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-8-sig"])
def test_other_encodings(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of([{"text": text} for text in TEXTS]).decode(), encoding=encoding)
    assert texts_of(read(path)[1]) == TEXTS


def test_parquet(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    path = tmp_path / "a.parquet"
    parquet.write_table(table({"text": TEXTS * 300, "id": range(900)}), path)
    reader, found = read(path)
    assert texts_of(found) == TEXTS * 300 and reader.form == "Parquet" and len(reader.sha256) == 64
    parquet.write_table(table({"text": [text.encode() for text in TEXTS]}), path)
    assert texts_of(read(path)[1]) == TEXTS
    parquet.write_table(table({"id": range(7)}), path)
    reader, found = read(path)
    assert not found and reader.malformed == 7 and "no known shape: 'id'" in reader.examples[0]
    path.write_bytes(path.read_bytes()[:-30])
    reader, found = read(path)
    assert not found and reader.malformed == 1 and "not read beyond record 0" in reader.unreadable


# ---------------------------------------------------------------------------------------------
# records

CHAT = [{"role": "user", "content": "几点了？"}, {"role": "assistant", "content": "三点。"}]


@pytest.mark.parametrize("record, shape", [
    ({"conversations": CHAT}, "conversations"), ({"messages": CHAT}, "OpenAI"),
    ({"conversations": [{"from": "human", "value": "几点了？"}, {"from": "gpt", "value": "三点。"}]}, "ShareGPT"),
    ({"instruction": "几点了？", "input": "", "output": "三点。"}, "Alpaca"),
    ({"question": "几点了？", "answer": "三点。"}, "question and answer")])
def test_chats_are_recognized_and_told(tmp_path, record, shape):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([record]))
    reader, found = read(path)
    assert found == [("1", {"conversations": CHAT, "source": "a"})] and shape in reader.summary()["shape"]


def test_deepctrl_history_and_source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"instruction": "", "input": "现在呢？", "output": "四点。", "data_source": "时钟",
                                "history": [["几点了？", "三点。"]]}]))
    _, found = read(path)
    contents = [message["content"] for message in found[0][1]["conversations"]]
    assert contents == ["几点了？", "三点。", "现在呢？", "四点。"]
    assert found[0][1]["source"] == "时钟"


def test_fields_are_renamed_and_weights_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"body": TEXTS[0], "weight": 0.5}, {"q": "几点了？", "a": "三点。"},
                               {"talk": [{"who": "user", "says": "几点了？"},
                                         {"who": "assistant", "says": "三点。"}]}]))
    rename = (("body", "text"), ("q", "question"), ("a", "answer"), ("talk", "conversations"), ("who", "role"),
              ("says", "content"))
    _, found = read(path, rename)
    assert [record for _, record in found] == [{"text": TEXTS[0], "weight": 0.5, "source": "a"},
                                               *[{"conversations": CHAT, "source": "a"}] * 2]


def test_a_conversation_ends_before_a_tool(tmp_path):
    path = tmp_path / "a.jsonl"
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]}
    path.write_bytes(lines_of([{"conversations": [*CHAT, CHAT[0], call, {"role": "tool", "content": "3"}]},
                               {"conversations": [call, CHAT[1]]}]))
    reader, found = read(path)
    assert [record["conversations"] for _, record in found] == [[*CHAT, CHAT[0]]]
    assert reader.malformed == 1 and reader.notes.total() == 2


def test_of_a_test_set_the_question_alone_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"question": "几点了？", "answer": 3}, {"question": "何时？", "decline": True}]))
    assert [len(record["conversations"]) for _, record in read(path, is_val=True)[1]] == [1, 1]
    reader, found = read(path)
    assert found[0][1]["conversations"][1]["content"] == "3" and "a question without an answer" in reader.examples[0]


def test_sources_without_end_are_the_files(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_bytes(lines_of([{"text": "字", "source": f"s{n}"} for n in range(MOST_SOURCES + 1)]
                              + [{"text": "字", "source": "https://example.org/a"}, {"text": "字", "source": 3}]))
    found = read(path)[1]
    assert [record["source"] for _, record in found[-4:]] == [f"s{MOST_SOURCES - 1}", *["pages"] * 3]


# ---------------------------------------------------------------------------------------------
# what is bad


def test_bad_lines_are_counted_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [lines_of([{"text": text}]) for text in TEXTS]
    path.write_bytes(b"".join([
        good[0], b'{"text": "' + "好".encode()[:2] + b'"}\n', b"{not json}\n", good[1], b'{"text": "a", "text": "b"}\n',
        b'{"text": "\\ud83d"}\n', b'{"words": "x"}\n', b"\n", good[2]]))
    reader, found = read(path)
    assert texts_of(found) == TEXTS and [number for number, _ in found] == ["1", "4", "9"]
    assert reader.malformed == 5 and [example.split(": ")[0][len(str(path)):] for example in reader.examples] == [
        " line 2", " line 3", " line 5", " line 6", " line 7"]
    for reason in ("not utf-8 at byte N", "not JSON", "duplicate key", "lone surrogate", "no known shape"):
        assert any(reason in found for found in reader.reasons), reader.reasons


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_truncated_file_is_read_to_the_cut(tmp_path, suffix, pack):
    records = [{"text": f"{TEXTS[n % 3]}{os.urandom(40).hex()}"} for n in range(5000)]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines_of(records))[:-5000])
    reader, found = read(path)
    assert 1000 < len(found) < 5000 and texts_of(found) == [record["text"] for record in records[:len(found)]]
    assert reader.malformed == 1 and f"not read beyond record {len(found)}" in reader.unreadable
    assert len(reader.sha256) == 64  # of what is there


@pytest.mark.parametrize("content, reason", [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"\x00\x01\x02" * 99, "not known"), (b"<!DOCTYPE html><html></html>", "HTML")])
def test_what_is_no_data_is_named(tmp_path, content, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    reader, found = read(path)
    assert not found and reader.malformed == 1 and reason in reader.unreadable


def test_links_to_nothing_and_pipes_are_left_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": TEXTS[0]}]))
    (tmp_path / "b.jsonl").symlink_to("nowhere.jsonl")
    os.mkfifo(tmp_path / "c.jsonl")
    files, others = find_raw_files([str(tmp_path)], "--data_path")
    assert [Path(file.path).name for file in files] == ["a.jsonl"]
    assert sorted(Path(name).name for name in others) == ["b.jsonl", "c.jsonl"]


def test_a_first_line_without_end_does_not_make_text_of_the_others(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"junk " * 400_000 + b"\n" + lines_of([{"text": text} for text in TEXTS]))
    reader, found = read(path)
    assert texts_of(found) == TEXTS and reader.malformed == 1


def test_a_chat_without_a_reply_is_not_malformed(tmp_path):
    """The steps drop it; over 1 % of malformed records would end the run."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"instruction": "几点了？", "output": ""}, {"messages": CHAT[:1]}]))
    reader, found = read(path)
    assert reader.malformed == 0 and [len(record["conversations"]) for _, record in found] == [1, 1]


def test_a_limit_ends_the_reading(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"text": TEXTS[0]}, {"no": "text"}, {"text": TEXTS[1]}, {"text": TEXTS[2]}]))
    reader, found = read(path, limit=3)
    assert len(found) == 2 and reader.malformed == 1 and reader.sha256 is None


@pytest.mark.parametrize("record", [
    {"conversations": None}, {"conversations": []}, {"messages": None}, {"question": None, "answer": None}])
def test_empty_fields_beside_a_text(tmp_path, record):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"text": TEXTS[0]} | record]))
    assert texts_of(read(path)[1]) == [TEXTS[0]]


def test_records_that_hold_anything_never_end_the_reading(tmp_path):
    """5,000 records of known keys with values of any type: each is read or malformed."""
    rng = random.Random(7)
    keys = ("text", "conversations", "messages", "question", "answer", "instruction", "output", "history", "weight",
            "source", "chosen", "problem", "solution", "mapping", "prompt", "response", "reasoning_content")
    values = (None, 0, 5, -1.5, True, "", "好", [], {}, [None], [5], ["好", "的"], [["好", "的"]], CHAT, [CHAT],
              {"role": 3}, [{"role": "user"}], [{"role": "user", "content": None}], [{"from": 1, "value": []}],
              {"a": {"b": []}})
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{key: rng.choice(values) for key in rng.sample(keys, rng.randint(1, 4))}
                               for _ in range(5000)]))
    reader, found = read(path)
    assert len(found) + reader.malformed == 5000 and len(found) > 300
    assert sum(reader.summary()["reasons"].values()) == reader.malformed
    for _, record in found:
        assert isinstance(record.get("text"), str) or record["conversations"]


def test_several_records_on_a_line_have_names_of_their_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"text": TEXTS[0]}, [{"text": text} for text in TEXTS]]))
    assert [number for number, _ in read(path)[1]] == ["1", "2", "2.1", "2.2"]


def test_what_cannot_be_read_now_ends_the_run(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"text": text} for text in TEXTS]))

    class Cut(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 60:
                raise ConnectionResetError("Connection reset by peer")
            return super().read(min(size, 50) if size > 0 else size)

    opened = iter([io.BytesIO(path.read_bytes()), Cut(path.read_bytes())])
    monkeypatch.setattr(RawFile, "open", lambda file: next(opened))
    with pytest.raises(UserError, match="cannot be read now: Connection reset by peer; go on with --resume"):
        read(path)
