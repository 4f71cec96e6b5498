"""make_demo_data.py: the content of its files, and the held-out guarantees, checked by reading the files back."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import make_demo_data
from common.answers import declines, is_well_formed, read_choice, read_reply
from demo.facts import RELATIONS
from demo.problems import LONG_SUMS, TRIPLES
from demo.words import THINGS_HELD_OUT

CHATS = ("sft_512.jsonl", "sft_1024.jsonl", "r1_1024.jsonl", "val/sft_512.jsonl", "val/sft_1024.jsonl",
         "val/r1_1024.jsonl")
TEXTS = ("pretrain.jsonl", "rehearsal.jsonl", "val/pretrain.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The corpus of a seed that the docs do not use."""
    path = tmp_path_factory.mktemp("demo")
    make_demo_data.main(["--out_dir", str(path), "--seed", "20"])
    return path


@pytest.fixture(scope="module")
def files(folder) -> dict[str, list[dict]]:
    """Every record, by file."""
    return {p.relative_to(folder).as_posix(): [json.loads(line) for line in p.open(encoding="utf-8")]
            for p in folder.rglob("*.jsonl")}


def chats(files, names=CHATS) -> list[list[tuple[str, str]]]:
    """The (question, reply) pairs of each chat in the named files."""
    contents = [[m["content"] for m in record["conversations"]] for name in names for record in files[name]]
    return [list(zip(c[::2], c[1::2], strict=True)) for c in contents]


def turns(files, names=CHATS) -> list[tuple[str, str]]:
    """All (question, reply) pairs of the chats in the named files."""
    return [pair for chat in chats(files, names) for pair in chat]


# ---------------------------------------------------------------------------------------------
# read sums and problems from the files, by their numbers alone

SPELLED = re.compile(r"(?<!\d)(\d+)([-+*/])(\d+)=(\d+)(?!\d)")
BOTH_NUMBERS = re.compile(r"(?<!\d)(\d+)([-+])(\d+)：")  # before the two steps of 25+38
NUMBER = re.compile(r"\d+")
RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
          "/": lambda a, b: a // b if b and a % b == 0 else None}
Triple = tuple[int, str, int]


def numbers_in(text: str) -> list[int]:
    """All numbers of a text, in order."""
    return list(map(int, NUMBER.findall(text)))


def solutions(numbers: list[int], result: int) -> set[Triple]:
    """Every (a, operation, b) of two numbers, in either order, that gives `result`."""
    a, b = numbers
    return {(x, operation, y) for x, y in ((a, b), (b, a)) for operation in RESULT if RESULT[operation](x, y) == result}


def spelled_sums(text: str) -> list[Triple]:
    """Every sum that is spelled in symbols with its result. Asserts that the result is right."""
    sums = []
    for a, operation, b, c in SPELLED.findall(text):
        assert RESULT[operation](int(a), int(b)) == int(c), text
        sums.append((int(a), operation, int(b)))
    return sums


def chains_of(sums: list[Triple]) -> list[tuple[Triple, ...]]:
    """The sums in runs in which each begins with the result of the one before."""
    chains: list[list[Triple]] = []
    for triple in sums:
        if chains and RESULT[chains[-1][-1][1]](chains[-1][-1][0], chains[-1][-1][2]) == triple[0]:
            chains[-1].append(triple)
        else:
            chains.append([triple])
    return [tuple(chain) for chain in chains]


def triples_of(numbers: str) -> list[Triple]:
    """The steps of the "numbers" of a question: 23+5*2 is (23, +, 5), (28, *, 2)."""
    value, *steps = re.findall(r"\d+|[-+*/]", numbers)
    triples = []
    for operation, b in zip(steps[::2], steps[1::2], strict=True):
        triples.append((int(value), operation, int(b)))
        value = RESULT[operation](int(value), int(b))
    return triples


@pytest.fixture(scope="module")
def spoken(files) -> Counter:
    """Every sum that can be read from two numbers and a result in words: of a text's lines, and of question and reply
    (the number of the reply before, where a question has one alone)."""
    found = Counter()
    for name in TEXTS:
        for record in files[name]:
            for line in record["text"].split("\n"):
                numbers = numbers_in(line)
                if len(numbers) == 3 and not SPELLED.search(line):
                    found.update(solutions(numbers[:2], numbers[2]))
    for name in CHATS:
        for record in files[name]:
            before = []
            contents = [m["content"] for m in record["conversations"]]
            for question, reply in zip(contents[::2], contents[1::2], strict=True):
                numbers, results = numbers_in(question), numbers_in(reply.split("<answer>")[-1])[-1:]
                if len(results) == 1 and len(numbers) in (1, 2) and "<think>" not in reply:
                    asked = numbers if len(numbers) == 2 else before + numbers
                    assert len(asked) == 2 and solutions(asked, results[0]), (question, reply)
                    found.update(solutions(asked, results[0]))
                before = results
    return found


