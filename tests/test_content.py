"""What users bring that is not plain content: empty texts and replies, thoughts in every shape, tool calls, control
strings, keys that are not read, tokenizers that lose text, one very long line."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, make_chats, make_r1, make_texts, save_tokenizer, train, write_jsonl

from Config import UserError
from dataset import load_documents, load_splits
from text import encode_chat
from text.content import BARE, EMPTY_THOUGHT, WELL_FORMED, Reading, RecordReader, is_empty, thought_shape
from text.records import MalformedRecord, parse_record
from text.sources import find_sources, kind_of
from text.tokenizer import LONG_TEXT, TextEncoder, load_tokenizer, split_long

QUESTION = {"role": "user", "content": "三加四？"}


def chat(reply: str | dict, *before: dict) -> dict:
    """A conversation of a question and a reply, after other messages."""
    reply = reply if isinstance(reply, dict) else {"content": reply}
    return {"conversations": [*before, QUESTION, {"role": "assistant"} | reply]}


def read(records: list[dict], reading: Reading) -> tuple[list[dict], dict[str, int]]:
    """(documents, what was found) of records, each as a line of JSON."""
    reader = RecordReader(reading, ["<s>", "</s>", "<unk>"])
    lines = [json.dumps(record).encode() for record in records]
    return [d for line in lines for d in reader.documents(parse_record(line, reading.kind))], dict(reader.found)


def load(tmp_path, records, tokenizer, reading, **options) -> tuple:
    """(documents, what was said) of records in a file."""
    said = []
    file = write_jsonl(tmp_path / "data.jsonl", records)
    return load_documents(str(file), tokenizer, reading, str(tmp_path / "cache"), 512, say=said.append, **options), said


# ---------------------------------------------------------------------------------------------
# empty

EMPTY = ["", " ", "\n\n", "\t\r\n", "\u3000", "\xa0", "\u200b", "\ufeff", "\x00", " \u2060\u200d\n", "\u3164", "\u2800"]


@pytest.mark.parametrize("text", EMPTY)
def test_empty(text):
    """A text that shows nothing is empty, whatever it is made of; one sign makes it a text."""
    assert is_empty(text) and not is_empty(text + "。") and not is_empty(f"{text}1{text}")


def test_empty_texts_and_replies_are_counted_and_left_out(tmp_path, tokenizer):
    """None of them is trained on or counts as malformed; the turns before an empty one are kept."""
    texts, _ = load(tmp_path, [{"text": "一段话。"}, *({"text": text} for text in EMPTY)], tokenizer, "text")
    assert len(texts) == 1 and texts.counts[0] | {"empty": len(EMPTY), "malformed": 0, "lines": 1 + len(EMPTY)} == (
        texts.counts[0])
    good = [QUESTION, {"role": "assistant", "content": "七。"}]
    later = {"conversations": [*good, QUESTION, {"role": "assistant", "content": " "}, *good]}
    asked = {"conversations": [{"role": "user", "content": "\n"}, {"role": "assistant", "content": "您好"}]}
    chats, said = load(tmp_path, [chat("七。"), later, asked, *map(chat, EMPTY)], tokenizer, "chat")
    assert len(chats) == 2 and chats.tokens(0).tolist() == chats.tokens(1).tolist() == encode_chat(tokenizer, good)[0]
    counts = chats.counts[0]
    assert counts["malformed"] == 0 and counts["left out for an empty reply"] == len(EMPTY)
    assert counts["shortened for an empty reply"] == 1 and counts["left out for an empty question"] == 1
    assert f"empty {len(EMPTY) + 1}" in " ".join(said)
    _, found = read([chat(" ", {"role": "user", "content": " "}, *good)], Reading("chat"))
    assert found["left out for an empty question"] == 1  # the first reason, and all replies are counted
    assert found["reply: empty"] == found[f"reply: {BARE}"] == 1


@pytest.mark.parametrize("reading, records", [
    ("text", [{"text": text} for text in EMPTY]), ("chat", [chat(text) for text in EMPTY]),
    ("chat", [{"conversations": []}] * 3)])
def test_an_all_empty_file_is_refused(tmp_path, tokenizer, reading, records):
    """By its counts, and not as malformed."""
    with pytest.raises(UserError, match=rf"no document is left.*0 malformed.*{len(records)} "):
        load(tmp_path, records, tokenizer, reading)


def test_validation_that_takes_all_says_what_was_left_out(tmp_path, tokenizer):
    """Equal texts are never on both sides: of ten of them none is left, and the empty ones are counted."""
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ["一段话。"] * 10 + EMPTY])
    with pytest.raises(UserError, match=rf"nothing is left to train on.*0 malformed, {len(EMPTY)} empty"):
        load_splits(find_sources([str(file)]), None, tokenizer, "text", str(tmp_path / "c"), 64)


# ---------------------------------------------------------------------------------------------
# thoughts

SHAPES = {
    WELL_FORMED: ["<think>\n3+4=7\n</think>\n<answer>\n7\n</answer>", " <think>a</think><answer>b</answer>\n"],
    EMPTY_THOUGHT: ["<think>\n\n</think>\n<answer>7</answer>", "<think>\u3000</think><answer>7</answer>",
                    "<think>\n\n</think>\n七。"],
    BARE: ["七。", "3 < 4", "<b>7</b>", "<think >7"],
    "cut": ["<think>\n3+4，先", "<think>3</think><answer>7", "<think>3<answer>7</answer>"],
    "no <answer>": ["<think>\n3+4\n</think>\n7", "想<think>3</think>7"],
    "not opened": ["3+4\n</think>\n7", "<think>3</think>7</answer>"],
    "tags repeated": ["<think><think>3</think>4</think><answer>7</answer>",
                      "<think>3</think><answer>7</answer><answer>8</answer>"],
    "<answer> before <think>": ["<answer>7</answer><think>3</think>"],
    "no <think>": ["<answer>7</answer>"],
    "empty <answer>": ["<think>3</think><answer> </answer>", "<think></think><answer></answer>"],
    "text outside of the tags": ["好的<think>3</think><answer>7</answer>", "<think>3</think>是<answer>7</answer>"],
}
GOOD = (WELL_FORMED, EMPTY_THOUGHT, BARE)


@pytest.mark.parametrize("shape, reply", [(shape, reply) for shape, replies in SHAPES.items() for reply in replies])
def test_shapes(shape, reply):
    """Each reply has the shape that a reader sees."""
    assert thought_shape(reply) == shape


@pytest.mark.parametrize("reply", ["<think>3</think>", "<think></think>\n", "</answer>", "<think>", "</think><think>"])
def test_no_other_reply_is_good(reply):
    """A thought without an answer and lone tags are malformed."""
    assert thought_shape(reply) not in GOOD


@pytest.mark.parametrize("stage", ["SFT", "distill"])
def test_every_shape_is_counted_and_malformed_ones_are_left_out(tmp_path, tokenizer, stage):
    """Over all records, many more than a thousand; nothing counts as malformed JSON; a flag keeps all of them."""
    records = [chat(reply) for replies in SHAPES.values() for reply in replies] * 60
    reading = Reading("chat", thoughts=stage == "distill")
    documents, said = load(tmp_path, records, tokenizer, reading, max_bad_ratio=0)
    for shape, replies in SHAPES.items():
        assert f"{shape} {60 * len(replies):,}" in " ".join(said)
    kept = sum(60 * len(replies) for shape, replies in SHAPES.items() if shape in GOOD)
    assert len(documents) == kept and documents.counts[0]["left out for a malformed thought"] == len(records) - kept
    all_of_them, _ = load(tmp_path, records, tokenizer, Reading("chat", keep_malformed_thoughts=True))
    assert len(all_of_them) == len(records)


def test_reasoning_content(tmp_path, tokenizer):
    """In distill it becomes the thought of an R1 reply; in SFT it is left out; both are counted."""
    record = chat({"content": "七。", "reasoning_content": "三加四得七"})
    as_r1 = "<think>\n三加四得七\n</think>\n<answer>\n七。\n</answer>"
    for thoughts, reply, words in ((True, as_r1, "become"), (False, "七。", "left out")):
        documents, said = load(tmp_path, [record, chat("八。")], tokenizer, Reading("chat", thoughts=thoughts))
        assert documents.tokens(0).tolist() == encode_chat(tokenizer, chat(reply)["conversations"])[0]
        assert any("1 replies have a thought in reasoning_content" in line and words in line for line in said)


@pytest.mark.parametrize("reply, reason", [
    ({"content": "", "reasoning_content": "三加"}, "an empty reply"),  # cut before the answer
    ({"content": "七", "reasoning_content": "三</think>四"}, "a malformed thought"),
    ({"content": "", "tool_calls": [{"name": "add"}]}, "a tool call"),
    ({"content": None, "tool_calls": [{"name": "add"}]}, "a tool call"),
    ({"tool_calls": [{"name": "add"}]}, "a tool call"),
    ({"content": None, "function_call": {"name": "add"}}, "a tool call")])
def test_replies_that_are_none(reply, reason):
    """They are left out and counted, and are no malformed lines."""
    documents, found = read([chat(reply)], Reading("chat", thoughts=True))
    assert documents == [] and found[f"left out for {reason}"] == 1


def test_thoughts_that_add_nothing():
    """An empty reasoning_content changes nothing, and a reply with tags of its own keeps them."""
    own = "<think>a</think><answer>b</answer>"
    for reply, content in (({"content": "七", "reasoning_content": " "}, "七"),
                           ({"content": "七", "reasoning_content": None}, "七"),
                           ({"content": own, "reasoning_content": "c"}, own)):
        (document,), _ = read([chat(reply)], Reading("chat", thoughts=True))
        assert document["conversations"][-1]["content"] == content
    for value in (5, ["a"], "\ud800"):
        with pytest.raises(MalformedRecord, match="reasoning_content"):
            parse_record(json.dumps(chat({"content": "七", "reasoning_content": value})).encode(), "chat")


def test_tools_end_a_conversation():
    """The turns before the first call are kept; calls and results are counted; a reply beside a call is one."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    good = [QUESTION, {"role": "assistant", "content": "七。"}]
    conversation = [*good, QUESTION, call, {"role": "tool", "content": [{"type": "text"}]}, *good]
    spoken = chat({"content": "我来算。", "tool_calls": [{"name": "add"}]})
    documents, found = read([{"conversations": conversation, "tools": []}, spoken], Reading("chat"))
    assert [len(d["conversations"]) for d in documents] == [2, 2] and found["shortened for a tool call"] == 1
    assert found["key: tool_calls"] == 2 and found["key: tools"] == 1 and found[f"reply: {BARE}"] == 3
    with pytest.raises(UserError, match="role 'tool'"):
        encode_chat(None, conversation[4:5])


