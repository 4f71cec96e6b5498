"""evaluate.py: reading answers, reading question files, and one run of each type of score."""

import json
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from conftest import make_chats, make_texts, write_jsonl
from torch.nn.functional import cross_entropy

import evaluate
from common.answers import is_well_formed, read_answer, read_reply, wilson
from common.generation import Generation, generate
from common.weights import load_model, save_weights
from Config import LLMConfig, UserError
from model import WeakWater
from text.chat import ChatEncoder, encode_chat
from text.records import MalformedRecord
from text.sources import kind_of
from text.tokenizer import TextEncoder

# ---- reading answers ------------------------------------------------------------------------


@pytest.mark.parametrize("written, value", [
    ("20", 20), ("-3", -3), ("−3", -3), ("39.76", Fraction(3976, 100)), (".5", Fraction(1, 2)), ("007", 7),
    ("3/4", Fraction(3, 4)), ("3 / 4", Fraction(3, 4)), ("((3)/(4))", Fraction(3, 4)), ("(3/4)", Fraction(3, 4)),
    ("0.75", Fraction(3, 4)), ("75%", Fraction(3, 4)), ("７５％", Fraction(3, 4)), (r"75\%", Fraction(3, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)), (r"$\dfrac{3}{4}$", Fraction(3, 4)), (r"-\frac{3}{4}", Fraction(-3, 4)),
    ("4分之3", Fraction(3, 4)), ("百分之75", Fraction(3, 4)), ("¾", Fraction(3, 4)),
    ("1 1/2", Fraction(3, 2)), ("1(1/2)", Fraction(3, 2)), ("1((1)/(2))", Fraction(3, 2)), ("1½", Fraction(3, 2)),
    (r"1\frac{1}{2}", Fraction(3, 2)), ("1又1/2", Fraction(3, 2)), ("1又2分之1", Fraction(3, 2)),
    ("1,000", 1000), ("12,345,678.5", Fraction(123456785, 10)), ("20。", 20),
    ("B", "B"), (" 小 明。", "小明"), ("2:3", "2:3"), ("9/0", "9/0"), ("1" * 5000, "1" * 5000),
])
def test_reference_answers_are_read(written, value):
    assert read_answer(written) == value


@pytest.mark.parametrize("reply, value", [
    ("<think>\n3+4=7\n</think>\n<answer>\n3 + 4 = 7\n答案：7\n</answer>", 7),
    ("<think>\n99\n</think>\n<answer>\n7\n</answer>", 7),
    ("<think>99</think>一共7个", 7),
    ("<think>一直想，7", None),  # the reply ends before the answer
    ("<answer>8</answer> 不对 <answer>7", 7),
    ("答案：8，不对。答案是7个，因为3+4", 7),
    ("答案是：7\n检查：8", 7),
    ("正确答案为 7 元", 7),
    ("答案：x=7", 7),
    ("先算3+4，再算，得7。", 7),
    ("15-7", 7),
    ("x = -7", -7),
    ("面积是7平方厘米，即7cm², 7 m^2, 7㎡", 7),
    ("占7/100", Fraction(7, 100)),
    ("大约是总数的 7 %", Fraction(7, 100)),
    ("没有数", None),
    ("", None),
    ("9/0", None),
    ("9" * 5000, None),
])
def test_numbers_are_read_from_replies(reply, value):
    assert read_reply(reply, is_number=True) == value


@pytest.mark.parametrize("reply, said", [
    ("<think>A？</think><answer>答案：B。</answer>", "B"), ("Ｂ", "B"), ("选 B", "选B"), ("2:3", "2:3"), ("", ""),
])
def test_other_answers_are_compared_as_text(reply, said):
    assert read_reply(reply, is_number=False) == said


