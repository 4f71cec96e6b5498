"""train_tokenizer.py: the output folder, invariant 9 (exact round trip), the sample, the report, and user errors."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
from conftest import make_chats, make_texts, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import train_tokenizer
from Config import UserError
from text.chat import ChatEncoder
from text.records import MalformedRecord, is_held_out, text_hash
from text.tokenizer import TAGS, OurTokenizer, TextEncoder, load_tokenizer
from train_tokenizer import (
    LEVEL_1_HANZI,
    Sample,
    collect,
    main,
    make_report,
    parse_texts,
    script_of,
    token_byte_lengths,
    train_bpe,
)

VOCAB_SIZE = 700


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with 400 short texts, a text of rare characters, and 40 conversations."""
    folder = tmp_path_factory.mktemp("corpus")
    rare = {"text": LEVEL_1_HANZI[:300] * 2}
    write_jsonl(folder / "text.jsonl", [*make_texts(seed=1, n=400, longest=200), rare])
    write_jsonl(folder / "chat.jsonl", make_chats(seed=2, n=40))
    return folder


def train(data_path, folder, *flags):
    """Run the script in this process, check that it succeeds, and return the folder."""
    argv = ["--data_path", str(data_path), "--tokenizer_path", str(folder), "--vocab_size", str(VOCAB_SIZE), *flags]
    assert main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    return train(corpus, tmp_path_factory.mktemp("made") / "tokenizer")


@pytest.fixture(scope="module")
def trained(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


# ---------------------------------------------------------------------------------------------
# the folder


def test_ids_and_size(trained):
    control = ["<unk>", "<s>", "</s>", *TAGS]
    assert [trained.token_to_id(token) for token in control] == list(range(7))
    assert sorted(trained.get_vocab().values()) == list(range(VOCAB_SIZE))
    state = json.loads(trained.to_str())
    assert [token["special"] for token in state["added_tokens"]] == [True] * 3 + [False] * 4
    assert not any(token["normalized"] for token in state["added_tokens"])
    assert state["normalizer"] is None and state["post_processor"] is None
    assert [step["type"] for step in state["pre_tokenizer"]["pretokenizers"]] == ["Split", "ByteLevel"]


def test_auto_tokenizer_loads_it(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 0 and tokenizer.clean_up_tokenization_spaces is False
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer("你好").input_ids == tokenizer.encode("你好", add_special_tokens=False)
    text = "<think>\n想 , 了 .\n</think><answer>3</answer>"
    ids = tokenizer(text).input_ids
    assert {3, 4, 5, 6} <= set(ids)
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == text
    assert token_byte_lengths(tokenizer) == token_byte_lengths(tokenizer.backend_tokenizer)


def test_our_tokenizer_equals_that_of_transformers(folder, tmp_path):
    """OurTokenizer gives the same results as transformers' class. A folder with another setting, or with a file that
    only transformers reads, is loaded by transformers."""
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert isinstance(ours, OurTokenizer) and len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    one, other = TextEncoder.of(ours), TextEncoder.of(theirs)
    assert one.fingerprint == other.fingerprint and one.tag_ids == other.tag_ids
    assert ChatEncoder.of(ours).headers == ChatEncoder.of(theirs).headers
    ids = [1, *range(len(ours)), 2]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids) == theirs.decode(ids)
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"eos_token": "<unk>"}), encoding="utf-8")
    other = load_tokenizer(str(tmp_path / "other"))
    assert not isinstance(other, OurTokenizer) and other.eos_token_id == 0
    shutil.copy(folder / "tokenizer_config.json", file)
    assert isinstance(load_tokenizer(str(tmp_path / "other")), OurTokenizer)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (tmp_path / "other" / name).write_text("{}", encoding="utf-8")
        assert not isinstance(load_tokenizer(str(tmp_path / "other")), OurTokenizer)
        (tmp_path / "other" / name).unlink()


def test_chat_template(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " 你好\n\n"},
                {"role": "assistant", "content": "\n"}]
    rendered = "<s>system\ns</s>\n<s>user\n 你好\n\n</s>\n<s>assistant\n\n</s>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == rendered
    generation = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert generation == "<s>system\ns</s>\n<s>user\n 你好\n\n</s>\n<s>assistant\n"