def test_distill_stops_without_a_single_thought(tmp_path, tokenizer_dir, tokenizer):
    """All sources together have none, so nothing can be distilled; one thought among them is enough, also in a key."""
    bare, other = ([chat(f"{n}。") for n in range(first, first + 40)] for first in (0, 40))
    paths = [f"{write_jsonl(tmp_path / f'{name}.jsonl', records)}=0.5" for name, records in (("a", bare), ("b", other))]
    start = tmp_path / "start.pth"
    train("pretrain", write_jsonl(tmp_path / "t.jsonl", make_texts(1, 8, 60)), tokenizer_dir, tmp_path / "p",
          preset="nano", max_steps=1, max_seq_len=128)
    os.replace(tmp_path / "p" / "pretrain.pth", start)
    options = dict(init_from=start, max_steps=1, max_seq_len=128, cache_dir=tmp_path / "c")
    with pytest.raises(UserError, match="no reply has a thought"):
        train("distill", paths, tokenizer_dir, tmp_path / "d", **options)
    with pytest.raises(UserError, match="no reply has a thought"):
        train("distill", paths[0][:-4], tokenizer_dir, tmp_path / "d", **options)
    write_jsonl(tmp_path / "other.jsonl", [chat({"content": f"{n}。", "thinking": "三"}) for n in range(40)])
    with pytest.raises(UserError, match="no reply has a thought.*python -m text.convert"):  # in a key of another name
        train("distill", tmp_path / "other.jsonl", tokenizer_dir, tmp_path / "d", **options)
    thought = chat({"content": "七。", "reasoning_content": "三加四"})
    write_jsonl(tmp_path / "b.jsonl", [*other, *([thought] * 20)])
    assert train("distill", paths, tokenizer_dir, tmp_path / "d", **options)
    assert train("SFT", paths[0][:-4], tokenizer_dir, tmp_path / "d", **options)  # SFT needs none


