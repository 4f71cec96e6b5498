"""text/convert.py: each file is named, and the command in its line makes what the project reads."""
# ruff: noqa: E501 (tables of hanzi, which count double)

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import shlex
import sqlite3
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from conftest import ROOT

from Config import UserError
from evaluate import parse_question
from text.convert import describe, main
from text.records import MalformedRecord, parse_record, read_lines
from text.shapes import SHAPES, convert_record, shape_of


def dumps(value, **options) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def lines(*records) -> str:
    return "".join(dumps(record) + "\n" for record in records)


def say(*turns: str) -> list[dict]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def chat(*turns: str, system: str | None = None, thought: str | None = None) -> dict:
    messages = ([{"role": "system", "content": system}] if system else []) + say(*turns)
    if thought:
        messages[-1]["reasoning_content"] = thought
    return {"conversations": messages}


ALPACA = [{"instruction": "把下面的词译成英文", "input": "清泉", "output": "clear spring"},
          {"instruction": "说一句关于雨的话", "input": "", "output": "雨落在屋檐上，像有人轻轻敲门。"}]
ALPACA_CHATS = [chat("把下面的词译成英文\n清泉", "clear spring"), chat("说一句关于雨的话", "雨落在屋檐上，像有人轻轻敲门。")]
TEXTS = [{"text": "山脚下有一条小河。"}, {"text": "河边住着一位木匠，\n他只做椅子。"}]
CHATS = [chat("你叫什么？", "我叫小水。"), chat("三加四？", "等于七。", "再加一？", "等于八。", system="回答要短。")]
QUESTIONS = [{"question": "六乘七等于多少？", "answer": "42"}, {"question": "水在几度结冰？", "answer": "0"}]
OTHER_QUESTIONS = [{"history": say("三加四？", "等于七。"), "question": "再加一？", "answer": "8"},
                   {"question": "明天下雨吗？", "decline": True, "choices": ["下", "不下"]},
                   {"history": say("在？", "在。"), "question": "我叫什么？", "decline": True, "source": "unknown"}]
TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": {"name": "weather"}}]}
TOOL_RESULT = {"role": "tool", "tool_call_id": "c1", "content": "晴"}
CSV = "﻿问题,回答\r\n茶怎么泡？,\"先温杯，\n再注水。\"\r\n\"他说\"\"好\"\"吗？\",说了。\r\n"
CSV_CHATS = [chat("茶怎么泡？", "先温杯，\n再注水。"), chat('他说"好"吗？', "说了。")]