@pytest.fixture(scope="module")
def spelled(files) -> list[tuple[Triple, ...]]:
    """Every chain of sums in symbols in the training and validation files."""
    texts = [r["text"] for name in TEXTS for r in files[name]] + [reply for _, reply in turns(files)]
    return [chain for text in texts for chain in chains_of(spelled_sums(text))]


@pytest.fixture(scope="module")
def everything(files) -> str:
    """All text of the training and validation files."""
    texts = [r["text"] for name in TEXTS for r in files[name]]
    return "\n".join(texts + [text for pair in turns(files) for text in pair])


# ---------------------------------------------------------------------------------------------
# content


def test_the_corpus_has_the_documented_size(files, spelled):
    """Facts, problems, people by the thousand; also long chats and small talk."""
    facts = {(q["entity"], q["relation"]) for q in files["eval/facts.jsonl"]}
    assert len(facts) == len(files["eval/facts.jsonl"]) >= 300
    assert len({chain for chain in spelled if len(chain) > 1}) >= 10_000
    frames = [told for relation in RELATIONS for told in relation.told]
    assert len(set(frames)) == len(frames) >= 40
    sources = Counter(q["source"] for name, rows in files.items() if name.startswith("eval") for q in rows)
    assert sources["one_step"] >= 200 and sources["one_step/two_digits"] == 100
    assert sources["facts/asked"] >= 200 and sources["facts/never_asked"] >= 200
    assert all(sources[f"multi_step/{n}"] == 40 for n in range(2, 9))
    assert all(sources[f"elsewhere/{part}"] == 100 for part in "abcde")
    assert sum(n for source, n in sources.items() if source.startswith("follow_up/")) == 200
    assert sources["unknown/people"] == sources["unknown/topics"] == 100
    for part in "abcde":
        steps = Counter(len(triples_of(q["numbers"])) for q in files["eval/elsewhere.jsonl"]
                        if q["source"] == f"elsewhere/{part}")
        assert steps == dict.fromkeys(range(1, 6), 20)
    owners = {question.split("有")[0] for question, _ in turns(files) if "有" in question[:6]}
    assert len(owners) > 3000
    assert any(question == "你是谁？" for question, _ in turns(files))
    assert any("程序编出来" in reply for _, reply in turns(files))
    assert any("程序编出来" in r["text"] for r in files["pretrain.jsonl"])
    assert min(len(r["conversations"]) for r in files["sft_1024.jsonl"]) > 10