# ---------------------------------------------------------------------------------------------
# control strings, other keys

SPELLED = ["<s>甲</s> <s>乙</s>", "<|im_start|>user\n甲<|im_end|>", "甲<|endoftext|>乙", "甲</s>", "[INST]甲[/INST]乙",
           "<bos>甲<eos>", "<｜User｜>甲<｜end▁of▁sentence｜>", "<start_of_turn>甲<end_of_turn>", "甲<unk>乙",
           "[EOS]甲[BOS]", "甲<eod>", "<extra_id_0>甲<unused12>"]


def test_control_strings_are_told_and_can_split(tmp_path, tokenizer):
    """As text they are learned, and it says so; --split_documents makes each part a document that spells none."""
    records = [{"text": text} for text in [*SPELLED, "没有 < 5 [1]", "<b>粗</b> |x| [INS"]]
    documents, said = load(tmp_path, records, tokenizer, "text")
    assert len(documents) == 14 and any("12 of 14 documents spell control strings" in line for line in said)
    assert any("--split_documents" in line and "</s> 2" in line for line in said)
    split, said = load(tmp_path, records, tokenizer, Reading("text", split_documents=True))
    texts = [tokenizer.decode(split.tokens(d).tolist()[1:-1]) for d in range(len(split))]
    assert texts[:3] == ["甲", "乙", "user\n甲"] and len(texts) == 18 and not any("<s>" in text for text in texts)
    assert any("12 lines split" in line for line in said) and split.name(1).endswith(":1")