def chatgpt(*messages: tuple) -> dict:
    """A conversation as ChatGPT exports it; each message is (role, parts, further fields)."""
    mapping = {"n0": {"id": "n0", "message": None, "parent": None, "children": ["n1"]}}
    for i, (role, parts, *more) in enumerate(messages, start=1):
        message = {"author": {"role": role}, "content": {"content_type": "text", "parts": parts}, "recipient": "all"}
        mapping[f"n{i}"] = {"id": f"n{i}", "parent": f"n{i - 1}", "children": [f"n{i + 1}"],
                            "message": message | (more[0] if more else {})}
    mapping["other"] = {"id": "other", "parent": "n1", "children": [], "message": {
        "author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["没有被选中的回答"]}}}
    return {"title": "一次谈话", "mapping": mapping, "current_node": f"n{len(messages)}"}


def claude(*turns: str) -> dict:
    return {"uuid": "u", "name": "谈话", "chat_messages": [
        {"uuid": f"{i}", "sender": ("human", "assistant")[i % 2], "text": turn, "content": [{"type": "text", "text": turn}],
         "attachments": [], "files": []} for i, turn in enumerate(turns)]}


# name → (file name, content, words in the line, records of the result)
FILES = {
    "array": ("a.json", dumps(CHATS), ["one array"], CHATS),
    "pretty array": ("a.jsonl", dumps(TEXTS, indent=2), ["one array"], TEXTS),
    "array, one object a line": ("a.json", "[\n" + ",\n".join(map(dumps, CHATS)) + "\n]\n", ["one array"], CHATS),
    "array, cut": ("a.json", dumps(CHATS + CHATS, indent=1)[:-60], ["one array"], CHATS + CHATS[:1]),
    "array of Alpaca": ("a b.json", dumps(ALPACA, indent=4), ["one array", "Alpaca"], ALPACA_CHATS),
    "array of texts": ("a.json", dumps([t["text"] for t in TEXTS], indent=1), ["one array"], TEXTS),
    "array of messages": ("a.json", dumps(say("你好", "你好！"), indent=1), ["one array"], [chat("你好", "你好！")]),
    "pretty objects": ("a.jsonl", "\n".join(dumps(c, indent=2) for c in CHATS), ["several lines"], CHATS),
    "objects on one line": ("a.jsonl", "".join(map(dumps, TEXTS)), ["several lines"], TEXTS),
    "wrapped": ("它的'数据'.json", dumps({"data": ALPACA, "version": 1}), ['"data"', "Alpaca"], ALPACA_CHATS),
    "train beside test": ("a.json", dumps({"train": QUESTIONS, "test": QUESTIONS}, indent=1), ['"train"'], QUESTIONS),
    "pandas columns": ("a.json", dumps({"text": {"0": TEXTS[0]["text"], "1": TEXTS[1]["text"]}}), ["columns"], TEXTS),
    "numbered rows": ("a.json", dumps({"0": QUESTIONS[0], "1": QUESTIONS[1]}), ["rows"], QUESTIONS),
    "wrapped under a known key": ("a.json", dumps({"conversations": [{"id": 1} | CHATS[0]]}), ['"conversations"'], [
        {"id": 1} | CHATS[0]]),
    "old Mac lines": ("a.jsonl", lines(*ALPACA).replace("\n", "\r"), ["Alpaca"], ALPACA_CHATS),
    "NaN": ("a.json", '[{"instruction": "数到三", "input": NaN, "output": "一二三"}]', ["Alpaca"], [
        chat("数到三", "一二三")]),
    "GBK": ("a.jsonl", lines(*CHATS).encode("gbk"), ["GBK"], CHATS),
    "GB18030 array": ("a.json", dumps([{"text": "𠮷野家"}] + TEXTS).encode("gb18030"), ["GBK", "array"], [
        {"text": "𠮷野家"}] + TEXTS),
    "GBK text": ("a.txt", "甲说早。\r\n乙说晚。\r\n".encode("gbk"), ["GBK", "plain text"], [
        {"text": "甲说早。"}, {"text": "乙说晚。"}]),
    "UTF-16": ("a.jsonl", lines(*CHATS).replace("\n", "\r\n").encode("utf-16"), ["UTF-16"], CHATS),
    "UTF-16 big endian": ("a.json", b"\xfe\xff" + dumps(ALPACA).encode("utf-16-be"), ["UTF-16", "Alpaca"], ALPACA_CHATS),
    "CSV": ("a.csv", CSV, ["CSV", "question"], CSV_CHATS),
    "CSV, GBK": ("a.csv", CSV[1:].encode("gbk"), ["CSV", "GBK"], CSV_CHATS),
    "CSV, semicolons": ("a.csv", "instruction;input;output\n数;一,二;三\n", ["CSV"], [chat("数\n一,二", "三")]),
    "CSV, tabs": ("a.txt", "question\tanswer\n几个？\t5\n", ["CSV"], [{"question": "几个？", "answer": "5"}]),
    "CSV, UTF-16 tabs": ("a.txt", "text\tid\n一段话\t1\n".encode("utf-16"), ["UTF-16", "CSV"], [
        {"text": "一段话", "id": "1"}]),
    "CSV, lists": ("a.csv", "prompt,history,response\n还有呢？,\"[['早？', '早。']]\",没有了。\n", ["CSV"], [
        chat("早？", "早。", "还有呢？", "没有了。")]),
    "Python": ("a.jsonl", "".join(f"{r}\n" for r in ALPACA), ["Python", "Alpaca"], ALPACA_CHATS),
    "Python list": ("a.json", str(TEXTS), ["one array"], TEXTS),
    "commas": ("a.jsonl", ",\n".join(map(dumps, TEXTS)) + ",\n", ["comma"], TEXTS),
    "text by line": ("a.txt", "第一行。\n[注]第二行。\n", ["plain text (each line"], [
        {"text": "第一行。"}, {"text": "[注]第二行。"}]),
    "text by paragraph": ("a.txt", "　　第一段，\r\n还在第一段。\r\n\r\n\r\n第二段。", ["blank lines"], [
        {"text": "　　第一段，\n还在第一段。"}, {"text": "第二段。"}]),
    "gzip": ("a.json.gz", gzip.compress(dumps(ALPACA).encode()), ["Alpaca"], ALPACA_CHATS),
    "xz": ("a.csv.xz", lzma.compress(CSV.encode()), ["CSV"], CSV_CHATS),
    "zstd": ("a.jsonl.zst", zstandard.compress(lines(*ALPACA).encode()), ["Alpaca"], ALPACA_CHATS),
    "gzip without .gz": ("a.jsonl", gzip.compress(lines(*CHATS).encode()), ["packed", "mv "], CHATS),
    "zstd named .gz": ("a.jsonl.gz", zstandard.compress(lines(*CHATS).encode()), ["packed", "mv "], CHATS),
    "plain, named .gz": ("$a.jsonl.gz", lines(*TEXTS), ["not packed", "mv "], TEXTS),
    "gzip without .gz, Alpaca": ("-a.json", gzip.compress(lines(*ALPACA).encode()), ["packed"], ALPACA_CHATS),
    "bzip2": ("a.jsonl.bz2", bz2.compress(lines(*QUESTIONS).encode()), ["bzip2", "bunzip2"], QUESTIONS),
}

# name → (record, word in the line, result)
RECORDS = {
    "Alpaca with system and history": (
        {"instruction": "再说一遍", "input": "", "output": "好，再说一遍。", "system": "你很有耐心。", "history": [["说一遍", "说了。"]]},
        "Alpaca", chat("说一遍", "说了。", "再说一遍", "好，再说一遍。", system="你很有耐心。")),
    "DeepCtrl": ({"id": 1, "instruction": "", "input": "河水为什么向东流？", "output": "因为西边高。", "history": [],
                  "language": "chinese"}, "Alpaca", chat("河水为什么向东流？", "因为西边高。")),
    "Alpaca with thoughts": ({"instruction": "2+3", "output": "<think>\n二加三是五\n</think>\n\n5"}, "Alpaca", chat(
        "2+3", "<think>\n二加三是五\n</think>\n<answer>\n5\n</answer>")),
    "ShareGPT": ({"system": "你是向导。", "tools": "", "conversations": [
        {"from": "human", "value": "山有多高？"}, {"from": "gpt", "value": "一千米。"}]},
        "ShareGPT", chat("山有多高？", "一千米。", system="你是向导。")),
    "ShareGPT with tools": ({"conversations": [
        {"from": "system", "value": "你会查天气。"}, {"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好。"},
        {"from": "human", "value": "天气？"}, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "晴"},
        {"from": "gpt", "value": "晴天。"}]}, "ShareGPT", chat("你好", "你好。", system="你会查天气。")),
    "ShareGPT of user and assistant": ({"conversations": [{"from": "user", "value": "在？"}, {
        "from": "assistant", "value": "在。"}]}, "ShareGPT", chat("在？", "在。")),
    "OpenAI": ({"messages": chat("早", "早上好。", system="有礼貌。")["conversations"]}, '"messages"', chat(
        "早", "早上好。", system="有礼貌。")),
    "OpenAI with parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "看，"}, {
        "type": "text", "text": "这是什么？"}]}, {"role": "assistant", "content": "是鸟。"}]}, "OpenAI", chat("看，这是什么？", "是鸟。")),
    "OpenAI with an image": ({"messages": [*say("早", "早。"), {"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "x"}}]}, {"role": "assistant", "content": "是猫。"}]},
        "OpenAI", chat("早", "早。")),
    "OpenAI with tools": ({"messages": [*say("你好", "你好。", "天气？"), TOOL_CALL, TOOL_RESULT, {
        "role": "assistant", "content": "晴。"}], "tools": [{}]}, "OpenAI", chat("你好", "你好。")),
    "developer": ({"messages": [{"role": "developer", "content": "短。"}, *say("一", "二")]}, "OpenAI", chat(
        "一", "二", system="短。")),
    "thoughts in reasoning": ({"messages": [{"role": "user", "content": "4+4"}, {
        "role": "assistant", "content": "8", "reasoning": "四的两倍"}]}, "OpenAI", chat("4+4", "8", thought="四的两倍")),
    "thoughts in thinking": ({"conversations": [{"role": "user", "content": "4+4"}, {
        "role": "assistant", "content": "8", "thinking": "四的两倍"}]}, "conversations", chat("4+4", "8", thought="四的两倍")),
    "thoughts in reasoning_content": ({"messages": [{"role": "user", "content": "4+4"}, {
        "role": "assistant", "content": "8", "reasoning_content": "四的两倍"}]}, "OpenAI", chat("4+4", "8", thought="四的两倍")),
    "DeepSeek replies": (chat("4+4", "<think>四的两倍</think>8"), "conversations", chat(
        "4+4", "<think>\n四的两倍\n</think>\n<answer>\n8\n</answer>")),
    "DeepSeek columns": ({"input": "4+4", "reasoning_content": "四的两倍", "content": "8", "score": 9}, "reasoning_content",
                         chat("4+4", "8", thought="四的两倍")),
    "medical-o1": ({"Question": "冷怎么办？", "Complex_CoT": "冷要保暖", "Response": "穿衣。"}, "question", chat(
        "冷怎么办？", "穿衣。", thought="冷要保暖")),
    "prompt and completion": ({"prompt": "春眠", "completion": " 不觉晓"}, "old OpenAI", chat("春眠", " 不觉晓")),
    "prompt and response": ({"prompt": "春", "response": "夏"}, "prompt", chat("春", "夏")),
    "TRL": ({"prompt": say("春"), "completion": [{"role": "assistant", "content": "夏"}]}, "prompt", chat("春", "夏")),
    "query and response": ({"query": "第三？", "response": "三。", "history": [["第一？", "一。"], ["第二？", "二。"]]},
                           "ms-swift", chat("第一？", "一。", "第二？", "二。", "第三？", "三。")),
    "ChatGLM": ({"prompt": "第二？", "response": "二。", "history": [{"role": "user", "content": "第一？"}, {
        "role": "assistant", "content": "一。"}]}, "prompt", chat("第一？", "一。", "第二？", "二。")),
    "question and response": ({"question": "几点？", "response": "三点。"}, "question", chat("几点？", "三点。")),
    "Dolly": ({"instruction": "总结", "context": "长文。", "response": "短。"}, "instruction", chat("总结\n长文。", "短。")),
    "Firefly": ({"kind": "诗", "input": "写诗", "target": "水绿山青。"}, "Firefly", chat("写诗", "水绿山青。")),
    "Firefly conversation": ({"conversation_id": 1, "category": "闲谈", "conversation": [
        {"human": "饿吗？", "assistant": "不饿。"}, {"human": "渴吗？", "assistant": "不渴。"}]},
        '"conversation"', chat("饿吗？", "不饿。", "渴吗？", "不渴。")),
    "XTuner": ({"conversation": [{"system": "短。", "input": "一", "output": "二"}]}, '"conversation"', chat(
        "一", "二", system="短。")),
    "LMSYS": ({"conversation_id": "x", "model": "m", "conversation": say("早", "早。"), "turn": 1}, '"conversation"', chat(
        "早", "早。")),
    "dialogue": ({"dialogue": [{"speaker": "用户", "text": "有鱼吗？"}, {"speaker": "助手", "text": "有。"}]}, '"dialogue"', chat(
        "有鱼吗？", "有。")),
    "dialog of pairs": ({"dialog": [["买吗？", "买。"], ["多少？", "三斤。"]]}, '"dialog"', chat("买吗？", "买。", "多少？", "三斤。")),
    "turns of strings": ({"turns": ["走吗？", "走。"]}, '"turns"', chat("走吗？", "走。")),
    "other words for roles": ({"messages": [{"role": "Human", "content": "坐？"}, {"role": "bot", "content": "坐。"}, {
        "role": "用户", "content": "站？"}, {"role": "model", "content": "站。"}]}, "OpenAI", chat("坐？", "坐。", "站？", "站。")),
    "DPO": ({"prompt": "哪个好？", "chosen": "第一个。", "rejected": "不知道。"}, "DPO", chat("哪个好？", "第一个。")),
    "DPO of messages": ({"prompt": "好？", "chosen": say("好？", "好。"), "rejected": say("好？", "坏。")}, "DPO", chat("好？", "好。")),
    "DPO of ShareGPT": ({"conversations": [{"from": "human", "value": "好？"}], "chosen": {"from": "gpt", "value": "好。"},
                         "rejected": {"from": "gpt", "value": "坏。"}}, "DPO", chat("好？", "好。")),
    "DPO of Anthropic": ({"chosen": "\n\nHuman: 好？\n\nAssistant: 好。\n\nHuman: 真？\n\nAssistant: 真。", "rejected": "x"}, "DPO",
                         chat("好？", "好。", "真？", "真。")),
    "ChatGPT": (chatgpt(("system", [""]), ("user", ["看海？"]), ("assistant", ["看。"])), "ChatGPT", chat("看海？", "看。")),
    "ChatGPT with a tool": (chatgpt(("user", ["看海？"]), ("assistant", ["看。"]), ("user", ["画海"]), (
        "assistant", ["{}"], {"recipient": "dalle"}), ("tool", ["图"])), "ChatGPT", chat("看海？", "看。")),
    "Claude": (claude("写信？", "写。", "给谁？", "给你。"), "Claude", chat("写信？", "写。", "给谁？", "给你。")),
    "content": ({"id": 3, "content": "正文在此。"}, '"content"', {"text": "正文在此。"}),
    "title and content": ({"title": "题目", "content": "正文在此。", "url": "x"}, '"content"', {"text": "题目\n正文在此。"}),
    "article": ({"article": "文章。"}, '"article"', {"text": "文章。"}),
    "body": ({"body": "文章。"}, '"body"', {"text": "文章。"}),
    "MNBVC": ({"文件名": "x", "段落": [{"行号": 1, "内容": "第一段"}, {"行号": 2, "内容": "第二段"}]}, '"paragraphs"', {
        "text": "第一段\n第二段"}),
    "poem": ({"title": "江", "paragraphs": ["江水流，", "人不留。"]}, '"paragraphs"', {"text": "江\n江水流，\n人不留。"}),
    "problem and solution": ({"problem": "1+1", "solution": "一加一得二。"}, "mathematics", chat("1+1", "一加一得二。")),
    "problem and answer": ({"problem": "1+1", "answer": 2, "level": 1}, "mathematics", {"question": "1+1", "answer": "2"}),
    "problem, solution and answer": ({"problem": "1+1", "solution": "得二。", "answer": "2"}, "mathematics", chat(
        "1+1", "得二。") | {"question": "1+1", "answer": "2"}),
    "Chinese keys": ({"指令": "译", "输入": "水", "输出": "water"}, "Alpaca", chat("译\n水", "water")),
    "weight": ({"prompt": "春", "response": "夏", "weight": 0.5}, "prompt", chat("春", "夏") | {"weight": 0.5}),
}
CASES = FILES | {name: ("a.jsonl", lines(record, record), [word], [result, result])
                 for name, (record, word, result) in RECORDS.items()}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def run_bash(command: str, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command.replace("python -m", f"{shlex.quote(sys.executable)} -m")], cwd=cwd,
                          capture_output=True, text=True, encoding="utf-8", env=os.environ | {"PYTHONPATH": str(ROOT)})


def read(file: Path) -> list[dict]:
    """The records of a file as the project reads them."""
    def parse(line: bytes) -> dict:
        record = json.loads(line)
        if "question" in record:
            parse_question(line)
        kinds = {"conversations": "chat", "text": "text"}.keys() & record.keys()
        for key in kinds:
            parse_record(line, {"conversations": "chat"}.get(key, "text"))
        assert kinds or "question" in record
        return record
    return [parse(line) for _, line in read_lines(file)]


@pytest.mark.parametrize("name", CASES)
def test_named_and_converted(name, tmp_path):
    """The line names the file, its commands run in bash as they stand, and the project reads their result."""
    file_name, content, words, records = CASES[name]
    file = write(tmp_path, file_name, content)
    for _ in range(3):  # a packed file is first renamed or unpacked
        line = describe(file)
        if line is None:
            break
        assert "\n" not in line
        for word in words:
            assert word in line
        words = []
        before = {p: p.read_bytes() for p in tmp_path.iterdir()}
        command = line[re.search(r": (python|mv|bunzip2) ", line).start() + 2:]
        if name in RECORDS:  # the same in this process, which takes no time
            main(shlex.split(command)[3:])
        else:
            done = run_bash(command)
            assert done.returncode == 0 and not done.stderr, done.stderr
        file, = set(tmp_path.iterdir()) - before.keys()
        assert all(p.read_bytes() == before[p] for p in before if p.exists()), "nothing that exists is changed"
    assert describe(file) is None
    assert read(file) == records
    assert not words


def test_relative_path_that_begins_with_a_dash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "-x.json", dumps(CHATS))
    write(tmp_path, "行\n二.json", dumps(CHATS))
    for name in ("-x", "行\n二"):
        line = describe(Path(f"{name}.json"))
        assert "\n" not in line
        done = run_bash(line.partition(": ")[2], tmp_path)
        assert done.returncode == 0, done.stderr
        assert read(tmp_path / f"{name}.converted.jsonl") == CHATS


