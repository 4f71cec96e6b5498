"""experiments/lora.py: exported, trained with peft, merged and brought back."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_evaluate import save_nano

from common.weights import load_model, load_weights, save_weights
from experiments.lora import OPPOSITES, OTHER_WORDINGS, WORDINGS, batch_of, encode_chats, make_domain
from text.chat import encode_chat


def test_what_is_asked_is_in_no_training_file(tmp_path):
    train, new = make_domain(tmp_path, thinks=True)
    trained = train.read_text(encoding="utf-8")
    questions = [json.loads(line) for line in new.read_text(encoding="utf-8").splitlines()]
    assert len(questions) == 2 * len(OPPOSITES) * len(OTHER_WORDINGS) and not set(WORDINGS) & set(OTHER_WORDINGS)
    assert not any(question["question"] in trained for question in questions)
    assert len(set("".join(OPPOSITES))) == 2 * len(OPPOSITES), "each word has one opposite"


@pytest.mark.parametrize("thinks", [False, True])
def test_the_loss_is_on_what_training_has_it_on(tmp_path, tokenizer, thinks):
    train, _ = make_domain(tmp_path, thinks)
    examples = encode_chats(train, tokenizer, thinks, 500)
    messages = json.loads(train.read_text(encoding="utf-8").splitlines()[0])["conversations"]
    ids, mask = encode_chat(tokenizer, messages, thinking=True if thinks else None)
    batch = batch_of([examples[0], max(examples, key=lambda example: len(example[0]))])
    assert batch["input_ids"][0, :len(ids)].tolist() == ids and batch["attention_mask"][0].sum() == len(ids)
    assert (batch["labels"][0, :len(ids)] != -100).tolist() == [bool(kept) for kept in mask]
    assert (batch["labels"][0, len(ids):] == -100).all()


@pytest.mark.extra
@pytest.mark.parametrize("stage", ["SFT", "distill"])
def test_a_small_run(tmp_path, tokenizer, stage):
    """The seven matrices change, the embedding does not, and both scores are there."""
    pytest.importorskip("peft")
    path = save_nano(tmp_path / "x.pth", tokenizer, stage)
    model, meta = load_model(path)
    save_weights(path, model, meta | {"tokenizer": tokenizer.files})
    old = tmp_path / "old.jsonl"
    old.write_text('{"question": "1+1=?", "answer": "2"}\n', encoding="utf-8")
    command = ["experiments/lora.py", "--checkpoint", path, "--steps", 2, "--old_path", old, "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["before"]) == set(result["after"]) == {str(tmp_path / "out" / "new.jsonl"), str(old)}
    before, after = load_weights(path), load_weights(tmp_path / "out" / "lora.pth")
    assert after[2]["stage"] == stage and after[2]["tokenizer_sha256"] == meta["tokenizer_sha256"]
    changed = {name for name in before[0] if not torch.equal(before[0][name], after[0][name])}
    assert changed == {name for name in before[0] if "_proj." in name}