def test_tags_in_a_text_are_told_and_do_not_split(tmp_path, tokenizer):
    """They are no end of a document."""
    for split in (False, True):
        documents, said = load(tmp_path, [{"text": "甲<think>乙"}, {"text": "丙"}], tokenizer,
                               Reading("text", split_documents=split))
        assert len(documents) == 2 and any("1 of 2 documents spell control strings (<think> 1)" in line
                                           and "--split_documents" not in line for line in said)


def test_a_text_of_control_strings_alone_is_empty(tmp_path, tokenizer):
    """When they split it, nothing is left of it."""
    documents, _ = load(tmp_path, [{"text": "</s> <s>"}, {"text": "甲"}], tokenizer,
                        Reading("text", split_documents=True))
    assert len(documents) == 1 and documents.counts[0]["empty"] == 1


def test_control_strings_in_chats_are_told(tmp_path, tokenizer):
    """Also the tags in a user's words, which are text there; in a reply tags are no control strings."""
    question = {"role": "user", "content": "<think>是什么？"}
    records = [chat("七</s>"), {"conversations": [question, {"role": "assistant", "content": "标签"}]},
               chat("<think>a</think><answer>b</answer>")]
    _, said = load(tmp_path, records, tokenizer, "chat")
    assert any("2 of 3 documents spell control strings (</s> 1, <think> 1)" in line for line in said)


def test_an_empty_system_message_is_none():
    """It says nothing; the conversation is that without it."""
    system = {"role": "system", "content": " "}
    documents, found = read([chat("七", system), chat("七")], Reading("chat"))
    assert documents[0] == documents[1] and found["empty system messages"] == 1
    documents, found = read([{"conversations": [system]}], Reading("chat"))
    assert not documents and found["empty"] == 1


def test_keys_without_end_are_counted_together():
    """A record whose keys are ids: memory does not grow with the data."""
    _, found = read([{"text": "甲", str(n): 1} for n in range(1500)], Reading("text"))
    assert len(found) <= 1001 and sum(n for name, n in found.items() if name.startswith("key: ")) == 1500


def test_a_key_cannot_write_to_the_terminal():
    """Nor fill it."""
    _, found = read([{"text": "甲", "\x1b[2J\nerror: " + "x" * 99: 1}], Reading("text"))
    (name,) = (name for name in found if name.startswith("key: "))
    assert name.isprintable() and len(name) < 50