def test_the_portraits_are_a_part_of_the_text(files):
    texts = {r["text"] for r in files["pretrain.jsonl"]}
    assert len(files["rehearsal.jsonl"]) > 1000 and all(r["text"] in texts for r in files["rehearsal.jsonl"])


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Another seed gives another world."""
    def digest(path):
        return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).digest() for p in path.rglob("*.jsonl")}

    for name, seed in (("one", 20), ("again", 20), ("other", 21)):
        make_demo_data.main(["--out_dir", str(tmp_path / name), "--seed", str(seed), "--share", "0.05"])
    assert digest(tmp_path / "again") == digest(tmp_path / "one")
    assert all(digest(tmp_path / "other")[name] != value for name, value in digest(tmp_path / "one").items())


def test_questions_have_one_correct_answer(files):
    """The answer is one of the choices, and no choice occurs in another or in the question. Numbers are recomputed."""
    for name in ("facts", "follow_up"):
        for question in files[f"eval/{name}.jsonl"]:
            if choices := question.get("choices"):
                assert len(set(choices)) == len(choices) and question["answer"] in choices
                assert not [c for c in choices if c in question["question"]]
                assert not [c for c in choices for other in choices if c != other and c in other]
    for name in ("one_step", "multi_step", "elsewhere"):
        for question in files[f"eval/{name}.jsonl"]:
            triples = triples_of(question["numbers"])
            assert all(0 <= RESULT[operation](a, b) <= 100 for a, operation, b in triples)
            a, operation, b = triples[-1]
            assert str(RESULT[operation](a, b)) == question["answer"]
            asked = sorted(numbers_in(question["question"]))
            assert asked == sorted([triples[0][0], *(b for _, _, b in triples)]), question


def test_every_reply_is_correct(files, spoken, spelled):
    """Facts, and every line of every thought; the fixtures recompute all sums."""
    assert sum(spoken.values()) > 15_000 and len(spelled) > 20_000
    checked = Counter()
    values = {frame.format(e=q["entity"]).rstrip("？"): q["answer"] for q in files["eval/facts.jsonl"]
              for relation in RELATIONS if relation.name == q["relation"] for frame in relation.asked}
    for question, reply in turns(files):
        if question.rstrip("？?") in values:
            assert values[question.rstrip("？?")] in reply, (question, reply)
            checked["facts"] += 1
        if "<think>" not in reply:
            continue
        assert is_well_formed(reply)
        thought = re.search(r"<think>\n(.*)\n</think>\n<answer>", reply, re.DOTALL).group(1)
        sums = spelled_sums(thought)
        if not sums:
            continue
        [chain] = chains_of(sums)
        a, operation, b = chain[-1]
        assert read_reply(reply, is_number=True) == RESULT[operation](a, b), (question, reply)
        if "\n" in thought and "：" in thought:  # a story: each line but the last restates the number of its clause
            restated = [numbers_in(line)[0] for line in thought.split("\n")[:-1]]
            asked = numbers_in(question)
            if thought.startswith("刚才是"):
                restated = restated[1:]
            assert sorted(restated) == sorted(asked), (question, reply)
        checked["thoughts"] += 1
    assert checked["thoughts"] > 9_000 and checked["facts"] > 5_000


def test_numbers_stay_within_what_is_taught(files, spelled):
    """Up to 100; 4 to 9 are a factor or divisor only within the multiplication table, and all of it is taught."""
    used = {triple for chain in spelled for triple in chain}
    for a, operation, b in used | {t for name in ("one_step", "multi_step", "elsewhere") for q in files[
            f"eval/{name}.jsonl"] for t in triples_of(q["numbers"])}:
        assert max(a, RESULT[operation](a, b)) <= 100
        assert operation in "+-" or b in (2, 3) or 4 <= b <= 9 and (a if operation == "*" else a // b) <= 9
    assert {(a, "*", b) for a in range(1, 10) for b in range(2, 10)} <= used
    assert any(a == 100 for a, _, _ in used) and any(RESULT[operation](a, b) == 100 for a, operation, b in used)


def test_larger_numbers_are_declined(files, everything):
    """Every question with a number above 100, and none without. No training file has those of eval/unknown.jsonl."""
    larger = Counter()
    for question, reply in turns(files):
        assert max(numbers_in(reply), default=0) <= 100
        is_larger = max(numbers_in(question), default=0) > 100
        assert is_larger == any(words in reply for words in ("数太大", "这么大的数")), (question, reply)
        assert not is_larger or declines(reply) and not numbers_in(reply), (question, reply)
        larger[is_larger] += 1
    assert larger[True] > 150
    held_out = [[n for n in numbers_in(q["question"]) if n > 100] for q in files["eval/unknown.jsonl"]]
    held_out = [numbers for numbers in held_out if numbers]
    assert len(held_out) == 10 and not set(sum(held_out, [])) & set(numbers_in(everything))


def test_what_is_not_known_is_declined(files):
    """Every question of the world's form about somebody who is not in it, and none about somebody who is."""
    entities = {q["entity"] for q in files["eval/facts.jsonl"]}
    forms = [re.compile(frame.rstrip("？").replace("{e}", "(.+)"))
             for relation in RELATIONS for frame in relation.asked]
    declined = Counter()
    for question, reply in turns(files):
        names = {match.group(1) for form in forms if (match := form.fullmatch(question.rstrip("？?")))}
        if names and not [name for name in names if re.fullmatch("那?[他她它]|那里|这个人", name)]:
            assert declines(reply) == (not names & entities), (question, reply)
            declined[declines(reply)] += 1
    assert declined[True] > 2000 and declined[False] > 5000
    known = {person[:1] for person in entities}
    assert any(q["names"][0][0] in known for q in files["eval/unknown.jsonl"] if "names" in q)


# ---------------------------------------------------------------------------------------------
# what is held out


def test_every_fact_is_in_the_pretraining_text(files):
    """In at least three sentences of the templates, and never with another value."""
    text = "".join(r["text"] for r in files["pretrain.jsonl"])
    sentences = set(re.findall(r"[^。]*。", text.replace("\n", "")))
    relations = {relation.name: relation for relation in RELATIONS}
    for question in files["eval/facts.jsonl"]:
        relation = relations[question["relation"]]
        told = {v: sum(frame.format(e=question["entity"], v=v) in sentences for frame in relation.told)
                for v in relation.values}
        assert told[question["answer"]] >= 3, question
        assert not [v for v, times in told.items() if times and v != question["answer"]], question


