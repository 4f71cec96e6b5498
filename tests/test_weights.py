"""common/weights.py and text/tokenizer.py: a weights file holds its tokenizer, and which tokenizer a command uses."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, byte_level, make_chats, save_tokenizer, train, write_jsonl

import eval_model
from common import checkpoint, continuation
from common.weights import load_model, load_weights
from Config import UserError
from dataset import load_documents
from text.content import Reading
from text.tokenizer import OurTokenizer, TextEncoder, load_tokenizer, tokenizer_files, tokenizer_from_files

ASK = ["--prompt", "你好", "--temperature", "0", "--max_new_tokens", "5", "--device", "cpu"]
TINY = dict(preset="nano", max_seq_len=64, batch_size=4, max_steps=2, eval_interval=0)


@pytest.fixture(scope="module")
def out(text_file, tokenizer_dir, tmp_path_factory):
    """An --out_dir with pretrain.pth and SFT.pth; the second stage was given no tokenizer."""
    folder = tmp_path_factory.mktemp("weights") / "out"
    train("pretrain", text_file, tokenizer_dir, folder, **TINY | dict(epochs=9))
    chats = write_jsonl(folder / "chats.jsonl", make_chats(3, 20, longest=60, reply=20))
    train("SFT", chats, False, folder, **TINY | dict(preset=False, max_seq_len=256))
    return folder


def chat(path, cwd=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "eval_model.py"), *ASK, "--checkpoint", str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_weights_file_alone_is_enough_to_chat(out, tmp_path):
    """out/ moved, another working folder, no tokenizer in sight."""
    before = chat(out / "SFT.pth")
    moved, elsewhere = tmp_path / "moved", tmp_path / "elsewhere"
    shutil.copytree(out, moved)
    elsewhere.mkdir()
    after = chat(moved / "SFT.pth", cwd=elsewhere)
    assert before.returncode == after.returncode == 0, after.stderr
    assert before.stdout == after.stdout
    assert not list(elsewhere.iterdir()), "a chat writes nothing"


def test_every_file_holds_the_texts_of_the_tokenizer(out, tokenizer_dir):
    texts = {name: (tokenizer_dir / name).read_text(encoding="utf-8")
             for name in ("tokenizer.json", "tokenizer_config.json")}
    for stage in ("pretrain", "SFT"):
        for path in (out / f"{stage}.pth", out / f"{stage}_best.pth"):
            assert load_weights(path)[2]["tokenizer"] == texts
        (state,) = (out / "checkpoints" / stage).glob("step_*.pth")
        assert checkpoint.load(state, ("tokenizer",))["tokenizer"] == texts


def test_the_order_of_tokenizers(out, tokenizer_dir, tmp_path, monkeypatch, capsys):
    """--tokenizer_path if given, else the weights' own, else weakwater_tokenizer; one that differs is refused."""
    def said(path, *flags) -> str:
        capsys.readouterr()
        eval_model.main([*ASK, "--checkpoint", str(path), *map(str, flags)])
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    other = save_tokenizer(byte_level(["a b"], 300), tmp_path / "other")
    shutil.copytree(other, tmp_path / "weakwater_tokenizer")  # not used where the weights have their own
    expected = said(out / "SFT.pth", "--tokenizer_path", tokenizer_dir)
    assert said(out / "SFT.pth") == expected
    with pytest.raises(UserError, match="another tokenizer than --tokenizer_path .*leave the flag out"):
        said(out / "SFT.pth", "--tokenizer_path", other)
    state, config, meta = load_weights(out / "SFT.pth")
    del meta["tokenizer"]  # as weights were before they held one
    checkpoint.save({"model": state, "config": config.to_dict(), "meta": meta}, tmp_path / "old.pth")
    with pytest.raises(UserError, match="another tokenizer than --tokenizer_path weakwater_tokenizer"):
        said(tmp_path / "old.pth")
    shutil.rmtree(tmp_path / "weakwater_tokenizer")
    shutil.copytree(tokenizer_dir, tmp_path / "weakwater_tokenizer")
    assert said(tmp_path / "old.pth") == expected


@pytest.mark.parametrize("stage, flags", [("SFT", dict(preset=False, max_seq_len=256)),
                                          ("pretrain", dict(resume=True))])
def test_another_tokenizer_is_refused_by_the_next_stage_and_on_resume(out, text_file, tmp_path, stage, flags):
    folder = shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(folder / "checkpoints" / "SFT")
    for name in ("SFT.pth", "SFT_best.pth", "log/SFT.jsonl"):
        (folder / name).unlink()
    other = save_tokenizer(byte_level(["a b"], 300), tmp_path / "other")
    data = folder / "chats.jsonl" if stage == "SFT" else text_file
    with pytest.raises(UserError, match="another tokenizer than --tokenizer_path"):
        train(stage, data, other, folder, **TINY | flags | dict(epochs=9))
    train(stage, data, False, folder, **TINY | flags | dict(max_steps=3, epochs=9))  # and without the flag it is found
    assert load_weights(folder / f"{stage}.pth")[2]["step"] == 3


def test_a_foreign_tokenizer_is_kept_too(tmp_path):
    folder = save_tokenizer(byte_level(["你好 hello " * 9], 300), tmp_path / "foreign", bos_token=None)
    tokenizer = load_tokenizer(str(folder))
    assert not isinstance(tokenizer, OurTokenizer)
    copy = tokenizer_from_files(tokenizer_files(tokenizer), "a weights file")
    assert TextEncoder.of(copy).fingerprint == TextEncoder.of(tokenizer).fingerprint
    assert copy.decode(TextEncoder.of(copy).encode(["你好 hello"])[0]) == "你好 hello"