@pytest.mark.parametrize("reply, expected", [
    ("<think>a</think><answer>b</answer>", True),
    ("\n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", True),
    ("<think></think><answer>b</answer>", True),
    ("<think>a</think><answer> \n</answer>", False),
    ("<think>a</think>so<answer>b</answer>", False),
    ("<think>a</think><answer>b</answer>!", False),
    ("<answer>b</answer><think>a</think>", False),
    ("<think>a</think><think>a</think><answer>b</answer>", False),
    ("<think>a</think><answer>b", False),
    ("<think>a<answer>b</think></answer>", False),
    ("b", False),
])
def test_well_formed(reply, expected):
    assert is_well_formed(reply) is expected


def test_wilson_interval():
    assert wilson(10, 100) == pytest.approx([0.0552, 0.1744], abs=1e-4)
    assert wilson(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)
    assert wilson(10, 10) == pytest.approx([0.7225, 1], abs=1e-4)


# ---- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("line, reason", [
    (b"{", "not JSON"), (b"[1]", "not an object"), (b'{"question": "q"}', 'no "answer"'), (b"\xff", "not UTF-8"),
    (b'{"question": "", "answer": "1"}', 'no "question"'), (b'{"question": "q", "answer": true}', 'no "answer"'),
    (b'{"question": "\\ud83d", "answer": "1"}', "surrogate"), (b'{"question": "q", "answer": "?"}', "punctuation"),
    (b'{"question": "q", "decline": 1}', '"decline" is not true or false'),
    (b'{"question": "q", "decline": true, "answer": "1"}', '"answer" and "decline" in one record'),
    (b'{"question": "q", "decline": false}', 'no "answer"'), (b'{"question": " ", "decline": true}', 'no "question"'),
    (b'{"question": "q", "decline": true, "choices": [1]}', "not a list of texts"),
])
def test_malformed_questions(line, reason):
    with pytest.raises(MalformedRecord, match=reason):
        evaluate.parse_question(line)


