"""make_demo_data.py: the content of its files, and the held-out guarantees, checked by reading the files back."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import make_demo_data as demo
from common.answers import is_well_formed, read_choice, read_reply

CHATS = ("sft_512.jsonl", "sft_1024.jsonl", "r1_1024.jsonl", "val/sft_512.jsonl", "val/sft_1024.jsonl",
         "val/r1_1024.jsonl")
TEXTS = ("pretrain.jsonl", "val/pretrain.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The corpus of a seed that the docs do not use."""
    path = tmp_path_factory.mktemp("demo")
    demo.main(["--out_dir", str(path), "--seed", "20"])
    return path


@pytest.fixture(scope="module")
def files(folder) -> dict[str, list[dict]]:
    """Every record, by file."""
    return {p.relative_to(folder).as_posix(): [json.loads(line) for line in p.open(encoding="utf-8")]
            for p in folder.rglob("*.jsonl")}


def turns(files, names=CHATS) -> list[tuple[str, str]]:
    """All (question, reply) pairs of the chats in the named files."""
    pairs = []
    for name in names:
        for record in files[name]:
            contents = [m["content"] for m in record["conversations"]]
            pairs += zip(contents[::2], contents[1::2], strict=True)
    return pairs


# ---------------------------------------------------------------------------------------------
# parse sums and problems from text, independently of the generator

WORDS_OF = {"+": ("加", "又买了", "又收到", "朋友送来", "又找到", "邻居给了", "又添了"),
            "-": ("减", "用掉", "送出", "丢了", "卖掉", "借走", "坏了"),
            "*": ("乘", "数量变成", "后来增加到"), "/": ("除以", "平均分成", "分成")}
OPERATION_OF = {word: operation for operation, found in WORDS_OF.items() for word in found}
STARTING = re.compile(r"(?:有|原来有|手里有)(\d+)")
CHANGING = re.compile(r"[，]?(" + "|".join(sorted(OPERATION_OF, key=len, reverse=True)) + r")(\d+)")
BARE_SUM = re.compile(r"(\d+)(加|减|乘|除以)(\d+)等于")


def compute(a: int, operation: str, b: int) -> int:
    """a operation b. Asserts that a quotient is an integer."""
    if operation == "/":
        assert a % b == 0
        return a // b
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


def chains_in(text: str) -> list[tuple]:
    """Every (start, (operation, number), ...) in a text, including bare sums."""
    chains = [(int(a), (OPERATION_OF[word], int(b))) for a, word, b in BARE_SUM.findall(text)]
    begins = list(STARTING.finditer(text))
    for i, begin in enumerate(begins):
        part = text[begin.end():begins[i + 1].start() if i + 1 < len(begins) else len(text)]
        steps = [(OPERATION_OF[word], int(b)) for word, b in CHANGING.findall(part.split("。")[0].split("：")[0])]
        if steps:
            chains.append((int(begin.group(1)), *steps))
    return chains


def triples_of(chain: tuple) -> list[tuple[int, str, int]]:
    """(number before, operation, number) of each step of a chain."""
    value, *steps = chain
    triples = []
    for operation, b in steps:
        triples.append((value, operation, b))
        value = compute(value, operation, b)
    return triples


def spelled(chain: tuple) -> str:
    return str(chain[0]) + "".join(f"{operation}{b}" for operation, b in chain[1:])


@pytest.fixture(scope="module")
def trained_chains(files) -> list[tuple]:
    """Every chain in the training and validation files: in texts, questions, thoughts and replies."""
    texts = [r["text"] for name in TEXTS for r in files[name]]
    texts += [part for pair in turns(files) for part in pair]
    return [chain for text in texts for chain in chains_in(text)]


# ---------------------------------------------------------------------------------------------
# content


