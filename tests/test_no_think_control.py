"""The control of the quickstart: which thoughts are taken out, what stays as it is, and what is counted."""

import json

import pytest
from conftest import make_chats, make_texts, read_rows, train, write_jsonl

from Config import UserError
from dataset import StepLoader, load_splits
from experiments import no_think_control
from experiments.no_think_control import AS_DISTILL
from text.chat import REPLY
from text.sources import find_sources


def thinking(number: int) -> dict:
    """A sum with a thought much longer than its answer."""
    thought = f"原来有{number}个，又买了{number}个，一共有{2 * number}个。" * 4
    return {"conversations": [{"role": "user", "content": f"{number}加{number}等于多少？"}, {
        "role": "assistant", "content": f"<think>\n{thought}\n</think>\n<answer>{2 * number}</answer>"}]}


def plain(number: int) -> dict:
    """The same sum with its answer alone."""
    return {"conversations": [{"role": "user", "content": f"{number}加{number}等于多少？"},
                              {"role": "assistant", "content": f"{2 * number}"}]}


def read(path) -> list[dict]:
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture
def files(tmp_path):
    """Files of thoughts, of chats without and of texts, and one of each to validate."""
    records = {"r1": map(thinking, range(200)), "sft": make_chats(11, 60, longest=150), "text": make_texts(12, 60, 300),
               "val_r1": map(thinking, range(300, 310)), "val_sft": make_chats(13, 5, longest=100),
               "val_text": make_texts(14, 5, 100)}
    return {name: str(write_jsonl(tmp_path / f"{name}.jsonl", list(each))) for name, each in records.items()}


@pytest.fixture
def make_control(tmp_path, tokenizer_dir, capsys):
    """make_control(data_path, val_path, **flags): the object in its last line."""
    def run(data_path, val_path=(), **flags) -> dict:
        flags = dict(tokenizer_path=tokenizer_dir, out_dir=tmp_path / "control", max_steps=3, batch_size=2,
                     max_seq_len=256) | flags
        argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        no_think_control.main(["--data_path", *data_path, *(["--val_path", *val_path] if val_path else []), *argv])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_of_one_source(files, tmp_path, make_control):
    """Thoughts are taken out and nothing else; it stops with the first step that has seen as many targets. One source
    has conversations, even if it begins with a line of text, which distill.py leaves out."""
    records = write_jsonl(tmp_path / "begins.jsonl", [{"text": "水"}, *map(thinking, range(200))])
    result = make_control([str(records)], [files["val_r1"]])
    assert (result["records"], result["emptied"], result["malformed"]) == (200, 200, 1)
    assert 0 <= result["control_targets"] - result["targets"] < 2 * 256
    assert result["control_conversations"] > 1.5 * result["conversations"] > 0
    out = tmp_path / "control"
    assert result["data_path"] == [str(out / "no_think_1.jsonl")]
    assert result["val_path"] == [str(out / "no_think_val_1.jsonl")]
    assert read(result["data_path"][0]) == list(map(plain, range(200)))
    assert read(result["val_path"][0]) == list(map(plain, range(300, 310)))