def said(*turns):
    """Messages whose roles are given by a letter: s("system"), u("user"), a("assistant")."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]


@pytest.mark.parametrize("history, reason", [
    (said("u问", "a答"), None), (said("s短", "u问", "a答", "u问", "a答"), None),
    ("问", "not a list of messages"), (None, "not a list of messages"), ([], "does not end with a reply"),
    (said("s短"), "does not end with a reply"), (said("u问"), "does not end with a reply"),
    (said("u问", "a答", "u问"), "does not end with a reply"), (said("a答"), "message 1 is not of the user"),
    (said("s短", "a答"), "message 2 is not of the user"),
    (said("u问", "u问", "a答"), "message 2 is not of the assistant"),
    (said("u问", "a答", "a答"), "message 3 is not of the user"), (said("u问", "a答", "s短"), "may only come first"),
    (said("u问", "a "), "message 2 is empty"),
    ([{"role": "user"}], 'message 1 is not an object with "role" and "content"'),
    ([{"role": "tool", "content": "7"}], "role 'tool' is not one of"), (said("u问", "a\ud83d"), "lone surrogate"),
])
def test_histories(history, reason):
    for rest in ({"answer": "7"}, {"decline": True}):
        line = json.dumps({"history": history, "question": "几个？", **rest}).encode()
        if reason is None:
            assert evaluate.parse_question(line)["history"] == history
        else:
            with pytest.raises(MalformedRecord, match=f'"history".*{reason}'):
                evaluate.parse_question(line)


def test_files_of_each_form_are_questions(tmp_path):
    forms = [{"question": "q", "answer": "7"}, {"question": "q", "decline": True}, {"question": "q", "decline": False},
             {"history": said("u问", "a答"), "question": "q", "answer": "7"}]
    for form in forms:
        assert kind_of([write_jsonl(tmp_path / "x.jsonl", [form])]) == "question"
    # "question" alone does not make a question of a text or a chat
    assert kind_of([write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "text": "t"}])]) == "text"
    assert kind_of([write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "conversations": []}])]) == "chat"
    with pytest.raises(UserError, match='no record with "answer" and "question" or "decline" and "question" or "conv'):
        kind_of([write_jsonl(tmp_path / "x.jsonl", [{"question": "q"}])])


def test_malformed_lines_are_counted_and_printed(tmp_path, capsys):
    file = write_jsonl(tmp_path / "q.jsonl", [{"question": f"{n}+1", "answer": n + 1} for n in range(99)])
    with file.open("a") as stream:
        stream.write("{broken\n")
    questions, malformed = evaluate.read_questions([file], 0.01)
    assert (len(questions), malformed) == (99, 1)
    assert f"{file}:100: not JSON" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 of 100 lines are malformed, more than --max_bad_ratio 0.009"):
        evaluate.read_questions([file], 0.009)


def test_answers_that_are_compared_as_text_are_counted(tmp_path, capsys):
    """An answer that is one of the choices is not counted."""
    golds = ["58个", "40+18=<<40+18=58>>58\n#### 58", "1e3", "2:3", "小明"]
    rows = [{"question": "几个？", "answer": gold} for gold in golds]
    rows.append({"question": "谁？", "answer": "小明", "choices": ["小明", "小红"]})
    for chosen, n_texts in ((rows, 2), (rows[:3], 0)):
        evaluate.read_questions([write_jsonl(tmp_path / "q.jsonl", chosen)], 0)
        line = f"questions: {len(chosen)} lines, 0 malformed; {n_texts} answers are no numbers and are compared as text"
        assert line in capsys.readouterr().out.splitlines()


def test_questions_without_an_answer_are_counted(tmp_path, capsys):
    rows = [{"question": "几个？", "answer": "7"}, {"question": "谁？", "decline": True, "choices": ["小明", "小"]}]
    evaluate.read_questions([write_jsonl(tmp_path / "q.jsonl", rows)], 0)
    assert ("questions: 2 lines, 0 malformed; 0 answers are no numbers and are compared as text; 1 have no answer: a "
            "correct reply declines") in capsys.readouterr().out.splitlines()


def compared(questions, replies, thinking=None, reason="eos"):
    loaded = SimpleNamespace(tokenizer=SimpleNamespace(decode="".join))
    return evaluate.compare(loaded, questions, [Generation(list(reply), reason) for reply in replies], thinking)


@pytest.mark.parametrize("reply, read, correct", [
    ("我不知道。", "不知道", True), ("没听说过小明。", "没听说过", True),  # the name that the question has
    ("<think>小红？7？</think>不清楚", "不清楚", True), ("小红", "小红", False), ("不知道，是小红吧", "小红", False),
    ("不知道，7岁", "7", False), ("他很好", None, False), ("", None, False),
])
def test_questions_to_be_declined(reply, read, correct):
    question = {"question": "小明的妹妹是谁？", "decline": True, "choices": ["小明", "小红"], "source": "made up",
                "line": 3}
    [record] = compared([question], [reply])
    assert (record["read"], record["correct"]) == (read, correct)
    assert {key: record[key] for key in ("question", "decline", "source", "line")}.items() <= question.items()
    assert "answer" not in record and "declined" not in record


@pytest.mark.parametrize("question, reply, correct, declined", [
    ({"answer": "7"}, "我不知道。", False, True), ({"answer": "7"}, "不知道，8", False, False),
    ({"answer": "7"}, "不知道，7", True, False), ({"answer": "小红"}, "不清楚", False, True),
    ({"answer": "不会"}, "不会。", True, False),  # the answer is one of the phrases
    ({"answer": "小红", "choices": ["小红", "小兰"]}, "不知道，小兰", False, False),
    ({"answer": "小红", "choices": ["小红", "小兰"]}, "不知道", False, True),
    ({"answer": "小红", "choices": ["小红", "小明"]}, "不知道小明的事", False, True),  # repeats the question
    ({"answer": "小红"}, "小兰", False, False),
])
def test_declined_answers(question, reply, correct, declined):
    [record] = compared([{"question": "小明的妹妹是谁？"} | question], [reply])
    assert (record["correct"], record["declined"]) == (correct, declined)


def test_declined_shares():
    """Over the questions that have an answer, in all and by source."""
    fact, unknown = {"question": "谁？", "answer": "小红", "source": "fact"}, {"question": "谁？", "decline": True}
    questions = [fact, fact, fact | {"source": "other"}, unknown | {"source": "none"}, unknown]
    exact = evaluate.summary(compared(questions, ["不知道", "小红", "小兰", "不知道", "小红"]))
    assert (exact["questions"], exact["correct"], exact["declined"], exact["thinking"]) == (5, 2, 1 / 3, None)
    assert {source: (part["questions"], part["correct"], part["declined"]) for source, part in
            exact["by_source"].items()} == {"fact": (2, 1, 0.5), "none": (1, 1, None), "other": (1, 0, 0.0)}
    assert evaluate.summary(compared([unknown], ["不知道"]))["declined"] is None


@pytest.mark.parametrize("thinking, reply, text, tidy", [
    (None, "<think>a</think><answer>7</answer>", "<think>a</think><answer>7</answer>", True), (None, "7", "7", False),
    (True, "a</think><answer>7</answer>", "<think>a</think><answer>7</answer>", True),
    (True, "<think>a</think><answer>7</answer>", "<think><think>a</think><answer>7</answer>", False),
    (True, "a</think>7", "<think>a</think>7", False), (False, "7", "7", True),
    (False, "<answer>7</answer>", None, False), (False, "</think>7", None, False),
    (False, "<think>a</think><answer>7</answer>", None, False),
])
def test_replies_of_each_mode(thinking, reply, text, tidy):
    """<think> is part of the reply where the prompt opens it."""
    question = {"question": "?", "answer": "7"}
    for reason in ("eos", "length"):
        [record] = compared([question], [reply], thinking, reason)
        assert (record["reply"], record["thinking"]) == (text or reply, thinking)
        assert record["correct"] and record["tokens"] == len(reply)
        assert record["well_formed"] is (tidy and reason == "eos")


def test_replies_are_compared():
    loaded = SimpleNamespace(tokenizer=SimpleNamespace(decode="".join))
    cases = [("20 %", "20", "20", True), ("20", "20%", "1/5", True), ("0.2", "0.2%", "1/500", False),
             ("零下3度", "-3", "-3", True), ("零下3度", "3", "3", False), ("小明", "小明。", "小明", True),
             ("7", "", None, False)]
    records = evaluate.compare(loaded, [{"question": "?", "answer": gold} for gold, *_ in cases],
                               [Generation(list(reply), "eos") for _, reply, *_ in cases])
    assert [(r["answer"], r["reply"], r["read"], r["correct"]) for r in records] == cases
    json.dumps(records)


# ---- runs -----------------------------------------------------------------------------------


def save_nano(path, tokenizer, stage, reply=(), thought=()):
    """Save weights for tests. With `reply` the model answers any prompt with these ids; with `thought` it continues a
    prompt that ends in <think> with those.

    Then no information passes between positions: the output of every block is 0, and the embedding of each id
    matches the output row of the id that follows it.
    """
    torch.manual_seed(0)
    encoder = TextEncoder.of(tokenizer)
    changes = dict(dim=128, n_heads=2, tie_embeddings=False) if reply else {}
    config = LLMConfig.preset("nano", vocab_size=encoder.vocab_size, max_seq_len=128, **changes)
    model = WeakWater(config)
    if reply:
        with torch.no_grad():
            for block in model.model.layers:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.normal_()
            model.lm_head.weight.zero_()
            # the prompt's last token is the newline of the header or of the empty thought
            chains = [[*ChatEncoder.of(tokenizer).newline[-1:], *reply]]
            if thought:
                chains.append([encoder.tag_ids["<think>"], *thought])
            assert len({token for chain in chains for token in chain}) == sum(map(len, chains))
            for chain in chains:
                for before, after in zip(chain, [*chain[1:], encoder.eos_id], strict=True):
                    model.lm_head.weight[after] += model.model.embed_tokens.weight[before]
    save_weights(path, model, {"stage": stage, "step": 7, "tokenizer_sha256": encoder.fingerprint})
    return path


def scored(capsys, *argv):
    evaluate.main([str(a) for a in argv])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), lines[:-1]


def test_loss_of_text_and_chats(tmp_path, tokenizer, tokenizer_dir, capsys):
    save_nano(tmp_path / "SFT.pth", tokenizer, "SFT")
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", make_texts(seed=1, n=9, longest=400))
    write_jsonl(tmp_path / "data" / "b.jsonl", make_chats(seed=1, n=9))
    options = ("--model_mode", 1, "--out_dir", tmp_path, "--tokenizer_path", tokenizer_dir, "--dtype", "fp32")
    result, lines = scored(capsys, *options, "--data_path", tmp_path / "data")
    parts = result["files"]
    assert [part["kind"] for part in parts] == ["text", "chat"]
    assert result["targets"] == parts[0]["targets"] + parts[1]["targets"]
    assert result["loss"] == pytest.approx(
        sum(part["loss"] * part["targets"] for part in parts) / result["targets"])
    assert result["loss"] == pytest.approx(6.7, abs=0.3)  # untrained: ln 800
    assert any("bits per byte" in line for line in lines)
    first, _ = scored(capsys, *options, "--data_path", tmp_path / "data" / "a.jsonl", "--eval_tokens", 10)
    assert first["files"][0]["documents"] == 1 and "exact" not in first


def test_the_loss_covers_only_the_reply(tmp_path, tokenizer, tokenizer_dir, capsys):
    """Equals an explicit cross-entropy over the assistant's tokens and `</s>`, divided by the bytes of its text."""
    path = save_nano(tmp_path / "SFT.pth", tokenizer, "SFT")
    reply = "<think>嗯</think><answer>好的</answer>"
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": reply}]
    data = write_jsonl(tmp_path / "one.jsonl", [{"conversations": messages, "weight": 0.25}])
    result, _ = scored(capsys, "--checkpoint", path, "--tokenizer_path", tokenizer_dir, "--data_path", data,
                       "--out_dir", tmp_path, "--dtype", "fp32")
    ids, mask = encode_chat(tokenizer, messages)
    model, _ = load_model(path)
    with torch.no_grad():
        nats = cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="none")
    total = float(nats[torch.tensor(mask[1:], dtype=torch.bool)].sum())
    assert result["targets"] == sum(mask)
    assert result["loss"] == pytest.approx(total / sum(mask), rel=1e-5)
    assert result["ppl"] == pytest.approx(math.exp(total / sum(mask)), rel=1e-5)
    n_bytes = len(reply.encode())
    assert result["bpb"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-5)