def test_keys_that_are_not_read_are_counted(tmp_path, tokenizer):
    """Of records and of messages, by name, at most eight of them."""
    records = [chat({"content": "七", "name": "甲"}) | {"system": "你是", "tools": [], "source": "x", "text": "y"}] * 3
    _, said = load(tmp_path, records, tokenizer, "chat")
    assert any("keys that are not read: name 3, source 3, system 3, text 3, tools 3" in line for line in said)
    _, said = load(tmp_path, [{"text": "甲", f"key {n}": 1} for n in range(20)], tokenizer, "text")
    assert any(line.count(" 1,") == 8 and "12 more" in line for line in said if "not read" in line)


# ---------------------------------------------------------------------------------------------
# tokenizers that lose text


def foreign(name: str, texts: list[str]):
    """A tokenizer of a kind that loses text, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["[UNK]", "<s>", "</s>"]
    if name == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="[UNK]")
    elif name == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    else:  # a byte-level vocabulary behind a pre-tokenizer that hands it no bytes
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    if name == "bytes behind whitespace":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("name", ["unigram", "wordpiece", "bytes behind whitespace"])
def test_a_tokenizer_that_loses_text(tmp_path, name):
    """It is refused when the cache is made and when it is there, by both stages' readers; a flag allows it."""
    texts = [record["text"] for record in make_texts(9, 60, longest=200)]
    folder = save_tokenizer(foreign(name, ["abc 123"] if name == "unigram" else texts[:3]), tmp_path / "tokenizer",
                            unk_token="[UNK]")
    tokenizer, records = load_tokenizer(str(folder)), [{"text": text} for text in texts]
    for _ in range(2):
        with pytest.raises(UserError, match=r"the tokenizer loses text: \d+\.\d\d% of the characters.*--max_text_loss"):
            load(tmp_path, records, tokenizer, "text")
    with pytest.raises(UserError, match="the tokenizer loses text"):
        load(tmp_path, make_chats(3, 9), tokenizer, "chat")
    documents, said = load(tmp_path, records, tokenizer, "text", max_text_loss=1.0)
    assert len(documents) == 60 and any("0 of 60 texts decode exactly" in line and "do not compare" in line
                                        for line in said)
    with pytest.raises(UserError, match="the tokenizer loses text"):  # the cache is there now
        load(tmp_path, records, tokenizer, "text")