def make_zip(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, lines(*TEXTS))
    return stream.getvalue()


def make_tar(mode: str) -> bytes:
    stream, content = io.BytesIO(), lines(*TEXTS).encode()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def make_sqlite(folder: Path) -> bytes:
    with sqlite3.connect(folder / "db") as db:
        db.execute("create table t (text)")
    db.close()
    return (folder / "db").read_bytes()


TOLD = {  # content → words in the line
    "Parquet": (b"PAR1" + bytes(99), ["Parquet", "pandas", "pyarrow"]),
    "Arrow": (b"ARROW1\0\0" + bytes(99), ["Arrow", "pandas", "pyarrow"]),
    "Arrow stream": (b"\xff\xff\xff\xff\x10\x01\0\0" + bytes(300), ["Arrow", "pandas", "pyarrow"]),
    "Excel": (make_zip("[Content_Types].xml", "xl/workbook.xml"), ["Excel", "pandas", "openpyxl"]),
    "zip": (make_zip("a.jsonl"), ["zip", "unzip -n"]),
    "tar": (make_tar("w"), ["tar"]),
    "tar.gz": (make_tar("w:gz"), ["tar"]),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), ["7z x"]),
    "empty": (b"", ["empty"]),
    "blank": (b"\n \r\n", ["empty"]),
    "HTML": ("\n<!DOCTYPE html><html><head><title>请先\n登录</title>".encode(), ["HTML", "请先 登录", "download"]),
    "XML": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<Error><Code>NoSuchKey</Code></Error>', ["XML", "download"]),
    "Error": (b"<Error><Code>NoSuchKey</Code></Error>", ["XML", "NoSuchKey"]),
    "Wikipedia": (b"<mediawiki xmlns='x'>", ["Wikipedia", "wikiextractor"]),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ["Git LFS", "git lfs pull"]),
    "not found": (b"Entry not found", ["error message", "download"]),
    "detail": (b'{"detail": "Not Found"}', ["error message"]),
}