def test_exact_answers_end_to_end(tmp_path, tokenizer, tokenizer_dir, capsys):
    encoder = TextEncoder.of(tokenizer)
    tags = encoder.tag_ids
    reply = [tags["<think>"], tags["</think>"], tags["<answer>"], *encoder.encode(["7"])[0], tags["</answer>"]]
    save_nano(tmp_path / "distill.pth", tokenizer, "distill", reply)
    questions = [{"question": "3+4=?", "answer": "7", "source": "a"},
                 {"question": "2+2=?", "answer": "4", "source": "b"},
                 {"question": "6+1=?", "answer": "14/2", "source": "b"}, {"question": "长" * 500, "answer": "7"}]
    write_jsonl(tmp_path / "sums.jsonl", questions)
    options = ("--model_mode", 2, "--out_dir", tmp_path, "--tokenizer_path", tokenizer_dir, "--batch_size", 2,
               "--data_path", tmp_path / "sums.jsonl", "--max_new_tokens", 20, "--dtype", "fp32")
    result, _ = scored(capsys, *options)
    exact = result["exact"]
    assert (exact["questions"], exact["correct"], exact["accuracy"]) == (4, 2, 0.5)
    assert exact["well_formed"] == exact["ended"] == 0.75  # the last question does not fit the context
    assert exact["thinking"] is True and "exact_no_think" not in result
    assert exact["mean_tokens"] == 4 * 3 / 4  # the prompt holds <think>
    assert exact["by_source"] == {
        "a": {"questions": 1, "correct": 1, "accuracy": 1.0, "interval95": wilson(1, 1), "declined": 0.0},
        "b": {"questions": 2, "correct": 1, "accuracy": 0.5, "interval95": wilson(1, 2), "declined": 0.0}}
    generations = [json.loads(line) for line in (tmp_path / "eval" / "distill_sums.jsonl").open(encoding="utf-8")]
    assert generations[0]["reply"] == "<think></think><answer>7</answer>"
    assert [g["correct"] for g in generations] == [True, False, True, False]
    assert [g["ended"] for g in generations] == ["eos", "eos", "eos", "context"]
    # a repeated run replaces its own file, no other file is overwritten, and --max_questions draws a sample
    drawn, _ = scored(capsys, *options, "--max_questions", 2, "--generations", tmp_path / "g" / "two.jsonl")
    assert drawn["exact"]["questions"] == 2
    again, _ = scored(capsys, *options)
    assert again["exact"]["correct"] == 2
    with pytest.raises(UserError, match="already exists"):
        evaluate.main([*map(str, options), "--generations", str(tmp_path / "sums.jsonl")])


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that evaluate.py has given to the model."""
    prompts = []

    def recording(model, batch, *args, **kwargs):
        prompts.extend(batch)
        return generate(model, batch, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", recording)
    return prompts


def test_pretraining_weights_continue_the_question(tmp_path, tokenizer, tokenizer_dir, capsys, prompts):
    """With --as_chat they get the chat format of the later stages."""
    path, encoder = save_nano(tmp_path / "any.pth", tokenizer, "pretrain"), TextEncoder.of(tokenizer)
    data = write_jsonl(tmp_path / "q.jsonl", [{"question": "1+1=", "answer": 2}])
    for flags in ([], ["--as_chat"]):
        result, _ = scored(capsys, "--checkpoint", path, "--tokenizer_path", tokenizer_dir, "--data_path", data,
                           "--out_dir", tmp_path, "--max_new_tokens", 4, *flags)
        assert result["stage"] == "pretrain" and result["exact"]["questions"] == 1
        assert result["exact"]["generations"] == str(tmp_path / "eval" / "any_q.jsonl")
    asked = encode_chat(tokenizer, [{"role": "user", "content": "1+1="}], True)[0]
    assert prompts == [[encoder.bos_id, *encoder.encode(["1+1="])[0]], asked]


@pytest.mark.parametrize("flag, modes", [((), [True]), (("--thinking", "on"), [True]), (("--thinking", "off"), [False]),
                                         (("--thinking", "both"), [True, False])])
def test_thinking_on_off_and_both(tmp_path, tokenizer, tokenizer_dir, capsys, prompts, flag, modes):
    """Weights that answer 7 where they think and 8 where they do not."""
    encoder = TextEncoder.of(tokenizer)
    (seven,), (eight,) = encoder.encode(["7", "8"])
    tags = encoder.tag_ids
    save_nano(tmp_path / "distill.pth", tokenizer, "distill", [eight],
              [tags["</think>"], tags["<answer>"], seven, tags["</answer>"]])
    questions = [{"question": "3+4=?", "answer": "7", "source": "a"},
                 {"question": "4+4=?", "answer": "8", "source": "b"},
                 {"question": "6+1=?", "answer": "7", "source": "a"}]
    write_jsonl(tmp_path / "sums.jsonl", [*questions, {"question": "broken"}])
    result, lines = scored(capsys, "--model_mode", 2, "--out_dir", tmp_path, "--tokenizer_path", tokenizer_dir,
                           "--data_path", tmp_path / "sums.jsonl", "--max_new_tokens", 20, "--dtype", "fp32",
                           "--max_bad_ratio", 0.5, *flag)
    assert [key for key in ("exact", "exact_no_think") if key in result] == ["exact", "exact_no_think"][:len(modes)]
    reply = {True: "<think></think><answer>7</answer>", False: "8"}
    for key, mode in zip(("exact", "exact_no_think"), modes, strict=False):
        exact = result[key]
        assert (exact["thinking"], exact["questions"], exact["correct"]) == (mode, 3, 2 if mode else 1)
        assert exact["by_source"]["a"]["correct"] == (2 if mode else 0) and exact["malformed"] == 1
        assert exact["well_formed"] == exact["ended"] == 1 and exact["mean_tokens"] == (4 if mode else 1)
        assert exact.keys() == result["exact"].keys()
        assert exact["generations"] == str(tmp_path / "eval" / "distill_sums.jsonl")
        word = "with" if mode else "without"
        assert any(line.startswith(f"exact answers {word} thinking: {exact['correct']} of 3") for line in lines)
        assert any(line.startswith(f"answered 3 of 3 questions {word} thinking, ") for line in lines)
    records = [json.loads(line) for line in (tmp_path / "eval" / "distill_sums.jsonl").open(encoding="utf-8")]
    assert [(r["thinking"], r["question"], r["reply"], r["source"], r["line"]) for r in records] == [
        (mode, q["question"], reply[mode], q["source"], i) for mode in modes for i, q in enumerate(questions, start=1)]
    assert sorted(prompts) == sorted(
        encode_chat(tokenizer, [{"role": "user", "content": q["question"]}], True, mode)[0]
        for mode in modes for q in questions)


@pytest.mark.parametrize("stage", ["pretrain", "SFT"])
def test_only_weights_that_think_have_modes(tmp_path, tokenizer, tokenizer_dir, capsys, stage):
    path = save_nano(tmp_path / "any.pth", tokenizer, stage, TextEncoder.of(tokenizer).encode(["7"])[0])
    data = write_jsonl(tmp_path / "q.jsonl", [{"question": "1+1=", "answer": 7}])
    options = ["--checkpoint", path, "--tokenizer_path", tokenizer_dir, "--data_path", data, "--out_dir", tmp_path,
               "--as_chat", "--dtype", "fp32"]
    for mode in ("on", "off", "both"):
        with pytest.raises(UserError, match=rf"^--thinking {mode}: .*any.pth \({stage}\) has no think[^\n]*$"):
            evaluate.main([*map(str, options), "--thinking", mode])
    assert "questions:" not in capsys.readouterr().out  # refused before anything is read
    result, lines = scored(capsys, *options)
    assert result["exact"]["thinking"] is None and "exact_no_think" not in result
    assert any(line.startswith("exact answers: 1 of 1") for line in lines)
    [record] = map(json.loads, (tmp_path / "eval" / "any_q.jsonl").open(encoding="utf-8"))
    assert (record["thinking"], record["reply"], record["well_formed"]) == (None, "7", False)


@pytest.mark.parametrize("stage, thinking", [("SFT", None), ("distill", True), ("distill", False)])
def test_a_history_stands_before_the_question(tmp_path, tokenizer, tokenizer_dir, capsys, prompts, stage, thinking):
    path = save_nano(tmp_path / "any.pth", tokenizer, stage)
    history = said("s短", "u小明几岁？", "a<think>想</think><answer>7岁</answer>")
    data = write_jsonl(tmp_path / "q.jsonl", [{"history": history, "question": "她呢？", "answer": "8"}])
    flags = [] if thinking is None else ["--thinking", "on" if thinking else "off"]
    scored(capsys, "--checkpoint", path, "--tokenizer_path", tokenizer_dir, "--data_path", data, "--out_dir", tmp_path,
           "--max_new_tokens", 4, *flags)
    assert prompts == [encode_chat(tokenizer, [*history, {"role": "user", "content": "她呢？"}], True, thinking)[0]]
    [record] = map(json.loads, (tmp_path / "eval" / "any_q.jsonl").open(encoding="utf-8"))
    assert record["history"] == history


def test_weights_that_continue_text_have_no_history(tmp_path, tokenizer, tokenizer_dir, capsys, prompts):
    path = save_nano(tmp_path / "any.pth", tokenizer, "pretrain")
    data = write_jsonl(tmp_path / "q.jsonl", [{"question": "几岁？", "answer": "7"},
                                              {"history": said("u问", "a答"), "question": "她呢？", "answer": "8"}])
    options = ["--checkpoint", path, "--tokenizer_path", tokenizer_dir, "--data_path", data, "--out_dir", tmp_path,
               "--max_new_tokens", 4]
    with pytest.raises(UserError, match=r'q.jsonl:2: a question with "history" needs the chat format[^\n]*--as_chat'):
        evaluate.main([*map(str, options)])
    assert not prompts
    result, _ = scored(capsys, *options, "--as_chat")
    assert result["exact"]["questions"] == 2 and len(prompts) == 2


def test_declining_end_to_end(tmp_path, tokenizer, tokenizer_dir, capsys):
    save_nano(tmp_path / "SFT.pth", tokenizer, "SFT", TextEncoder.of(tokenizer).encode(["不知道。"])[0])
    write_jsonl(tmp_path / "q.jsonl", [
        {"question": "谁？", "decline": True, "source": "a"}, {"question": "谁？", "answer": "小明", "source": "b"},
        {"question": "谁？", "answer": "不知道", "source": "b"}])
    result, lines = scored(capsys, "--model_mode", 1, "--out_dir", tmp_path, "--tokenizer_path", tokenizer_dir,
                           "--data_path", tmp_path / "q.jsonl", "--dtype", "fp32")
    exact = result["exact"]
    assert (exact["correct"], exact["declined"]) == (2, 0.5)
    assert [exact["by_source"][source]["declined"] for source in "ab"] == [None, 0.5]
    assert "  a: 1 of 1, 100.00%" in lines
    assert "  b: 1 of 2, 50.00%, 50.0% of those with an answer declined" in lines
    records = [json.loads(line) for line in (tmp_path / "eval" / "SFT_q.jsonl").open(encoding="utf-8")]
    assert [(r["read"], r["correct"], r.get("declined")) for r in records] == [
        ("不知道", True, None), ("不知道", False, True), ("不知道", True, False)]


@pytest.mark.parametrize("change, reason", [
    (["--data_path", "nowhere.jsonl"], "no such file"),
    (["--max_seq_len", "4096"], "exceeds the model's context"),
    (["--model_mode", "3"], "SFT_long.pth: no such file .python SFT_long.py makes it"),
])
def test_user_errors_name_their_reason(tmp_path, tokenizer, tokenizer_dir, change, reason):
    save_nano(tmp_path / "SFT.pth", tokenizer, "SFT")
    data = write_jsonl(tmp_path / "t.jsonl", [{"text": "你好"}])
    options = {"--model_mode": "1", "--out_dir": str(tmp_path), "--tokenizer_path": str(tokenizer_dir),
               "--data_path": str(data)} | dict(zip(change[::2], change[1::2], strict=True))
    with pytest.raises(UserError, match=reason):
        evaluate.main([word for pair in options.items() for word in pair])


def test_a_file_without_known_keys(tmp_path):
    with pytest.raises(UserError, match="no record with"):
        kind_of([write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a"}])])


def test_choices(tmp_path, tokenizer, tokenizer_dir, capsys):
    """A correct reply names the correct choice and no other; ambiguous choices are malformed."""
    reply = TextEncoder.of(tokenizer).encode(["黑猫。"])[0]
    save_nano(tmp_path / "SFT.pth", tokenizer, "SFT", reply)
    pets = {"question": "小明养了什么？", "choices": ["黑猫", "白猫"]}
    write_jsonl(tmp_path / "pets.jsonl", [
        {**pets, "answer": "黑猫"}, {**pets, "answer": "白猫"}, {**pets, "choices": ["黑", "猫"], "answer": "黑"},
        {**pets, "answer": "狗"}, {**pets, "choices": ["猫", "黑猫"], "answer": "猫"},
        {**pets, "choices": "猫", "answer": "猫"}])
    result, lines = scored(capsys, "--model_mode", 1, "--out_dir", tmp_path, "--tokenizer_path", tokenizer_dir,
                           "--data_path", tmp_path / "pets.jsonl", "--max_bad_ratio", 0.5, "--dtype", "fp32")
    assert result["exact"]["questions"] == 3 and result["exact"]["correct"] == 1 and result["exact"]["malformed"] == 3
    assert [any(reason in line for line in lines) for reason in
            ('not one of its "choices"', 'part of another', 'not a list of texts')] == [True] * 3
