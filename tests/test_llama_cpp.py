"""Stock llama.cpp reads the GGUF files: the same tokens, the same text, and thoughts apart from answers.

Needs gguf and xllamacpp (requirements-extra.txt).
"""

import json
import random
import urllib.request

import pytest
import torch
from conftest import ROOT, make_chats, make_texts, write_jsonl
from test_evaluate import save_nano
from test_export import CONVERSATIONS, SHAPES, make_model

import export
import pretrain
import train_tokenizer
from common.generation import Decoder, Sampling, generate
from common.weights import load_model, save_weights
from Config import UserError
from formats import gguf, llama_cpp
from make_demo_data import World
from text.chat import encode_chat
from text.tokenizer import TextEncoder, load_tokenizer

pytestmark = pytest.mark.extra
GGUFReader = pytest.importorskip("gguf").GGUFReader
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(weights that know 60 texts by heart, so that few steps are near ties; their encoder; beginnings of 50 texts)."""
    folder = tmp_path_factory.mktemp("trained")
    texts = [text for text in World(3).other_texts(0.1) if 120 < len(text) < 300][:60]
    write_jsonl(folder / "t.jsonl", [{"text": text} for text in texts])
    train_tokenizer.main(["--data_path", str(folder / "t.jsonl"), "--tokenizer_path", str(folder / "tokenizer"),
                          "--vocab_size", "1200", "--single_hanzi"])
    pretrain.main(["--data_path", str(folder / "t.jsonl"), "--tokenizer_path", str(folder / "tokenizer"), "--out_dir",
                   str(folder), "--preset", "demo", "--max_seq_len", "256", "--batch_size", "8", "--max_steps", "200",
                   "--epochs", "200", "--device", "cpu"])
    encoder = TextEncoder.of(load_tokenizer(str(folder / "tokenizer")))
    return folder / "pretrain.pth", encoder, [[encoder.bos_id, *ids[:12]] for ids in encoder.encode(texts[:50])]


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer_dir):
    """(llama.cpp's server for distill weights that answer by a script, its address, our tokenizer). In the script a
    reply thinks "嗯" before it says "鳄🐊"."""
    folder = tmp_path_factory.mktemp("server")
    tokenizer = load_tokenizer(str(tokenizer_dir))
    encoder = TextEncoder.of(tokenizer)
    tags = encoder.tag_ids
    answer = [tags["<answer>"], *encoder.encode(["鳄🐊"])[0], tags["</answer>"]]
    thought = [*encoder.encode(["嗯"])[0], tags["</think>"]]
    path = save_nano(folder / "distill.pth", tokenizer, "distill", answer, thought)
    model, meta = load_model(path)
    with torch.no_grad():  # behind the thought comes the answer
        model.lm_head.weight[encoder.eos_id] -= model.model.embed_tokens.weight[thought[-1]]
        model.lm_head.weight[answer[0]] += model.model.embed_tokens.weight[thought[-1]]
    save_weights(path, model, meta | {"tokenizer": tokenizer.files})
    export.main(["--checkpoint", str(path), "--format", "gguf", "--quant", "f32", "--out", str(folder)])
    served = llama_cpp.open_server(folder / "distill-f32.gguf", 128)
    return served, served.listening_address, tokenizer


def post(address: str, path: str, body: dict) -> dict:
    """The answer of the server to a request."""
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))


def continued(served, prompt: list[int], n: int) -> list[int]:
    """n greedy tokens of llama.cpp behind a prompt; fewer if it stops."""
    reply = served.handle_completions(dict(prompt=prompt, max_tokens=n, temperature=0.0, logprobs=1,
                                           cache_prompt=False))
    return [token["id"] for token in reply["choices"][0]["logprobs"]["content"]]


@pytest.mark.parametrize("other", ["llama.cpp", "transformers"])
def test_the_greedy_text_of_trained_weights_is_the_same(trained, tmp_path, other):
    """64 tokens on 50 prompts, up to the first step whose two best logits lie within 0.01: then rounding decides."""
    path, encoder, prompts = trained
    model, _ = load_model(path)
    fmt = ["gguf", "--quant", "f32"] if other == "llama.cpp" else ["hf"]
    export.main(["--checkpoint", str(path), "--format", *fmt, "--out", str(tmp_path / "out")])
    if other == "llama.cpp":
        served = llama_cpp.open_server(tmp_path / "out" / "pretrain-f32.gguf", 128)
    else:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    decoder, compared = Decoder(model), []
    for prompt in prompts:
        ours = generate(decoder, [prompt], 64, Sampling(), {encoder.eos_id})[0].ids
        found = continued(served, prompt, 64) if other == "llama.cpp" else theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[0, len(prompt):].tolist()
        with torch.no_grad():
            best = model(torch.tensor([prompt + ours]))[0, len(prompt) - 1:].topk(2).values
        near = ((best[:, 0] - best[:, 1]) < 0.01).nonzero()
        n = int(near[0]) if len(near) else len(ours)
        assert found[:n] == ours[:n]
        compared.append(n)
    assert sum(n >= 32 for n in compared) >= 40, compared


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant", gguf.QUANTS)
def test_every_shape_in_every_precision(tmp_path, tokenizer, shape, quant):
    model = make_model(vocab_size=len(tokenizer), **SHAPES[shape])
    gguf.write(tmp_path / "x.gguf", model, quant, tokenizer.files, "SFT")
    gguf.check(tmp_path / "x.gguf", model, quant)
    fields = GGUFReader(tmp_path / "x.gguf").fields
    assert {name: fields[f"tokenizer.ggml.{name}"].contents() for name in (
        "model", "pre", "bos_token_id", "eos_token_id", "add_bos_token")} == {
            "model": "gpt2", "pre": "qwen2", "bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}
    assert llama_cpp.check(tmp_path / "x.gguf", model, quant) is not None
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(-1)
    with pytest.raises(UserError, match="llama.cpp computes other probabilities"):
        llama_cpp.check(tmp_path / "x.gguf", model, quant)
    with pytest.raises(UserError, match=r"blk\.1\.attn_q\.weight is not the model's"):
        gguf.check(tmp_path / "x.gguf", model, quant)


def test_rows_that_q8_0_cannot_hold_are_refused(tmp_path, tokenizer):
    model = make_model(vocab_size=len(tokenizer), hidden_dim=100)
    with pytest.raises(UserError, match="rows of 100 and 128 weights: each must be a multiple of 32; use f16"):
        gguf.write(tmp_path / "x.gguf", model, "q8_0", tokenizer.files, "SFT")


def test_the_ids_of_any_text_are_the_same(server):
    """10,000 lines of Chinese, English, code and emoji; every code point; a run of 100,000 letters."""
    _, address, tokenizer = server
    encoder, rng = TextEncoder.of(tokenizer), random.Random(7)

    def theirs(text: str) -> list[int]:
        return post(address, "/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]

    lines = [record["text"] for record in make_texts(11, 2000, 120)]
    lines += [message["content"] for record in make_chats(12, 700) for message in record["conversations"]][:2000]
    code = [line for path in sorted(ROOT.glob("*.py")) for line in path.read_text(encoding="utf-8").splitlines()]
    lines += rng.sample(list(filter(str.strip, code)), 2600)
    lines += ["".join(rng.choice(
        "😀🐊🌊👨‍👩‍👧🇨🇳é ñ\t①Ⅷ½…  \u3000ａ1２٣\u200b—“”'s'LL") for _ in range(rng.randint(1, 40)))
              for _ in range(3500)]
    # llama.cpp takes the tags for tokens in any text, also in a user's (docs/DEPLOY.md)
    lines = [line for line in lines if "think>" not in line and "answer>" not in line][:10_000]
    assert len(lines) == 10_000
    for text, ids in zip(lines, encoder.encode(lines), strict=True):
        assert theirs(text) == ids, repr(text)
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for begin in range(0, len(points), 4000):
        text = "，".join(points[begin:begin + 4000])
        assert theirs(text) == encoder.encode([text])[0], f"from U+{ord(points[begin]):04X}"
    special = post(address, "/tokenize", {"content": "你好", "add_special": True})["tokens"]
    assert special == encoder.encode(["你好"])[0]  # no <s> is added
    for text in ("a" * 100_000, " " * 5000, "1" * 5000, "\n" * 5000, "啊" * 20_000):
        assert theirs(text) == encoder.encode([text])[0]


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("thinking", [True, False])
def test_the_template_renders_the_same_text(server, number, thinking):
    _, address, tokenizer = server
    body = {"messages": CONVERSATIONS[number], "chat_template_kwargs": {"enable_thinking": thinking}}
    found = post(address, "/apply-template", body)["prompt"]
    assert found == tokenizer.decode(encode_chat(tokenizer, CONVERSATIONS[number], True, thinking)[0])


def test_the_server_shows_a_thought_apart_and_hides_the_tags(server):
    """With its own defaults; thinking is switched off by an argument of the template."""
    served, _, _ = server
    ask = dict(messages=[{"role": "user", "content": "你好"}], temperature=0.0, max_tokens=20)
    message = served.handle_chat_completions(ask)["choices"][0]["message"]
    assert message["reasoning_content"] == "嗯" and message["content"].strip() == "鳄🐊"
    off = served.handle_chat_completions(ask | {"chat_template_kwargs": {"enable_thinking": False}})
    message = off["choices"][0]["message"]
    assert not message.get("reasoning_content") and message["content"].strip() == "鳄🐊"
    again = served.handle_chat_completions(ask | {"messages": [
        *ask["messages"], {"role": "assistant", "content": "鳄🐊", "reasoning_content": "想"}, *ask["messages"]]})
    assert again["choices"][0]["message"]["content"].strip() == "鳄🐊"


def test_weights_that_do_not_think_have_a_plain_template(tmp_path, tokenizer_dir):
    """llama.cpp's server asks every template to think."""
    tokenizer = load_tokenizer(str(tokenizer_dir))
    path = save_nano(tmp_path / "SFT.pth", tokenizer, "SFT", TextEncoder.of(tokenizer).encode(["鳄🐊"])[0])
    model, meta = load_model(path)
    save_weights(path, model, meta | {"tokenizer": tokenizer.files})
    export.main(["--checkpoint", str(path), "--format", "gguf", "--quant", "f32", "--out", str(tmp_path)])
    served = llama_cpp.open_server(tmp_path / "SFT-f32.gguf", 128)
    for conversation in CONVERSATIONS[:2]:
        found = post(served.listening_address, "/apply-template", {"messages": conversation})["prompt"]
        assert found == tokenizer.decode(encode_chat(tokenizer, conversation, True)[0])
    message = served.handle_chat_completions(dict(messages=[{"role": "user", "content": "你好"}], temperature=0.0,
                                                  max_tokens=20))["choices"][0]["message"]
    assert message["content"] == "鳄🐊" and not message.get("reasoning_content")


def test_a_modelfile_of_ones_own_is_kept(tmp_path, tokenizer, capsys):
    path = save_nano(tmp_path / "SFT.pth", tokenizer, "SFT")
    model, meta = load_model(path)
    save_weights(path, model, meta | {"tokenizer": tokenizer.files})
    words = ["--checkpoint", str(path), "--format", "gguf", "--out", str(tmp_path), "--quant"]
    export.main([*words, "f16"])
    (tmp_path / "Modelfile").write_text("mine")
    export.main([*words, "q8_0"])
    assert (tmp_path / "Modelfile").read_text() == "mine" and "kept as it is" in capsys.readouterr().out
    export.main([*words, "q8_0", "--force"])
    assert "SFT-q8_0.gguf" in (tmp_path / "Modelfile").read_text()


def test_what_is_said_without_llama_cpp(tmp_path, tokenizer, capsys, monkeypatch):
    path = save_nano(tmp_path / "SFT.pth", tokenizer, "SFT")
    model, meta = load_model(path)
    save_weights(path, model, meta | {"tokenizer": tokenizer.files})
    monkeypatch.setattr(llama_cpp, "why_unavailable", lambda: "xllamacpp is not installed")
    words = ["--checkpoint", str(path), "--format", "gguf", "--quant", "f16,q8_0", "--out", str(tmp_path)]
    export.main(words)
    printed = capsys.readouterr().out
    assert printed.count("llama.cpp was not run: xllamacpp is not installed") == 2 and "Modelfile" in printed
    with pytest.raises(UserError, match="SFT-f16.gguf: already there; --force"):
        export.main(words)



def test_a_server_that_says_nothing_of_a_token_is_not_asked_forever(tmp_path, tokenizer, monkeypatch):
    """As where the likeliest token is a part of a character."""
    class Silent:
        asked = 0

        def handle_completions(self, body):
            Silent.asked += 1
            return {"choices": [{"logprobs": None}]}

    monkeypatch.setattr(llama_cpp, "open_server", lambda path, context: Silent())
    assert llama_cpp.check(tmp_path / "x.gguf", make_model(vocab_size=len(tokenizer)), "f32") is None
    assert Silent.asked == llama_cpp.PROMPTS