@pytest.mark.parametrize("name", TOLD)
def test_told_what_it_is(name, tmp_path):
    """Files that hold no records as they stand; a tar archive is unpacked here, and nothing else."""
    content, words = TOLD[name]
    file = write(tmp_path, "a.jsonl.gz" if name == "tar.gz" else "a.jsonl", content)
    line = describe(file)
    assert "\n" not in line
    for word in words:
        assert word in line
    with pytest.raises(UserError, match=re.escape(line)):
        main([str(file), "--out", str(tmp_path / "out.jsonl")])
    assert [*tmp_path.iterdir()] == [file]
    if name.startswith("tar"):
        assert run_bash(line.partition(": ")[2]).returncode == 0
        assert read(tmp_path / "a.unpacked" / "a.jsonl") == TEXTS
    if "pandas" in line:
        words = shlex.split(line.partition(": ")[2])
        compile(words[words.index("-c") + 1], "command", "exec")


def test_sqlite_and_descriptions(tmp_path):
    assert "SQLite" in describe(write(tmp_path, "a.db", make_sqlite(tmp_path)))
    for name in ("README.md", "dataset_infos.json", "a.py"):
        text = "import datasets\nclass A(datasets.GeneratorBasedBuilder):\n    pass\n"
        assert "description of a dataset" in describe(write(tmp_path, name, text))
        assert describe(write(tmp_path, "a.jsonl", lines({"message": "Not Found", "text": text}))) is None


