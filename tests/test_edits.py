"""After an edit of model.py, training, chat and scores follow it, and the log says what is no longer accelerated."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, read_rows

EDITS = {  # name: (text in model.py, replacement text, expected part of the log)
    "nothing": ("", "", "faster than model.py"),
    "GELU for SiLU": ("F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))", "since SwiGLU edited"),
    "another slope": ("F.silu(self.gate_proj(x))", "F.silu(4 * self.gate_proj(x))", "since SwiGLU edited"),
    "another norm": ("x32.pow(2).mean(-1, keepdim=True)", "x32.abs().mean(-1, keepdim=True).pow(2)",
                     "since RMSNorm edited"),
    "a larger eps": ("keepdim=True) + self.eps", "keepdim=True) + 100 * self.eps", "since RMSNorm edited"),
    "RoPE with neighbours": (
        """first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos.to(x_BTHD.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x_BTHD.dtype)""",
        """first, second = x_BTHD[..., ::2], x_BTHD[..., 1::2]
    turned = torch.stack((-second, first), -1).flatten(-2)
    return x_BTHD * cos.to(x_BTHD.dtype) + turned * sin.to(x_BTHD.dtype)""", "since apply_rotary edited"),
    "a bias": ("self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)",
               "self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=True)",
               "since Attention edited"),
    "soft-capped logits": ("logits_NV = (logits := self.lm_head(hidden_NC))",
                           "logits_NV = (logits := 5 * torch.tanh(self.lm_head(hidden_NC) / 5))",
                           "since WeakWater.loss edited"),
    "another width": (  # 171 is not a multiple of the C code's vector width
        """config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim""",
        """config.hidden_dim, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(config.dim, 171, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(171, config.dim""", "since SwiGLU edited"),
    "another name": ("SwiGLU", "GatedMLP", "since SwiGLU edited"),
    "the norm after the branch": ("self.dropout(self.mlp(self.post_attention_layernorm(x_BTC)))",
                                  "self.dropout(self.post_attention_layernorm(self.mlp(x_BTC)))", None),
}
DRIVER = """
import contextlib, json, sys
import torch
import fastpath
from common import runtime
from common.generation import Decoder, Sampling, generate
from common.scoring import score
from Config import LLMConfig
from dataset import MicroBatch
from model import WeakWater

torch.set_num_threads(1)
torch.manual_seed(3)
device = torch.device("cpu")
model = WeakWater(LLMConfig.preset("nano", vocab_size=200, n_heads=2, n_kv_heads=1)).train()
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.randn_like(p) / p.shape[-1]**0.5 if p.ndim > 1 else p + 0.2 * torch.randn_like(p))
lengths = [30, 5, 61]
tokens = torch.randint(0, 200, (96,))
index = torch.arange(95)
batch = MicroBatch(tokens.numpy(), lengths, index.numpy(), tokens[1:].numpy(), torch.rand(95).numpy())

def learn(plain, dtype):
    model.zero_grad()
    fastpath.restore(model)
    lines = [] if plain else fastpath.accelerate(model, device, dtype)
    with runtime.autocast(device, dtype):
        loss = model(**batch.to(device))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    scores = score(model, [batch], 300, device, dtype)["loss"]
    return lines, loss.item(), gradient, scores

def compare(dtype):
    _, loss, gradient, scored = learn(True, dtype)
    lines, replaced_loss, replaced_gradient, replaced_scored = learn(False, dtype)
    prompts, new = [[5, 6, 7, 8, 9], [11, 12]], 12
    decoder = Decoder(model.eval(), dtype)
    batched = [g.ids for g in generate(decoder, prompts, new, Sampling(), ())]
    alone = [generate(decoder, [p], new, Sampling(), ())[0].ids for p in prompts]
    native = decoder.native is not None
    fastpath.restore(model)
    uncached = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(new):
            with torch.no_grad(), runtime.autocast(device, dtype):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        uncached.append(ids[len(prompt):])
    return {"lines": lines + decoder.lines, "native": native, "loss": replaced_loss / loss - 1,
            "gradient": float((replaced_gradient - gradient).norm() / gradient.norm()),
            "score": replaced_scored / scored - 1, "batched": batched == uncached, "alone": alone == uncached}

open("found.json", "w").write(json.dumps({dtype: compare(dtype) for dtype in ("fp32", "bf16")}))
"""
FORKS = """
import os, sys, torch
driver, *folders = sys.argv[1:]
for folder in folders:  # fork, because importing torch takes longer than everything else
    if os.fork() == 0:
        os.chdir(folder)
        sys.path[0] = folder
        exec(driver)
        os._exit(0)
    os.wait()
"""


def copy_with(folder, *edits: str) -> None:
    """Copy the code to a folder and edit model.py there."""
    for path in [*ROOT.glob("*.py"), ROOT / "common", ROOT / "fastpath", ROOT / "formats", ROOT / "text"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    source = (folder / "model.py").read_text(encoding="utf-8")
    for before, after in edits:
        assert before in source
        source = source.replace(before, after) if before else source
    (folder / "model.py").write_text(source, encoding="utf-8")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """edit → dtype → the results of DRIVER."""
    folders = {edit: tmp_path_factory.mktemp("edited") for edit in EDITS}
    for edit, folder in folders.items():
        copy_with(folder, EDITS[edit][:2])
    done = subprocess.run([sys.executable, "-c", FORKS, DRIVER, *map(str, folders.values())], capture_output=True,
                          text=True)
    assert done.stderr == "", done.stderr[-2000:]
    return {edit: json.loads((folder / "found.json").read_text()) for edit, folder in folders.items()}


@pytest.mark.parametrize("edit", EDITS)
def test_training_and_generation_follow_an_edit(found, edit):
    """Losses, gradients and scores agree to rounding; in float32, greedy text agrees token for token."""
    words = EDITS[edit][2]
    for dtype, here in found[edit].items():
        tolerance = 1e-5 if dtype == "fp32" else 0.03
        assert abs(here["loss"]) < tolerance and abs(here["score"]) < tolerance, (dtype, here)
        assert here["gradient"] < 3 * tolerance, (dtype, here)
        assert words is None or any(words in line for line in here["lines"]), here["lines"]
        if dtype == "fp32":
            assert here["batched"] and here["alone"], here
            assert here["native"] == (edit in ("nothing", "soft-capped logits") and bool(shutil.which("cc"))), here


SCRIPTS = """
import contextlib, io, json, sys
import torch
import eval_model, evaluate, pretrain

torch.set_num_threads(1)
data, tokenizer = sys.argv[1:]

def run(main, *argv):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([*argv, "--tokenizer_path", tokenizer, "--device", "cpu", "--dtype", "fp32"])
    return out.getvalue()

for name, plain in (("plain", ["--plain"]), ("replaced", [])):
    log = run(pretrain.main, "--data_path", data, "--out_dir", name, "--preset", "nano", "--max_seq_len", "64",
              "--batch_size", "4", "--max_steps", "6", "--log_interval", "1", "--optimizer", "adamw",
              "--learning_rate", "0.01", *plain)
    weights = ["--checkpoint", "plain/pretrain.pth", *plain]
    scores = json.loads(run(evaluate.main, *weights, "--data_path", data).splitlines()[-1])
    text = run(eval_model.main, *weights, "--prompt", "小明", "--temperature", "0", "--max_new_tokens", "24")
    print(json.dumps({"log": log, "scores": scores, "text": text}))
"""


def test_the_scripts_follow_an_edit(tmp_path, text_file, tokenizer_dir):
    """pretrain.py, evaluate.py and eval_model.py, with and without --plain, after two edits at once."""
    copy_with(tmp_path, *(EDITS[edit][:2] for edit in ("another slope", "another norm")))
    done = subprocess.run([sys.executable, "-c", SCRIPTS, str(text_file), str(tokenizer_dir)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, replaced = map(json.loads, done.stdout.splitlines())
    losses = [[row["loss"] for row in read_rows(tmp_path / name, "pretrain")] for name in ("plain", "replaced")]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
    assert replaced["scores"]["loss"] == pytest.approx(plain["scores"]["loss"], rel=1e-5)
    assert replaced["text"] == plain["text"] != ""
    for words in ("since SwiGLU edited", "since RMSNorm edited", "attention (documents"):
        assert words in replaced["log"] and words not in plain["log"]
    assert "without replacements: --plain" in plain["log"]
