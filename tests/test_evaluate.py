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
])
def test_malformed_questions(line, reason):
    with pytest.raises(MalformedRecord, match=reason):
        evaluate.parse_question(line)


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


def save_nano(path, tokenizer, stage, reply=()):
    """Save weights for tests. With `reply` the model answers any prompt with these ids.

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
            # the prompt's last token is the header's newline
            chain = [*ChatEncoder.of(tokenizer).newline[-1:], *reply, encoder.eos_id]
            assert len(set(chain)) == len(chain)
            for before, after in zip(chain, chain[1:], strict=False):
                model.lm_head.weight[after] = model.model.embed_tokens.weight[before]
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
    assert exact["mean_tokens"] == 5 * 3 / 4
    assert exact["by_source"] == {
        "a": {"questions": 1, "correct": 1, "accuracy": 1.0, "interval95": wilson(1, 1)},
        "b": {"questions": 2, "correct": 1, "accuracy": 0.5, "interval95": wilson(1, 2)}}
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


def test_pretraining_weights_continue_the_question(tmp_path, tokenizer, tokenizer_dir, capsys, monkeypatch):
    """With --as_chat they get the chat format of the later stages."""
    prompts = []

    def recording(model, batch, *args, **kwargs):
        prompts.extend(batch)
        return generate(model, batch, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", recording)
    path, encoder = save_nano(tmp_path / "any.pth", tokenizer, "pretrain"), TextEncoder.of(tokenizer)
    data = write_jsonl(tmp_path / "q.jsonl", [{"question": "1+1=", "answer": 2}])
    for flags in ([], ["--as_chat"]):
        result, _ = scored(capsys, "--checkpoint", path, "--tokenizer_path", tokenizer_dir, "--data_path", data,
                           "--out_dir", tmp_path, "--max_new_tokens", 4, *flags)
        assert result["stage"] == "pretrain" and result["exact"]["questions"] == 1
        assert result["exact"]["generations"] == str(tmp_path / "eval" / "any_q.jsonl")
    asked = encode_chat(tokenizer, [{"role": "user", "content": "1+1="}], True)[0]
    assert prompts == [[encoder.bos_id, *encoder.encode(["1+1="])[0]], asked]


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