@pytest.mark.parametrize("records", [TEXTS, CHATS, QUESTIONS, [
    {"conversations": [*say("天气？"), TOOL_CALL, TOOL_RESULT, {"role": "assistant", "content": "晴。"}]},
    chat("1+1", "2", thought="一加一"), chat("1+1", "<think>\n一\n</think>\n<answer>\n2\n</answer>"),
    chat("1+1", "<think>\n\n</think>\n\n2")], [TEXTS[0] | {"title": "题", "weight": 2}], OTHER_QUESTIONS])
def test_our_own_forms_are_not_named(records, tmp_path):
    text = lines(*records)
    assert all(shape_of(record) in ("chat", "text", "question") and convert_record(record) is record for record in records)
    for name, content in {"a.jsonl": text, "b.json": "\ufeff" + text, "a.jsonl.gz": gzip.compress(text.encode()),
                          "a.jsonl.xz": lzma.compress(text.encode()), "a.jsonl.zst": zstandard.compress(text.encode()),
                          "bad.jsonl": "{\n" + text * 20 + '{"id": 1}\n' + lines(ALPACA[0]),
                          "long.jsonl": text + lines({"text": "长" * 700_000}) + text}.items():
        assert describe(write(tmp_path, name, content)) is None, name


def test_unknown_records_are_not_guessed(tmp_path):
    assert describe(write(tmp_path, "a.jsonl", lines({"a": 1}, {"b": [2]}))) is None
    line = describe(write(tmp_path, "a.json", dumps([{"label": 1, "score": 0.5}])))
    assert "one array" in line and "'label', 'score'" in line and "python" not in line
    assert describe(tmp_path / "missing") is None and describe(tmp_path) is None