def test_the_corpus_has_the_documented_size(files, trained_chains):
    """At least 300 facts, 20,000 multi-step problems and 40 sentence templates; also long chats and small talk."""
    facts = {(q["entity"], q["relation"]) for q in files["eval/facts.jsonl"]}
    assert len(facts) == len(files["eval/facts.jsonl"]) >= 300
    assert len({spelled(chain) for chain in trained_chains if len(chain) > 2}) >= 20_000
    frames = [told for relation in demo.OF_PEOPLE + demo.OF_PLACES for told in relation.told]
    assert len(set(frames)) == len(frames) >= 40
    counts = Counter(q["source"].split("/")[0] for name, rows in files.items() if name.startswith("eval") for q in rows)
    assert min(counts[kind] for kind in ("one_step", "multi_step")) >= 200
    sources = Counter(q["source"] for q in files["eval/facts.jsonl"])
    assert sources["facts/asked"] >= 200 and sources["facts/never_asked"] >= 200
    assert {q["source"] for q in files["eval/multi_step.jsonl"]} == {f"multi_step/{n}" for n in range(2, 9)}
    assert any(question == "你是谁？" for question, _ in turns(files))
    assert any("程序编出来" in reply for _, reply in turns(files))
    assert any("程序编出来" in r["text"] for r in files["pretrain.jsonl"])
    assert min(len(r["conversations"]) for r in files["sft_1024.jsonl"]) > 10


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    """Another seed gives another world."""
    def digest(path):
        return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).digest() for p in path.rglob("*.jsonl")}

    demo.main(["--out_dir", str(tmp_path / "again"), "--seed", "20"])
    demo.main(["--out_dir", str(tmp_path / "other"), "--seed", "21"])
    assert digest(tmp_path / "again") == digest(folder)
    assert all(digest(tmp_path / "other")[name] != value for name, value in digest(folder).items())


def test_questions_have_one_correct_answer(files):
    """The answer is one of the choices. No choice occurs in the question or in another choice."""
    for question in files["eval/facts.jsonl"]:
        choices = question["choices"]
        assert len(set(choices)) == len(choices) and question["answer"] in choices
        assert not [c for c in choices if c in question["question"]]
        assert not [c for c in choices for other in choices if c != other and c in other]
    for question in files["eval/one_step.jsonl"] + files["eval/multi_step.jsonl"]:
        [chain] = chains_in(question["question"])
        value = chain[0]
        for operation, b in chain[1:]:
            value = compute(value, operation, b)
            assert 0 <= value <= 99
        assert str(value) == question["answer"] and spelled(chain) == question["numbers"]


def test_every_reply_is_correct(files):
    """Answers to facts, sums and problems are recomputed, and so is every line of every thought."""
    checked = Counter()
    relations = {relation.name: relation for relation in demo.OF_PEOPLE + demo.OF_PLACES}
    values = {frame.format(e=q["entity"]): q["answer"] for q in files["eval/facts.jsonl"]
              for frame in relations[q["relation"]].asked}
    for question, reply in turns(files):
        if question in values:
            assert values[question] in reply, (question, reply)
            checked["facts"] += 1
        chains = chains_in(question)
        if not chains:
            continue
        [chain] = chains
        value, lines = chain[0], []
        for (operation, b), clause in zip(chain[1:], question.split("，")[1:-1] or [None], strict=True):
            result = compute(value, operation, b)
            lines.append((f"{clause}：" if clause else "") + f"{value}{operation}{b}={result}。")
            value = result
        assert read_reply(reply, is_number=True) == value, (question, reply)
        checked["replies"] += 1
        if "<think>" in reply:
            assert is_well_formed(reply)
            thought = re.search(r"<think>\n(.*)\n</think>\n<answer>", reply, re.DOTALL).group(1).split("\n")
            assert thought[-len(lines):] == lines or [line.split("：")[-1] for line in lines] == thought
            checked["thoughts"] += 1
    assert checked["replies"] > 30_000 and checked["thoughts"] > 20_000 and checked["facts"] > 5_000


# ---------------------------------------------------------------------------------------------
# what is held out


def test_every_fact_is_in_the_pretraining_text(files):
    """In at least three sentences of the templates, and never with another value."""
    text = "".join(r["text"] for r in files["pretrain.jsonl"])
    sentences = set(re.findall(r"[^。]*。", text))
    relations = {relation.name: relation for relation in demo.OF_PEOPLE + demo.OF_PLACES}
    for question in files["eval/facts.jsonl"]:
        relation = relations[question["relation"]]
        told = {v: sum(frame.format(e=question["entity"], v=v) in sentences for frame in relation.told)
                for v in relation.values}
        assert told[question["answer"]] >= 3, question
        assert not [v for v, times in told.items() if times and v != question["answer"]], question