def test_a_damaged_tokenizer_in_the_weights_is_named(out, tmp_path, tokenizer_dir):
    state, config, meta = load_weights(out / "SFT.pth")
    meta["tokenizer"] = meta["tokenizer"] | {"tokenizer.json": "{}"}
    path = tmp_path / "damaged.pth"
    checkpoint.save({"model": state, "config": config.to_dict(), "meta": meta}, path)
    with pytest.raises(UserError, match=f"the tokenizer in {path}: not a tokenizer"):
        eval_model.main(["--checkpoint", str(path), "--prompt", "a"])
    eval_model.main([*ASK, "--checkpoint", str(path), "--tokenizer_path", str(tokenizer_dir)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("use", ["--init_from", "--checkpoint", "--resume"])
def test_weights_that_are_not_finite_are_named(out, text_file, tokenizer_dir, tmp_path, value, use):
    """By file, number and first name, and not as a fault of the rows of the first step."""
    folder = shutil.copytree(out, tmp_path / "out")
    path = folder / ("checkpoints/pretrain/step_00000002.pth" if use == "--resume" else "pretrain.pth")
    content = torch.load(path, weights_only=True)
    broken = [name for name in content["model"] if "layers.1." in name and "weight" in name][:3]
    for name in broken:
        content["model"][name] = content["model"][name].double()
        content["model"][name].view(-1)[-1] = value
    checkpoint.save(content, path)
    with pytest.raises(UserError) as refused:
        if use == "--checkpoint":
            eval_model.main([*ASK, "--checkpoint", str(path)])
        elif use == "--resume":
            train("pretrain", text_file, tokenizer_dir, folder, **TINY | dict(max_steps=3, epochs=9), resume=True)
        else:
            train("pretrain", text_file, tokenizer_dir, tmp_path / "new", **TINY | dict(preset=False), init_from=path)
    assert str(refused.value).startswith(f"{path}: NaN or infinity in 3 of its weight tensors (the first: {broken[0]})")


# ---------------------------------------------------------------------------------------------
# the sample printed at each validation


@pytest.mark.parametrize("stage", ["pretrain", "SFT"])
def test_samples_change_no_loss(stage, out, text_file, tokenizer_dir, tmp_path, monkeypatch, capsys):
    """One greedy continuation at each validation; with and without it the losses are equal: it draws no random number,
    with dropout too."""
    data = text_file if stage == "pretrain" else out / "chats.jsonl"
    flags = TINY | dict(max_steps=6, epochs=9, eval_interval=2, dropout=0.2, dtype="bf16", init_from="none",
                        max_seq_len=128)
    rows = train(stage, data, tokenizer_dir, tmp_path / "with", **flags)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample: ")]
    assert len(said) == 3 and all(" → " in line for line in said)
    with monkeypatch.context() as patch:
        patch.setattr(f"{stage}.continuation", lambda *arguments: "sample: none")
        without = train(stage, data, tokenizer_dir, tmp_path / "without", **flags)
    assert [row["loss"] for row in rows] == [row["loss"] for row in without]
    assert [row.get("val_loss") for row in rows] == [row.get("val_loss") for row in without]


def test_the_sample_is_what_the_model_says(out, tokenizer, text_file, tmp_path):
    """Its ids are those of an uncached greedy loop, and the line holds question and reply."""
    net, _ = load_model(out / "SFT.pth")
    for kind, file in (("chat", out / "chats.jsonl"), ("thinking", out / "chats.jsonl"), ("text", text_file)):
        reading = Reading("chat", thoughts=True) if kind == "thinking" else kind
        documents = load_documents(str(file), tokenizer, reading, str(tmp_path), 256)
        record = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
        line = continuation.continuation(net, tokenizer, documents, "cpu", "fp32")
        ids = continuation.greedy(net, continuation.prompt_of(documents), 40, 800, 2, "cpu", "fp32")
        assert line.endswith(f" → {tokenizer.decode(ids).strip()}".replace("\n", "\\n"))
        shown = line.removeprefix("sample: ").partition(" → ")[0]
        asked = [m["content"] for m in record["conversations"] if m["role"] == "user"][0] if kind != "text" else ""
        assert shown == asked.strip().replace("\n", "\\n") if asked else record["text"].startswith(shown[:5])
    net.train()
    prompt, generator = [1, 50, 60, 70], torch.random.get_rng_state()
    ids = continuation.greedy(net, prompt, 12, 800, 2, "cpu", "fp32")
    expected = list(prompt)
    net.eval()
    while len(expected) < len(prompt) + 12:
        expected.append(int(net(torch.tensor([expected]))[0, -1, :800].argmax()))
        if expected[-1] == 2:
            expected.pop()
            break
    assert prompt + ids == expected and torch.equal(torch.random.get_rng_state(), generator)
    net.train()
    full = [5] * (net.config.max_seq_len - 3)
    assert len(continuation.greedy(net, full, 40, 800, 2, "cpu", "fp32")) <= 3 and net.training


def test_a_tokenizer_whose_text_begins_and_ends_alike_gives_samples_too(text_file, tmp_path, capsys):
    """As GPT-2's, whose one control token both begins and ends."""
    folder = save_tokenizer(byte_level(["你好 hello " * 9], 300), tmp_path / "foreign", bos_token=None)
    train("pretrain", text_file, folder, tmp_path / "out", **TINY | dict(epochs=9, max_seq_len=128))
    assert capsys.readouterr().out.count("sample: ") == 1