def test_any_bytes(tmp_path):
    rng, starts = random.Random(1), [b"", b"{", b"[", b"PK", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"\xff\xfe", b"[[",
                                     b'[{"', b"{'", b"a,b\n", b'{"messages": [', b'{"mapping": {}}', b'["', b"\0\0\0{"]
    for start in starts:
        for n in (0, 1, 5, 300):
            line = describe(write(tmp_path, "a.jsonl", start + rng.randbytes(n)))
            assert line is None or "\n" not in line
    values = [None, 1, True, "x", [], [1], {}, {"role": 1}, [[]], [None], {"a": []}, [{"role": "user"}], [["x"]]]
    for shape in SHAPES:  # any value under the keys that each shape has
        for key in re.findall('"(\\w+)"', shape.name) * 3:
            record = {name: rng.choice(values) for name in re.findall('"(\\w+)"', shape.name)} | {key: rng.choice(values)}
            try:
                convert_record(record | {"history": rng.choice(values), "title": rng.choice(values)})
            except MalformedRecord:
                pass


@pytest.mark.parametrize("content", [
    '{"text": "' + "水" * 350_000, "[" * 1_000_000, "水" * 350_000, '{"a":' * 200_000, "[" + "{'a': '水'}, " * 80_000,
    "{\n" * 500_000, "a" + "\n" * 999_998 + "b", "a,b\n" + '"' * 999_990, "[" + '{"text": "水"},' * 70_000,
    " " * 1_000_000, "page " * 200_000, "{'" + "\\" * 999_998, '[\n {"a":\n' * 100_000], ids=lambda text: text[:9])