def test_chats_ask_facts_in_other_words_than_eval(files):
    everywhere = {question for question, _ in turns(files)}
    asked = {question for question, _ in turns(files, ("sft_512.jsonl", "sft_1024.jsonl"))}
    for question in files["eval/facts.jsonl"]:
        assert question["question"] not in everywhere
        if question["source"] == "facts/asked":
            relation = next(r for r in demo.OF_PEOPLE + demo.OF_PLACES if r.name == question["relation"])
            others = [frame.format(e=question["entity"]) for frame in relation.asked]
            assert any(other in asked for other in others), question


def test_facts_never_asked_are_in_no_chat(files):
    """No turn contains a question about the fact, entity and value, or entity and relation."""
    pairs = [question + reply for question, reply in turns(files)]
    relations = {relation.name: relation for relation in demo.OF_PEOPLE + demo.OF_PLACES}
    by_entity = {}
    for question in files["eval/facts.jsonl"]:
        if question["source"] == "facts/never_asked":
            by_entity.setdefault(question["entity"], []).append(question)
    for entity, questions in by_entity.items():
        mentions = [pair for pair in pairs if entity in pair]
        for question in questions:
            frames = [frame.format(e=entity) for frame in relations[question["relation"]].asked]
            forbidden = [*frames, question["answer"], f"{entity}的{question['relation']}"]
            assert not [pair for pair in mentions for words in forbidden if words in pair]


def test_one_step_questions_are_in_no_training_file(files, trained_chains):
    """Neither as a sum in words or symbols, nor as a story, nor as a step of a longer problem or of a thought."""
    held_out = {question["numbers"] for question in files["eval/one_step.jsonl"]}
    assert len(held_out) == len(files["eval/one_step.jsonl"])
    trained = {f"{a}{operation}{b}" for chain in trained_chains for a, operation, b in triples_of(chain)}
    texts = [r["text"] for name in TEXTS for r in files[name]]
    signs = [{found for text in part for found in re.findall(r"(\d+[-+*/]\d+)=", text)}
             for part in (texts, [reply for _, reply in turns(files)])]
    assert min(map(len, (trained, *signs))) > 1000
    assert not held_out & trained.union(*signs)


def test_multi_step_questions_are_in_no_training_file(files, trained_chains):
    """Start and steps, in any wording; also not as part of a longer problem."""
    held_out = {question["numbers"] for question in files["eval/multi_step.jsonl"]}
    assert len(held_out) == len(files["eval/multi_step.jsonl"])
    parts = set()
    for chain in trained_chains:
        values, steps = [a for a, _, _ in triples_of(chain)], chain[1:]
        parts |= {spelled((values[i], *steps[i:j])) for i in range(len(steps)) for j in range(i + 2, len(steps) + 1)}
    assert {spelled(chain) for chain in trained_chains if len(chain) > 2} <= parts
    assert not held_out & parts


def test_validation_is_not_trained_on(files):
    for name in ("pretrain.jsonl", "sft_512.jsonl", "r1_1024.jsonl"):
        trained = {json.dumps(r, ensure_ascii=False) for r in files[name]}
        own = [r for r in files[f"val/{name}"] if json.dumps(r, ensure_ascii=False) not in trained]
        assert len(own) >= 0.5 * len(files[f"val/{name}"])  # greetings repeat; load_splits removes duplicates


# ---------------------------------------------------------------------------------------------
# the command


def test_a_share_of_the_training_files(files, tmp_path, capsys):
    """Training files shrink, the number of questions does not. Invalid shares are rejected."""
    demo.main(["--out_dir", str(tmp_path), "--seed", "20", "--share", "0.1"])
    lines = {p.relative_to(tmp_path).as_posix(): p.read_bytes().count(b"\n") for p in tmp_path.rglob("*.jsonl")}
    assert lines.keys() == files.keys()
    for name, number in lines.items():
        whole = len(files[name])
        assert 0.05 * whole < number < 0.2 * whole if "/" not in name else 0.7 * whole < number < 1.4 * whole, name
    for wrong in ("0", "1.5"):
        with pytest.raises(demo.UserError, match="--share"):
            demo.main(["--out_dir", str(tmp_path), "--share", wrong])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(demo.UserError, match="cannot be written"):
        demo.main(["--out_dir", str(tmp_path / "file" / "folder")])


def test_a_choice_is_read_from_a_reply():
    choices = ["黑猫", "白猫"]
    assert read_choice("林小雨的宠物是黑猫。", choices) == "黑猫"
    assert read_choice("<think>白猫？</think><answer>黑猫</answer>", choices) == "黑猫"
    assert read_choice("黑猫和白猫", choices) is None and read_choice("不知道", choices) is None