def test_no_think_tokens(corpus, tmp_path):
    tokenizer = Tokenizer.from_file(str(train(corpus, tmp_path / "t", "--no_think_tokens") / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert all(tokenizer.token_to_id(tag) is None for tag in TAGS)
    assert len(tokenizer.encode("<think>").ids) > 1
    assert tokenizer.decode(tokenizer.encode("<think>").ids) == "<think>"


def test_no_merge_spells_a_control_token():
    tokenizer = train_bpe(iter(["<s>a</s><unk><think></think><answer>" * 50]), 320)
    merged = {a + b for a, b in json.loads(tokenizer.to_str())["model"]["merges"]}
    assert merged and merged.isdisjoint(["<unk>", "<s>", "</s>", *TAGS])


# ---------------------------------------------------------------------------------------------
# invariant 9: exact round trip

FRAGMENTS = ["<s>", "</s>", "<unk>", *TAGS, " ", "\n", "\r\n", "\t", "我", "，", "'s", "👍🏽", "\u0301", "\0", "\ufeff"]
ANY_TEXT = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(FRAGMENTS)).map("".join)


@settings(max_examples=500, deadline=None, database=None)
@given(text=ANY_TEXT)
def test_every_text_is_decoded_exactly(trained, text):
    trained.encode_special_tokens = False
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text
    trained.encode_special_tokens = True  # control strings in a text are ordinary text
    ids = trained.encode(text).ids
    assert not {0, 1, 2} & set(ids)
    assert trained.decode(ids) == text
    lengths = token_byte_lengths(trained)
    assert sum(lengths[i] for i in ids) == len(text.encode("utf-8"))


# ---------------------------------------------------------------------------------------------
# the sample


def test_sample_stays_within_budget_and_follows_its_seed():
    def draw(seed):
        sample = Sample(10_000, 50, seed)
        for record in make_texts(seed=3, n=100):
            sample.add(text_hash(record), [record["text"]])
            assert sample.bytes == sum(len(segment) for _, segment, _ in sample.heap) <= 10_000
        return list(sample.pop_texts())

    assert draw(1) == draw(1) != draw(2)
    assert 9_000 < sum(len(segment.encode()) for segment in draw(1))
    assert max(map(len, draw(1))) == 50


def test_sample_is_uniform():
    """Early and late, small and large segments have the same chance: 500 draws of about 4 of 100."""
    early = large = total = 0
    for seed in range(500):
        sample = Sample(60, 100, seed)
        for number in range(100):
            sample.add(number, ["x" * (20 if number % 2 else 10)])
        early += sum(number < 50 for _, _, number in sample.heap)
        large += sum(number % 2 for _, _, number in sample.heap)
        total += len(sample.heap)
    assert total > 1500
    assert abs(early / total - 0.5) < 0.06
    assert 0.4 < large / total < 0.55  # a large segment that does not fit ends the sample


def test_same_seed_same_file(corpus, folder, tmp_path):
    again = train(corpus, tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    a, b = (train(corpus, tmp_path / seed, "--sample_bytes", "20000", "--seed", seed) for seed in ("1", "2"))
    assert (a / "tokenizer.json").read_bytes() != (b / "tokenizer.json").read_bytes()
    assert json.loads((a / "report.json").read_text())["sampled_bytes"] <= 20_000


def test_held_out_documents_are_not_trained_on(corpus):
    records = [json.loads(line) for line in (corpus / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = {text_hash(record) for record in records if is_held_out(text_hash(record))}
    assert expected, "the corpus has no such documents"
    train_sample, held_out = collect([str(corpus / "text.jsonl")], None, 10**6, 42, 0.01)
    assert {document for _, _, document in held_out.heap} == expected
    assert {document for _, _, document in train_sample.heap} == {text_hash(r) for r in records} - expected


def test_a_small_corpus_holds_out_the_document_with_the_lowest_hash(tmp_path):
    records = [r for r in make_texts(seed=5, n=20) if not is_held_out(text_hash(r))]
    lowest = min(map(text_hash, records))
    file = write_jsonl(tmp_path / "small.jsonl", [*records, *records])
    train_sample, held_out = collect([str(file)], None, 10**6, 42, 0.01)
    assert {document for _, _, document in held_out.heap} == {lowest}
    assert {document for _, _, document in train_sample.heap} == set(map(text_hash, records)) - {lowest}
    with pytest.raises(UserError, match="not enough text"):
        collect([str(write_jsonl(tmp_path / "one.jsonl", records[:1]))], None, 10**6, 42, 0.01)


def test_val_path_is_not_trained_on(corpus, tmp_path):
    records = [json.loads(line) for line in (corpus / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    val = write_jsonl(tmp_path / "val.jsonl", records[:7])
    train_sample, held_out = collect([str(corpus / "text.jsonl")], [str(val)], 10**6, 42, 0.01)
    assert "".join(sorted(held_out.pop_texts())) == "".join(sorted(record["text"] for record in records[:7]))
    assert not {document for _, _, document in train_sample.heap} & set(map(text_hash, records[:7]))


def test_text_chat_and_malformed_records(tmp_path, capsys):
    chat = {"conversations": [{"role": "user", "content": "甲问"}, {"role": "assistant", "content": "乙答"}]}
    lines = [json.dumps({"text": f"文{n}"}) for n in range(95)]
    lines += [json.dumps(chat), json.dumps({"text": None, **chat}), json.dumps({"text": ""}), "", "{oops", '{"a": 1}']
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    train_sample, held_out = collect([str(file)], None, 10**6, 42, 0.02)
    texts = [*train_sample.pop_texts(), *held_out.pop_texts()]
    assert sorted(texts) == sorted([f"文{n}" for n in range(95)] + ["甲问", "乙答"] * 2)
    printed = capsys.readouterr().out
    assert f"{file}:100: not JSON" in printed and f'{file}:101: no "text"' in printed
    assert "2 malformed, 1 empty" in printed
    with pytest.raises(UserError, match="2 of 100 lines are malformed"):
        collect([str(file)], None, 10**6, 42, 0.019)


def test_the_texts_of_questions():
    history = [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]
    for record, texts in (({"question": "问", "answer": "答"}, ["问", "答"]),
                          ({"question": "问", "decline": True, "choices": ["丙"]}, ["问"]),
                          ({"history": history, "question": "问", "answer": "答"}, ["甲", "乙", "问", "答"]),
                          ({"history": history, "question": "问", "decline": True}, ["甲", "乙", "问"])):
        assert parse_texts(json.dumps(record).encode())[1] == texts
    for record, reason in (({"question": "问"}, 'no "answer"'), ({"question": "问", "decline": False}, 'no "answer"'),
                           ({"history": "甲", "question": "问", "answer": "答"}, '"history"'),
                           ({"history": ["甲"], "question": "问", "answer": "答"}, "message 1")):
        with pytest.raises(MalformedRecord, match=reason):
            parse_texts(json.dumps(record).encode())


# ---------------------------------------------------------------------------------------------
# the report


def test_report(folder, corpus, tmp_path, capsys):
    train(corpus, tmp_path / "t")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((folder / "report.json").read_text())
    assert {**printed, "seconds": 0} == {**report, "seconds": 0}
    assert report["vocab_size"] == VOCAB_SIZE and report["round_trip"] and report["unknown_rate"] == 0
    assert sum(report["hanzi_by_tokens"]) == 3755
    assert list(report["by_script"]) == ["digits", "Chinese", "code", "English", "mixed"]
    assert report["chars_per_token"] == round(report["chars"] / report["tokens"], 4) > 1


@pytest.mark.parametrize("line, script", [
    ("今天天气很好，我们去公园吧。", "Chinese"), ("The cat sat on the mat.", "English"), ("3.14159, 2.71828", "digits"),
    ("for (int i = 0; i < n; ++i) {", "code"), ("我们用 PyTorch 训练 Transformer 模型", "mixed"), ("où ?", "mixed")])
def test_script_of(line, script):
    assert script_of(line) == script


def test_a_lossy_tokenizer_is_reported_and_not_saved(corpus, tmp_path, monkeypatch):
    from tokenizers import normalizers

    def lossy(*args):
        tokenizer = train_bpe(*args)
        tokenizer.normalizer = normalizers.NFKC()
        return tokenizer

    monkeypatch.setattr(train_tokenizer, "train_bpe", lossy)
    assert main(["--data_path", str(corpus), "--tokenizer_path", str(tmp_path / "t"), "--vocab_size", "300"]) == 1
    assert not list(tmp_path.iterdir())
    assert make_report(lossy(iter(["abc"]), 263), ["ab"])["round_trip"] is False


def test_too_little_text_gives_a_warning(corpus, tmp_path, capsys):
    argv = ["--data_path", str(corpus), "--tokenizer_path", str(tmp_path / "t"), "--vocab_size", "50000"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "warning: too little text" in printed
    size = json.loads(printed.splitlines()[-1])["vocab_size"]
    assert size == Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json")).get_vocab_size() < 50_000


# ---------------------------------------------------------------------------------------------
# user errors


@pytest.mark.parametrize("flags", [
    ["--vocab_size", "262"], ["--vocab_size", "258", "--no_think_tokens"], ["--vocab_size", "2000000"],
    ["--sample_bytes", "0"], ["--max_bad_ratio", "nan"], ["--seed", "x"], ["--vocab", "6400"], ["--unknown"]])
def test_bad_flags(corpus, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--data_path", str(corpus), *flags])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_existing_folder_is_not_overwritten(corpus, folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="already exists"):
        train(corpus, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_unreadable_data(tmp_path, corpus):
    (tmp_path / "cut.jsonl.xz").write_bytes(b"\xfd7zXZ\0\0\4")
    with pytest.raises(UserError, match="cannot be read"):
        train(tmp_path / "cut.jsonl.xz", tmp_path / "t")
    with pytest.raises(UserError, match="no such file"):
        train(tmp_path / "nothing", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_full_disk_leaves_nothing_behind(corpus, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        train(corpus, tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_stops_training():
    waiting, over = threading.Event(), threading.Event()

    def endless():
        waiting.set()
        yield "text"
        over.wait(60)

    def press():
        waiting.wait(60)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_bpe(endless(), 300)
        assert not over.is_set()
    finally:
        over.set()
        presser.join()