def test_a_megabyte_is_fast(content, tmp_path):
    file = write(tmp_path, "a.jsonl", content)
    begin = time.process_time()
    describe(file)
    assert time.process_time() - begin < 3


def test_a_large_wrapper_is_known_by_its_beginning(tmp_path):
    file = write(tmp_path, "a.json", dumps({"data": ALPACA * 10_000}))
    assert '"data"' in describe(file) and "Alpaca" in describe(file)


def test_the_command_counts_and_refuses(tmp_path):
    """What is left out is counted and named; what exists is kept; nothing is written where nothing can be."""
    bad = [{"instruction": "空", "output": " "}, {"instruction": "半\ud800", "output": "个"}, {"x": 1}, TEXTS[0]]
    file = write(tmp_path, "a.jsonl", lines(*ALPACA) + "{broken\n" + "".join(json.dumps(r) + "\n" for r in bad) + "字\n")
    file.write_bytes(file.read_bytes() + b'{"instruction": "\xff", "output": "x"}\n' + lines({
        "messages": [*say("在？", "在。"), TOOL_CALL]}).encode())
    out = tmp_path / "new" / "out.jsonl"
    done = run_bash(f"python -m text.convert {file} --out {out}")
    assert done.returncode == 0, done.stderr
    assert read(out) == [*ALPACA_CHATS, chat("在？", "在。")]
    for words in ("10 records read, 3 written", "7 left out", "line 3: not JSON", "line 4: no reply", "line 5", "line 6: no known",
                  "line 7: a text record among chat records", "1 conversations end before"):
        assert words in done.stdout
    assert "line 8" not in done.stdout

    kept = out.read_bytes()
    for target in (out, file, tmp_path / "out.json"):
        with pytest.raises(UserError, match="--out"):
            main([str(file), "--out", str(target)])
    assert out.read_bytes() == kept and not (tmp_path / "out.json").exists()
    for content in (lines({"a": 1}), lines({"messages": [TOOL_CALL]}), "\0\1\2", dumps([])):
        file = write(tmp_path, "b.jsonl", content)
        with pytest.raises(UserError, match="b.jsonl"):
            main([str(file), "--out", str(tmp_path / "none.jsonl")])
    done = run_bash(f"python -m text.convert {tmp_path / 'no.json'} --out {tmp_path / 'none.jsonl'}")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    rng = random.Random(1)  # more than one block of each packing
    content = lines(*({"instruction": "抄写", "output": rng.randbytes(100).hex()} for _ in range(4000))).encode()
    for name, pack in {"c.json.gz": gzip.compress, "c.json.xz": lzma.compress, "c.json.zst": zstandard.compress}.items():
        file = write(tmp_path, name, pack(content)[:-20])
        with pytest.raises(UserError, match="cannot be read beyond"):
            main(shlex.split(describe(file).replace(".converted", ".none").partition(": ")[2])[3:])
        assert "damaged" in describe(write(tmp_path, name, pack(b"")[:9] + b"x" * 199))
    assert not [*tmp_path.glob("*none.jsonl"), *tmp_path.glob(".*.tmp")]