def test_chats_ask_facts_in_other_words_than_eval(files):
    everywhere = {question for question, _ in turns(files)}
    asked = {question.rstrip("？?") for question, _ in turns(files, ("sft_512.jsonl", "sft_1024.jsonl"))}
    for question in files["eval/facts.jsonl"]:
        assert question["question"] not in everywhere and question["question"].rstrip("？") not in everywhere
        if question["source"] == "facts/asked":
            relation = next(r for r in RELATIONS if r.name == question["relation"])
            others = [frame.format(e=question["entity"]).rstrip("？") for frame in relation.asked]
            assert any(other in asked for other in others), question


def test_facts_never_asked_are_in_no_chat(files):
    """No turn contains a question about the fact, entity and value, or entity and relation."""
    pairs = [question + reply for question, reply in turns(files)]
    relations = {relation.name: relation for relation in RELATIONS}
    by_entity = {}
    for question in files["eval/facts.jsonl"]:
        if question["source"] == "facts/never_asked":
            by_entity.setdefault(question["entity"], []).append(question)
    for entity, questions in by_entity.items():
        mentions = [pair for pair in pairs if entity in pair]
        for question in questions:
            frames = [frame.format(e=entity).rstrip("？") for frame in relations[question["relation"]].asked]
            forbidden = [*frames, question["answer"], f"{entity}的{question['relation']}"]
            assert not [pair for pair in mentions for words in forbidden if words in pair]


def test_one_step_questions_are_in_no_training_file(files, spoken, spelled, everything):
    """Neither as a sum in words or symbols, nor as a story, nor as a step of a longer problem or of a thought."""
    trained = set(spoken) | {triple for chain in spelled for triple in chain}
    trained |= {(int(a), operation, int(b)) for a, operation, b in BOTH_NUMBERS.findall(everything)}
    assert len(trained & set(TRIPLES)) > 1500 and len(trained & set(LONG_SUMS)) > 1000
    for name in ("one_step", "elsewhere"):
        held_out = [triples_of(q["numbers"]) for q in files[f"eval/{name}.jsonl"]]
        assert not trained & {triples[0] for triples in held_out if len(triples) == 1}
    assert len({q["numbers"] for q in files["eval/one_step.jsonl"]}) == len(files["eval/one_step.jsonl"])


def test_longer_questions_are_in_no_training_file(files, spelled):
    """Start and steps, in any wording; also not as part of a longer problem, or as a problem that goes on in the next
    question."""
    parts = {chain[i:j] for chain in spelled for i in range(len(chain)) for j in range(i + 2, len(chain) + 1)}
    questions = files["eval/multi_step.jsonl"] + files["eval/elsewhere.jsonl"]
    questions = [tuple(triples_of(question["numbers"])) for question in questions]
    questions = [triples for triples in questions if len(triples) > 1]
    assert len(set(questions)) == len(questions) == 680 and len(parts) > 10_000
    assert not parts & set(questions)
    two_turns = set()
    for chat in chats(files):
        for (question, reply), (again, last) in zip(chat, chat[1:], strict=False):
            numbers, results, sums = numbers_in(question), numbers_in(reply)[-1:], spelled_sums(last)
            if len(numbers) == 2 and len(numbers_in(again)) == len(results) == 1 and sums:
                firsts = spelled_sums(reply) or solutions(numbers, results[0])
                two_turns |= {(first, sums[0]) for first in firsts if len(firsts) == 1}  # 2 and 2 give 4 in two ways
    assert len(two_turns) > 2000 and not two_turns & set(questions)