def test_our_tokenizer_loses_nothing(tmp_path, tokenizer):
    """Any text decodes exactly, which is printed."""
    texts = ["\u3000全角，。！", "  a\n\n\tb  ", "😀\u200d🌊 é e\u0301", "</s><think>", "１２３", "\x00a\x7f"]
    _, said = load(tmp_path, [{"text": text} for text in texts], tokenizer, "text")
    assert any("6 of 6 texts decode exactly, 0.00% unknown tokens, 0.00% of the characters lost" in line
               and "compare" not in line for line in said)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def test_git_lfs_pointers_as_tokenizer_and_as_data_are_named(tmp_path, tokenizer_dir):
    """What they are, and the command that fetches the file."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = tmp_path / name.replace(".json", "")
        folder.mkdir()
        for file in tokenizer_dir.iterdir():
            (folder / file.name).write_bytes(POINTER.encode() if file.name == name else file.read_bytes())
        with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer.*git lfs pull"):
            load_tokenizer(str(folder))
    for suffix in ("", ".gz", ".xz", ".zst"):
        data = tmp_path / f"a.jsonl{suffix}"
        data.write_text(POINTER, encoding="utf-8")
        for use in (lambda data=data: kind_of([data]), lambda data=data: load_documents(
                str(data), load_tokenizer(str(tokenizer_dir)), "text", str(tmp_path / "c"), 64)):
            with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
                use()


# ---------------------------------------------------------------------------------------------
# one long line


@pytest.mark.parametrize("text", ["我" * 300_000, "a" * 200_001, "第3页：“水”是弱的。\n  So it's said; x=1.\n\n" * 8000,
                                  " " * 150_000,
                                  "天地不仁以万物为刍狗圣人不仁以百姓为刍狗水。" * 7000, "😀" * LONG_TEXT + "。",
                                  "1" * 100_001])
def test_a_long_text_is_encoded_in_parts(text, tokenizer):
    """The parts are the text; where words end between them, the tokens are those of the whole."""
    encoder, parts = TextEncoder.of(tokenizer), split_long(text)
    assert "".join(parts) == text and max(map(len, parts)) <= LONG_TEXT
    ids, begins, ends = map(list, zip(*encoder.encode_with_offsets(text), strict=True))
    assert encoder.encode(["甲", text, "乙"]) == [encoder.encode(["甲"])[0], ids, encoder.encode(["乙"])[0]]
    assert tokenizer.decode(ids) == text and ends[-1] == len(text) and begins == sorted(begins)
    if "水" in text or "1" in text[:1]:
        assert ids == encoder.plain.encode(text, add_special_tokens=False).ids


def test_a_line_of_four_million_characters(tmp_path, tokenizer_dir):
    """As a text and as a chat: at most 600 MB over the idle process."""
    text = ("水至柔，而攻坚强者莫之能胜。" * 300_000)[:4_000_000]
    files = {"text": write_jsonl(tmp_path / "text.jsonl", [{"text": text}, {"text": "短。"}]),
             "chat": write_jsonl(tmp_path / "chat.jsonl", [chat(text), chat("短。")])}
    code = f"""if 1:
        import torch
        from dataset import load_documents
        from text.tokenizer import load_tokenizer
        tokenizer = load_tokenizer({str(tokenizer_dir)!r})
        def peak():  # of this process: getrusage would begin with its parent's
            return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
        idle = peak()
        for kind, file in {({kind: str(file) for kind, file in files.items()})!r}.items():
            print(len(load_documents(file, tokenizer, kind, {str(tmp_path / 'c')!r}, 512)), peak() - idle)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    counts = [line.split() for line in done.stdout.splitlines() if line[0].isdecimal()]
    assert [int(n) for n, _ in counts] == [2, 1]  # no chat of this length fits
    assert float(counts[-1][1]) <= 600, done.stdout


# ---------------------------------------------------------------------------------------------
# stages


def test_a_stage_says_first_what_was_found(tmp_path, tokenizer_dir, capsys):
    """Before the first step, over all records of each source and of the validation data."""
    records = [*make_r1(1, 1500, 20), chat("<think>三"), chat("七</s>"), chat(" ")]
    data, val = write_jsonl(tmp_path / "a.jsonl", records), write_jsonl(tmp_path / "v.jsonl", make_r1(2, 9, 20))
    with pytest.raises(UserError, match="no such file"):
        train("distill", data, tokenizer_dir, tmp_path / "o", init_from=tmp_path / "missing.pth")
    train("SFT", data, tokenizer_dir, tmp_path / "o", init_from="none", preset="nano", max_steps=1, val_path=val)
    before = capsys.readouterr().out.partition("Epoch:")[0]
    for words in ("well-formed 1,500", "cut 1", "empty 1", "without tags 1", "well-formed 9", "texts decode exactly",
                  "1 of 1,501 documents spell control strings", "1,503 lines, 0 malformed, 0 empty, ",
                  "1 left out for a malformed thought, 1 left out for an empty reply"):
        assert words in before, words


def test_doubles_are_counted_on_both_sides(tmp_path, tokenizer):
    """In training they are kept and counted, in one source and between sources."""
    texts = [{"text": f"{'水火木金土'[n % 5]}{n}"} for n in range(300)]
    a, b = write_jsonl(tmp_path / "a.jsonl", texts + texts[:50]), write_jsonl(tmp_path / "b.jsonl", texts[:20])
    said = []
    load_splits(find_sources([str(a), str(b)]), None, tokenizer, "text", str(tmp_path / "c"), 64, say=said.append)
    assert any("doubles in training" in line for line in said)
    said.clear()
    load_splits(find_sources([f"{a}=0.5", f"{b}=0.5"]), None, tokenizer, "text", str(tmp_path / "c"), 64,
                say=said.append)
    assert any("documents are in more than one source" in line for line in said)