def test_of_a_mixture(files, tmp_path, tokenizer, tokenizer_dir, make_control):
    """Only the source that thinks is copied, the shares stay, and distill trains on it with --without_thoughts, for
    which every reply stands behind an empty thought; targets of all sources count, and only chats are conversations."""
    words = [f"{files['r1']}=0.6", f"{files['sft']}=0.25", f"{files['text']}=3e-1"]
    val = [files["val_text"], files["val_r1"], files["val_sft"]]
    result = make_control(words, val)
    out = tmp_path / "control"
    assert result["data_path"] == [f"{out / 'no_think_1.jsonl'}=0.6", *words[1:]]
    assert set(result["val_path"]) == {files["val_text"], files["val_sft"], *map(str, out.glob("no_think_val_*.jsonl"))}
    assert sorted(path.name for path in out.glob("*.jsonl"))[0] == "no_think_1.jsonl" and len(result["val_path"]) == 3
    assert result["records"] == result["emptied"] == 200

    loaders = {}
    for name, paths, val_paths in (("", words, val), ("control_", result["data_path"], result["val_path"])):
        documents, _ = load_splits(find_sources(paths), val_paths, tokenizer, AS_DISTILL, str(out / "cache"), 256,
                                   say=lambda line: None)
        loaders[name] = StepLoader(documents, 256, 2, 1, 42)
    assert loaders[""].documents.shares == loaders["control_"].documents.shares
    for name, n_steps in (("", 3), ("control_", result["control_steps"])):
        steps = [loaders[name].step(0, number) for number in range(n_steps)]
        assert result[f"{name}targets"] == sum(int((m.weights > 0).sum()) for s in steps for m in s.micro_batches)
        chats = [d for s in steps for d, _, _ in s.segments if loaders[name].documents.source[d] < 2]
        assert result[f"{name}conversations"] == len(chats) == len(set(chats))
    last = sum(len(m.targets) for m in steps[-1].micro_batches)
    assert 0 <= result["control_targets"] - result["targets"] < last, "a step less has fewer"

    documents = loaders["control_"].documents
    first = int((documents.source == 0).argmax())
    whole, types = documents.tokens(first), documents.types(first)
    assert "<think>\n\n</think>\n" in tokenizer.decode(whole) and "think" not in tokenizer.decode(whole[types == REPLY])
    flags = dict(preset="nano", init_from="none", max_steps=result["control_steps"], max_seq_len=256, batch_size=2,
                 val_path=result["val_path"], cache_dir=out / "cache", eval_interval=0)
    with pytest.raises(UserError, match="no reply has a thought"):
        train("distill", result["data_path"], tokenizer_dir, tmp_path / "refused", **flags)
    train("distill", result["data_path"], tokenizer_dir, tmp_path / "run", without_thoughts=True, **flags)
    assert len(read_rows(tmp_path / "run", "distill")) == result["control_steps"]


def test_several_files_are_one_source(files, make_control):
    """Files without shares are copied together, also those in which nothing thinks."""
    result = make_control([files["r1"], files["sft"]])
    (copy,) = result["data_path"]
    assert len(read(copy)) == 260 == result["records"] and result["emptied"] == 200 and result["val_path"] is None
    assert [r["conversations"] for r in read(copy)[200:]] == [r["conversations"] for r in read(files["sft"])]


def test_it_reads_what_distill_reads(tmp_path):
    """A thought in reasoning_content is taken out too, of earlier replies as well; what distill leaves out is in
    neither; a reply that says itself that it does not think stays."""
    question = {"role": "user", "content": "三加四？"}
    replies = ({"content": "七", "reasoning_content": "3+4"}, {"content": "<think>3"}, {"content": " "},
               {"content": "<think>\n\n</think>\n七"})
    records = [{"conversations": [question, {"role": "assistant"} | reply]} for reply in replies]
    records.append({"conversations": records[0]["conversations"] * 2, "weight": 0.5})
    file = write_jsonl(tmp_path / "r1.jsonl", [*records, {"text": "水"}])
    counts = {"records": 0, "emptied": 0, "malformed": 0}
    answered = [question, {"role": "assistant", "content": "七"}]
    assert list(no_think_control.control_records([file], counts)) == [
        {"conversations": answered}, {"conversations": [question, {"role": "assistant"} | replies[3]]},
        {"conversations": answered * 2, "weight": 0.5}]
    assert counts == {"records": 5, "emptied": 2, "malformed": 1}


@pytest.mark.parametrize("change, reason", [
    (dict(out_dir="{tmp}/sft.jsonl"), "--out_dir"), (dict(data_path="{tmp}/sft.jsonl"), "no reply has a <think>"),
    (dict(data_path="{tmp}/sft.jsonl=1 {tmp}/text.jsonl=1"), "no reply has a <think>"),
    (dict(data_path="{tmp}/r1.jsonl=1 {tmp}/gone.jsonl=1"), "gone.jsonl"),
    (dict(val_path="{tmp}/val_r1.jsonl=0.5"), "--val_path .*validation data has no shares"),
])
def test_mistakes(files, tmp_path, make_control, change, reason):
    settings = {name: value.format(tmp=tmp_path) for name, value in (dict(data_path="{tmp}/r1.jsonl") | change).items()}
    with pytest.raises(UserError, match=reason):
        make_control(settings.pop("data_path").split(), settings.pop("val_path", "").split(), **settings)