def test_elsewhere_is_in_no_training_file(files, everything):
    """Names, things and measure words (a, d); clauses (b, d) and questions (c, d) up to their names and numbers; verbs
    (e). What a part does not hold out is in the training files."""
    masked = re.sub(r"\d+", "#", everything)
    clauses = "\n".join(set(re.findall("[^#，,。\n]*#", masked)))
    counted = set(re.findall("(?:[#几]|多少)(.)", masked))
    asked = {line for line in re.findall("[^，,。\n]*", everything) if "几" in line or "多少" in line}
    joined = "\n".join(asked)
    things = {thing for thing, _ in THINGS_HELD_OUT}
    for question in files["eval/elsewhere.jsonl"]:
        part, names = question["source"][-1], question["names"]
        assert names[0] in question["question"] and question["unit"] in question["question"]
        if part in "ad":
            assert not [name for name in names if name in everything]
            assert question["thing"] in things and question["thing"] not in everything
            assert question["unit"] not in counted
        else:
            assert question["thing"] in everything and question["unit"] in counted
        if part in "bd":
            for clause in question["clauses"]:
                assert clause in question["question"] and not [name for name in names if name in clause]
                assert clause + "#" not in clauses, clause
        if part in "cd":
            pattern = question["asking"].format(p="[他她我]", u="[一-鿿]")
            assert re.search(pattern, question["question"])
            assert not re.search(pattern, joined), question["asking"]
        if part == "e":
            verbs = make_demo_data.GAIN_HELD_OUT + make_demo_data.LOSE_HELD_OUT
            for clause in question["clauses"]:
                assert [verb for verb in verbs if verb in clause and verb not in everything]


def test_every_character_of_elsewhere_is_in_the_pretraining_text(files):
    """At least 20 times."""
    counts = Counter("".join(r["text"] for r in files["pretrain.jsonl"]))
    assert not {c: counts[c] for q in files["eval/elsewhere.jsonl"] for c in q["question"] if counts[c] < 20}


def test_unknown_people_and_topics_are_in_no_training_file(files, everything):
    for question in files["eval/unknown.jsonl"]:
        assert question["decline"] is True and "answer" not in question
        assert question["question"].rstrip("？?") not in everything
        assert not [choice for choice in question["choices"] if choice in question["question"]]
        if question["source"] == "unknown/people":
            [name] = question["names"]
            assert name in question["question"] and name not in everything
        elif not numbers_in(question["question"]):
            assert question["topic"] in question["question"] and question["topic"] not in everything


def test_follow_ups_need_what_was_said_before(files):
    """The history ends with a reply. The question names the person or the relation, not both, or one number. In no
    training file it is asked behind the same question."""
    asked = {(one[0].rstrip("？?"), again[0].rstrip("？?")) for chat in chats(files)
             for one, again in zip(chat, chat[1:], strict=False)}
    assert len(asked) > 10_000
    for question in files["eval/follow_up.jsonl"]:
        history = question["history"]
        assert [m["role"] for m in history] == ["user", "assistant"] and "<think>" not in history[1]["content"]
        assert (history[0]["content"].rstrip("？?"), question["question"].rstrip("？?")) not in asked
        if "choices" in question:
            assert not [c for c in question["choices"] if c in question["question"]]
        else:
            before, [b] = numbers_in(history[1]["content"])[-1], numbers_in(question["question"])
            assert any(RESULT[operation](before, b) == int(question["answer"]) for operation in "+-")


def test_validation_is_not_trained_on(files):
    for name in ("pretrain.jsonl", "sft_512.jsonl", "r1_1024.jsonl"):
        trained = {json.dumps(r, ensure_ascii=False) for r in files[name]}
        own = [r for r in files[f"val/{name}"] if json.dumps(r, ensure_ascii=False) not in trained]
        assert len(own) >= 0.5 * len(files[f"val/{name}"])  # greetings repeat; load_splits removes duplicates


# ---------------------------------------------------------------------------------------------
# the command


def test_a_share_of_the_training_files(files, tmp_path, capsys):
    """Training files shrink, the number of questions does not. Invalid shares are rejected."""
    make_demo_data.main(["--out_dir", str(tmp_path), "--seed", "20", "--share", "0.1"])
    lines = {p.relative_to(tmp_path).as_posix(): p.read_bytes().count(b"\n") for p in tmp_path.rglob("*.jsonl")}
    assert lines.keys() == files.keys()
    for name, number in lines.items():
        whole = len(files[name])
        assert 0.05 * whole < number < 0.2 * whole if "/" not in name else 0.7 * whole < number < 1.4 * whole, name
    for wrong in ("0", "1.5"):
        with pytest.raises(make_demo_data.UserError, match="--share"):
            make_demo_data.main(["--out_dir", str(tmp_path), "--share", wrong])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(make_demo_data.UserError, match="cannot be written"):
        make_demo_data.main(["--out_dir", str(tmp_path / "file" / "folder")])


def test_a_choice_is_read_from_a_reply():
    choices = ["黑猫", "白猫"]
    assert read_choice("林小雨的宠物是黑猫。", choices) == "黑猫"
    assert read_choice("<think>白猫？</think><answer>黑猫</answer>", choices) == "黑猫"
    assert read_choice("黑猫和白猫", choices) is None and read_choice("不知道", choices) is None
