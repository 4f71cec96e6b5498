"""Someone edits model.py: training, chat and scores follow the edit, and the log says what is no longer accelerated."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

EDITS = {  # name: (what stands in model.py, what is put there, words of the log)
    "nothing": ("", "", "faster than model.py"),
    "GELU for SiLU": ("F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))", "mlp: computed as model.py says"),
    "another slope": ("F.silu(self.gate_proj(x))", "F.silu(4 * self.gate_proj(x))", "mlp: computed as model.py says"),
    "another norm": ("x32.pow(2).mean(-1, keepdim=True)", "x32.abs().mean(-1, keepdim=True).pow(2)",
                     "norm: computed as model.py says"),
    "a larger eps": ("keepdim=True) + self.eps", "keepdim=True) + 100 * self.eps", "norm: computed as model.py says"),
    "RoPE with neighbours": (
        """first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos.to(x_BTHD.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x_BTHD.dtype)""",
        """first, second = x_BTHD[..., ::2], x_BTHD[..., 1::2]
    turned = torch.stack((-second, first), -1).flatten(-2)
    return x_BTHD * cos.to(x_BTHD.dtype) + turned * sin.to(x_BTHD.dtype)""", None),
    "a bias": ("self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)",
               "self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=True)",
               "attention: computed as model.py says"),
    "soft-capped logits": ("logits_NV = (logits := self.lm_head(hidden_NC))",
                           "logits_NV = (logits := 5 * torch.tanh(self.lm_head(hidden_NC) / 5))",
                           "loss: computed as model.py says"),
    "the norm after the branch": ("self.dropout(self.mlp(self.post_attention_layernorm(x_BTC)))",
                                  "self.dropout(self.post_attention_layernorm(self.mlp(x_BTC)))", None),
}
DRIVER = """
import json, sys
import torch
import fastpath
from common import runtime
from common.generation import Decoder, Sampling, generate
from common.scoring import score
from Config import LLMConfig
from dataset import MicroBatch
from model import WeakWater

dtype, device = sys.argv[1], torch.device("cpu")
torch.manual_seed(3)
model = WeakWater(LLMConfig.preset("nano", vocab_size=200, n_heads=2, n_kv_heads=1)).train()
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.randn_like(p) / p.shape[-1]**0.5 if p.ndim > 1 else p + 0.2 * torch.randn_like(p))
lengths = [30, 5, 61]
tokens = torch.randint(0, 200, (96,))
index = torch.arange(95)
batch = MicroBatch(tokens.numpy(), lengths, index.numpy(), tokens[1:].numpy(), torch.rand(95).numpy())

def learn(plain):
    model.zero_grad()
    fastpath.restore(model)
    lines = [] if plain else fastpath.accelerate(model, device, dtype)
    with runtime.autocast(device, dtype):
        loss = model(**batch.to(device))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    scores = score(model, [batch], 300, device, lambda: runtime.autocast(device, dtype))["loss"]
    return lines, loss.item(), gradient, scores

_, loss, gradient, scored = learn(plain=True)
lines, fast_loss, fast_gradient, fast_scored = learn(plain=False)
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
print(json.dumps({"lines": lines + decoder.lines, "native": native, "loss": fast_loss / loss - 1,
                  "gradient": float((fast_gradient - gradient).norm() / gradient.norm()),
                  "score": fast_scored / scored - 1, "batched": batched == uncached, "alone": alone == uncached}))
"""


@pytest.mark.parametrize("edit", EDITS)
def test_all_follow_an_edit_of_the_network(tmp_path, edit):
    """Losses, gradients and scores to the precision's error; greedy text token for token in float32."""
    before, after, words = EDITS[edit]
    for name in ("Config.py", "dataset.py", "model.py", "common", "fastpath"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    source = (tmp_path / "model.py").read_text(encoding="utf-8")
    assert before in source
    (tmp_path / "model.py").write_text(source.replace(before, after, 1) if before else source, encoding="utf-8")
    for dtype in ("fp32", "bf16"):
        done = subprocess.run([sys.executable, "-c", DRIVER, dtype], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        tolerance = 1e-5 if dtype == "fp32" else 0.03
        assert abs(found["loss"]) < tolerance and abs(found["score"]) < tolerance, (dtype, found)
        assert found["gradient"] < 3 * tolerance, (dtype, found)
        assert words is None or any(words in line for line in found["lines"]), found["lines"]
        if dtype == "fp32":
            assert found["batched"] and found["alone"], found
            assert found["native"] == (edit in ("nothing", "soft-capped logits") and bool(shutil.which("cc"))), found