def test_questions_of_every_form_are_kept_whole(tmp_path):
    """With a history, or to decline; a question without either and without an answer is left out."""
    records = [*QUESTIONS, *OTHER_QUESTIONS]
    file = write(tmp_path, "a.json", dumps([*records, {"question": " ", "decline": True},
                                            {"question": "几点了？", "decline": False}], indent=1))
    assert "one array" in describe(file)
    main([str(file), "--out", str(tmp_path / "b.jsonl")])
    assert read(tmp_path / "b.jsonl") == records
    assert all(parse_question(line) == record for (_, line), record in zip(
        read_lines(tmp_path / "b.jsonl"), records, strict=True))


def test_notes():
    notes = Counter()
    convert_record(RECORDS["OpenAI with tools"][0], notes)
    convert_record(RECORDS["DPO"][0], notes)
    assert sorted(notes.values()) == [1, 1]


def test_a_packed_file_is_converted_whole(tmp_path):
    """Streams one after another, with zeros between them; a cut one is refused."""
    packed = [lzma.compress(json.dumps({"content": text}).encode() + b"\n") for text in "甲乙"]
    file, out = tmp_path / "a.jsonl.xz", tmp_path / "b.jsonl"
    file.write_bytes(packed[0] + bytes(8) + packed[1][:-9])
    with pytest.raises(UserError, match="cannot be read beyond"):
        main([str(file), "--out", str(out)])
    assert not out.exists()
    file.write_bytes(packed[0] + bytes(8) + packed[1])
    main([str(file), "--out", str(out)])
    assert [parse_record(line, "text")["text"] for _, line in read_lines(out)] == ["甲", "乙"]
