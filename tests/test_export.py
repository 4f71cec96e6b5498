"""Exports: transformers loads them and computes the same, int8 decodes, and what cannot be held is refused."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import stage_argv
from faults import run
from test_edits import EDITS, copy_with
from test_evaluate import save_nano

import eval_model
import evaluate
import export
import SFT
from common import files
from common.generation import Decoder, Sampling, generate
from common.weights import load_model, load_weights, save_weights
from Config import LLMConfig, UserError
from fastpath import int8
from fastpath.native_decoder import NativeDecoder
from formats import gguf, hf, modelfile
from formats.tokenizer import exported, imported, template_of
from model import KVCache, WeakWater
from text.chat import CHAT_TEMPLATE, encode_chat
from text.content import Reading, RecordReader
from text.tokenizer import FILES, OurTokenizer, TextEncoder, tokenizer_from_files

SHAPES = {  # the architectures that other programs must hold
    "a Llama": {},
    "a Qwen3": {"qk_norm": True},
    "grouped, untied": {"n_heads": 4, "n_kv_heads": 2, "tie_embeddings": False},
    "wide heads": {"qk_norm": True, "head_dim": 96, "n_kv_heads": 1},
    "a Llama with wide heads": {"head_dim": 96, "n_kv_heads": 1},
}
CONVERSATIONS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "你是一个助手。"}, {"role": "user", "content": "3+5=?"},
     {"role": "assistant", "content": "3+5=8。"}, {"role": "user", "content": "再加2呢？"}],
    [{"role": "user", "content": "问"}, {"role": "assistant", "content": "<think>\n想\n</think>\n<answer>答</answer>"},
     {"role": "user", "content": "再问"}],
    [{"role": "user", "content": "问"}, {"role": "assistant", "content": "<think>\n\n</think>\n答"}, {
        "role": "user", "content": "再问"}],
    [{"role": "user", "content": "问"}, {"role": "assistant", "content": "没想完<think>\n想"},
     {"role": "user", "content": "再问 \n"}],
]


def make_model(**changes) -> WeakWater:
    """A model whose greedy replies do not repeat themselves soon."""
    torch.manual_seed(5)
    model = WeakWater(LLMConfig.preset("nano", **{"dim": 128, "n_heads": 2, "max_seq_len": 96} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1]**0.5 if parameter.ndim > 1
                            else 1 + 0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def weights(tmp_path, tokenizer):
    """Makes a weights file: weights(stage, **changes of the nano preset) → its path."""
    def make(stage="SFT", **changes):
        model, path = make_model(vocab_size=len(tokenizer), **changes), tmp_path / f"{stage}.pth"
        save_weights(path, model, {"stage": stage, "step": 9, "tokens": 1234,
                                   "val": {"loss": 1.5, "ppl": 4.4, "bpb": 1.2}, "tokenizer": tokenizer.files,
                                   "settings": {"data_path": "/home/me/secret.jsonl"},
                                   "tokenizer_sha256": TextEncoder.of(tokenizer).fingerprint})
        return path

    return make


def said(capsys, *argv) -> str:
    """What export.py prints."""
    export.main([str(word) for word in argv])
    return capsys.readouterr().out


def refused(*argv) -> str:
    """The message with which export.py refuses."""
    with pytest.raises(UserError) as error:
        export.main([str(word) for word in argv])
    return str(error.value)


# ---------------------------------------------------------------------------------------------
# hf


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_the_folder_and_computes_the_same(weights, tmp_path, capsys, shape):
    """Logits; greedy text of unequal prompts; and nothing needs trust_remote_code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, folder = weights(**SHAPES[shape]), tmp_path / "hf"
    printed = said(capsys, "--checkpoint", path, "--format", "hf", "--out", folder)
    name = "Qwen3ForCausalLM" if SHAPES[shape].get("qk_norm") else "LlamaForCausalLM"
    assert f"{folder}: {name}" in printed and "checked: " in printed
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == name and theirs.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours, _ = load_model(path)
    tokens = torch.randint(0, ours.config.vocab_size, (3, 50))
    with torch.no_grad():
        difference = (theirs(tokens).logits - ours(tokens)).abs().max() / ours(tokens).abs().max()
    assert difference <= 1e-5
    ids = theirs.generation_config
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    decoder, compared = Decoder(ours), 0
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        prompt = torch.randint(3, ours.config.vocab_size, (1, 2 + 3 * number), generator=generator)
        (mine,) = generate(decoder, prompt.tolist(), 40, Sampling(), {2})
        other = theirs.generate(prompt, do_sample=False, max_new_tokens=40)[0, prompt.shape[1]:].tolist()
        other = other[:other.index(2)] if 2 in other else other
        assert mine.ids == other
        compared += len(set(mine.ids))
    assert compared > 60, "replies that repeat a token prove little"


def test_an_edited_network_is_refused_by_name(weights):
    model, _ = load_model(weights())
    model.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(128))
    with pytest.raises(UserError, match=r"LlamaForCausalLM has no model\.layers\.1\.self_attn\.q_proj\.bias: model.py"):
        hf.to_transformers(model)
    model, _ = load_model(weights())
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(F.gelu(mlp.gate_proj(x)) * mlp.up_proj(x))
    with pytest.raises(UserError, match=r"other logits: the first is that of entry 0 after token 1, .* instead of"):
        hf.logits_error(model, hf.to_transformers(model))
    model, _ = load_model(weights())
    del model.model.layers[0].post_attention_layernorm
    with pytest.raises(UserError, match=r"needs model\.layers\.0\.post_attention_layernorm\.weight"):
        hf.to_transformers(model)


def test_a_difference_late_in_the_context_is_seen(weights):
    """And NaN is a difference."""
    model, _ = load_model(weights())
    theirs = hf.to_transformers(model)
    forward = type(model).forward
    for wrong in (1.0, float("nan")):
        def late(tokens, wrong=wrong):
            logits = forward(model, tokens).detach()
            logits[0, 70, 5] += wrong
            return logits

        with pytest.raises(UserError, match=r"entry 5 after token 71"):
            model.forward = late
            hf.logits_error(model, theirs)


def test_ours_to_hf_and_back_goes_on_training(weights, tmp_path, tokenizer, data_dir, capsys):
    """The weights are equal bit by bit, the tokenizer is the same, and a stage starts from the file."""
    path, folder, back = weights(), tmp_path / "hf", tmp_path / "back.pth"
    said(capsys, "--checkpoint", path, "--format", "hf", "--out", folder)
    assert str(back) in said(capsys, "--from_hf", folder, "--out", back)
    (state, config, meta), (state2, config2, meta2) = load_weights(path), load_weights(back)
    assert config == config2 and state.keys() == state2.keys()
    assert all(torch.equal(state[name], state2[name]) for name in state)
    assert meta2["tokenizer_sha256"] == meta["tokenizer_sha256"] and meta2["stage"] == "SFT"
    assert meta2["weights_sha256"] == meta["weights_sha256"]
    restored = tokenizer_from_files(meta2["tokenizer"], "it")
    assert isinstance(restored, OurTokenizer) and TextEncoder.of(restored).fingerprint == meta["tokenizer_sha256"]
    assert json.loads(meta2["tokenizer"][FILES[1]])["chat_template"] == CHAT_TEMPLATE
    argv = stage_argv(data_dir / "sft.jsonl", "", tmp_path / "out", init_from=back, max_seq_len=64, max_steps=1)
    argv = [word for word in argv if word not in ("--tokenizer_path", "")]
    SFT.main(argv)
    assert load_weights(tmp_path / "out" / "SFT.pth")[2]["tokenizer_sha256"] == meta["tokenizer_sha256"]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_folder_of_transformers_own(tmp_path, tokenizer_dir, capsys, kind):
    """Defaults of their class that differ from ours (Qwen3's heads are 128 wide) are taken over."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=900, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=200, max_position_embeddings=77, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    torch.manual_seed(1)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "theirs")
    for name in FILES:
        shutil.copy(tokenizer_dir / name, tmp_path / "theirs")
    said(capsys, "--from_hf", tmp_path / "theirs", "--out", tmp_path / "x.pth")
    model, meta = load_model(tmp_path / "x.pth")
    assert model.config.rope_theta == 5e5 and model.config.max_seq_len == 77 and meta["stage"] == "imported"
    assert model.config.head_dim == (128 if kind == "Qwen3" else 24) and model.config.qk_norm == (kind == "Qwen3")


@pytest.mark.parametrize("field, value, message", [
    ("model_type", "gpt2", "model_type 'gpt2': only llama and qwen3"), ("hidden_act", "gelu", "hidden_act is 'gelu'"),
    ("attention_bias", True, "attention_bias is True: model.py has only False"), (
        "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "rope_type is 'linear'"),
    ("tie_word_embeddings", "?", "tie_word_embeddings"), (None, None, "not a folder of transformers")])
def test_what_our_config_cannot_say_is_refused(weights, tmp_path, capsys, field, value, message):
    folder = tmp_path / "hf"
    said(capsys, "--checkpoint", weights(), "--format", "hf", "--out", folder)
    config = folder / "config.json"
    text = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(text | {field: value}) if field else "{", encoding="utf-8")
    found = refused("--from_hf", folder, "--out", tmp_path / "x.pth")
    assert message in found and str(folder) in found and not (tmp_path / "x.pth").exists()


def test_a_folder_without_weights_or_tokenizer(weights, tmp_path, capsys):
    folder = tmp_path / "hf"
    said(capsys, "--checkpoint", weights(), "--format", "hf", "--out", folder)
    (folder / FILES[0]).rename(tmp_path / "moved")
    assert FILES[0] in refused("--from_hf", folder, "--out", tmp_path / "x.pth")
    (tmp_path / "moved").rename(folder / FILES[0])
    (folder / "model.safetensors").rename(tmp_path / "moved")
    assert str(folder) in refused("--from_hf", folder, "--out", tmp_path / "x.pth")
    (tmp_path / "moved").rename(folder / "model.safetensors")
    for name, broken in ((FILES[0], "{"), (FILES[1], "[]")):
        whole = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(broken)
        assert str(folder) in refused("--from_hf", folder, "--out", tmp_path / "x.pth")
        (folder / name).write_text(whole, encoding="utf-8")
    assert "config.json" in refused("--from_hf", tmp_path / "nowhere", "--out", tmp_path / "x.pth")
    assert "ends in .pth" in refused("--from_hf", folder, "--out", tmp_path / "x")


@pytest.mark.parametrize("change, message", [
    ("lacks", r"LlamaForCausalLM lacks model\.layers\.1\.self_attn\.q_proj\.weight"),
    ("more", r"has no place for model\.layers\.0\.self_attn\.q_proj\.bias"), ("NaN", "holds NaN or infinite numbers")])
def test_a_folder_with_other_tensors(weights, tmp_path, capsys, change, message):
    """transformers itself would fill a missing tensor with random numbers."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "hf"
    said(capsys, "--checkpoint", weights(), "--format", "hf", "--out", folder)
    tensors = load_file(folder / "model.safetensors")
    if change == "lacks":
        del tensors["model.layers.1.self_attn.q_proj.weight"]
    elif change == "more":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
    else:
        tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert re.search(message, refused("--from_hf", folder, "--out", tmp_path / "x.pth"))


@pytest.mark.parametrize("metadata", ["text", [1], {"step": "x", "stage": "../up"}, {"stage": 3}, None])
def test_metadata_of_others_is_not_trusted(weights, tmp_path, capsys, metadata):
    folder = tmp_path / "hf"
    said(capsys, "--checkpoint", weights(), "--format", "hf", "--out", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"weakwater": metadata}), encoding="utf-8")
    said(capsys, "--from_hf", folder, "--out", tmp_path / "x.pth")
    meta = load_weights(tmp_path / "x.pth")[2]
    assert meta["stage"] == "imported" and meta["step"] == 0
    said(capsys, "--checkpoint", tmp_path / "x.pth", "--format", "int8", "--out", tmp_path / "small")
    assert (tmp_path / "small" / "imported-int8.pth").exists()


def test_a_folder_that_transformers_saved_again(weights, tmp_path, tokenizer, capsys):
    """As after fine-tuning elsewhere: the tokenizer is ours again, and the weights can be exported in every format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said(capsys, "--checkpoint", weights(), "--format", "hf", "--out", tmp_path / "hf")
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    said(capsys, "--from_hf", tmp_path / "again", "--out", tmp_path / "x.pth")
    files = load_weights(tmp_path / "x.pth")[2]["tokenizer"]
    assert OurTokenizer.is_ours(files) and json.loads(files[FILES[1]])["chat_template"] == CHAT_TEMPLATE
    assert TextEncoder.of(tokenizer_from_files(files, "it")).fingerprint == TextEncoder.of(tokenizer).fingerprint


def test_what_the_card_and_the_config_say(weights, tmp_path, capsys):
    """Everything that is known, and no path of the machine."""
    said(capsys, "--checkpoint", weights("distill"), "--format", "hf", "--out", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "license: other" in card and "1.2000" in card and "1,234" in card and "hf upload" in card
    assert "enable_thinking" in card and "`distill.pth`" in card
    for file in ("README.md", "config.json", *FILES):
        assert "secret" not in (tmp_path / "hf" / file).read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("FOLDER", str(tmp_path / "hf"))
    done = subprocess.run([sys.executable, "-c", code.replace("=200", "=3")], capture_output=True, text=True)
    assert done.returncode == 0 and "你好" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------
# the tokenizer of an export


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("stage, thinking", [("SFT", None), ("distill", True), ("distill", False)])
def test_the_template_gives_the_ids_of_training(tokenizer, tmp_path, stage, thinking, number):
    """With and without a reply to come. Weights that think do so where enable_thinking is not given."""
    from transformers import AutoTokenizer

    for name, text in exported(tokenizer.files, stage).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    conversation = CONVERSATIONS[number]
    reply = {"role": "assistant", "content": "<think>\n想\n</think>\n<answer>八</answer>"}
    for messages, prompt in ((conversation, True), ([*conversation, reply], False), (
            [*conversation, {"role": "assistant", "content": "八"}], False)):
        how = {} if thinking in (None, True) else {"enable_thinking": False}
        found = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False, **how)
        assert found == encode_chat(tokenizer, messages, prompt, thinking)[0]
        if stage == "SFT":  # some servers set it for every model
            assert found == theirs.apply_chat_template(messages, add_generation_prompt=prompt, enable_thinking=True,
                                                       return_dict=False)


def test_a_thought_beside_the_content(tokenizer, tmp_path):
    """reasoning_content of the last reply is its thought; that of an earlier one is left out, as in training."""
    from transformers import AutoTokenizer

    for name, text in exported(tokenizer.files, "distill").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    question = {"role": "user", "content": "3+5=?"}
    for content in ("八", "<answer>八</answer>"):
        apart = {"role": "assistant", "content": content, "reasoning_content": "想"}
        reader = RecordReader(Reading("chat", thoughts=True, keep_malformed_thoughts=True), [])
        (document,) = reader.documents({"conversations": [question, apart]})
        trained = document["conversations"]
        for messages, same, prompt in (([question, apart], trained, False),
                                       ([question, apart, question], [*trained, question], True)):
            assert theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False) == encode_chat(
            tokenizer, same, prompt, True)[0]


def test_other_programs_hide_the_answers_tags_and_show_a_thought(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    for name, text in exported(tokenizer.files, "distill").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    no_content = {"role": "assistant", "content": None, "reasoning_content": "想"}  # as some clients send it
    AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([*CONVERSATIONS[0], no_content, *CONVERSATIONS[0]])
    reply = [{"role": "assistant", "content": "<think>\n想\n</think>\n<answer>八</answer>"}]
    ids, _ = encode_chat(tokenizer, reply, thinking=True)
    assert AutoTokenizer.from_pretrained(tmp_path).decode(ids, skip_special_tokens=True) == (
        "assistant\n<think>\n想\n</think>\n八\n")
    assert "<answer>" in tokenizer.decode(ids, skip_special_tokens=True)
    files = imported(exported(tokenizer.files, "distill"), TextEncoder.of(tokenizer).fingerprint)
    assert {name: json.loads(files[name]) for name in FILES} == {
        name: json.loads(tokenizer.files[name]) for name in FILES}


def test_a_foreign_tokenizers_template_has_its_own_control_tokens():
    template = template_of("distill", "<|im_start|>", "<|im_end|>")
    assert "<s>" not in template and "</s>" not in template
    assert "<|im_start|>assistant" in template and "<|im_end|>" in template and "<think>" in template


# ---------------------------------------------------------------------------------------------
# int8


def test_int8_keeps_what_it_has_rounded():
    """Rows of any size; zeros; and rounding again changes nothing."""
    matrix = torch.randn(40, 96) * 10.0 ** torch.randint(-30, 4, (40, 1))
    matrix[3] = 0
    numbers, scale = int8.to_int8(matrix)
    restored = int8.from_int8(numbers, scale)
    assert ((restored - matrix).abs() <= 0.51 * scale[:, None]).all() and numbers.abs().max() == 127
    again, scale_again = int8.to_int8(restored)
    assert torch.equal(again, numbers) and torch.allclose(scale, scale_again, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_decoded_in_int8(weights, tmp_path, capsys, shape):
    """decode.c gives the greedy text of the restored weights."""
    printed = said(capsys, "--checkpoint", weights(**SHAPES[shape]), "--format", "int8", "--out", tmp_path)
    assert "it holds the rounded weights" in printed and "from the original's" in printed
    plain, native = Decoder(load_model(tmp_path / "SFT-int8.pth")[0], plain=True), Decoder(
        load_model(tmp_path / "SFT-int8.pth")[0], int8=True)
    assert (native.native is not None) == bool(shutil.which("cc"))
    for prompt in ([5, 6, 7], [100, 200, 300, 400, 9]):
        assert generate(native, [prompt], 40, Sampling(), ()) == generate(plain, [prompt], 40, Sampling(), ())


def test_int8_of_odd_widths_is_restored(weights, tmp_path, capsys):
    printed = said(capsys, "--checkpoint", weights(hidden_dim=100), "--format", "int8", "--out", tmp_path)
    assert "restored to float32, without decode.c in int8: decode.c needs widths that are multiples of 64" in printed


def test_numbers_that_are_not_finite_stay_so_in_int8(weights):
    if not shutil.which("cc"):
        pytest.skip("decode.c cannot be compiled")
    model, _ = load_model(weights())
    native = NativeDecoder(model, torch.int8)
    cache = KVCache(model.config, 1, 8, torch.device("cpu"), torch.float32)
    assert native([5], [0], [0], cache.keys, cache.values).isfinite().all()
    native.tensors[0][5, 3] = float("nan")  # the embedding
    assert native([5], [0], [0], cache.keys, cache.values).isnan().all()


def test_int8_is_small_and_close(weights, tmp_path, capsys, data_dir):
    """A quarter of the size (tied matrices once), bits per byte within 1 %; evaluate.py says what it computes with."""
    path = weights(n_layers=3, hidden_dim=384)
    printed = said(capsys, "--checkpoint", path, "--format", "int8", "--out", tmp_path / "small")
    small = tmp_path / "small" / "SFT-int8.pth"
    assert f"{small}: " in printed
    assert ("decode.c in int8 differs from model.py by" in printed) == bool(shutil.which("cc"))
    kept = len(json.dumps(load_weights(path)[2]["tokenizer"]))
    assert small.stat().st_size - kept < 0.27 * (path.stat().st_size - kept)
    scores = []
    for file in (path, small):
        evaluate.main(["--checkpoint", str(file), "--data_path", str(data_dir / "sft.jsonl"), "--dtype", "fp32",
                       "--device", "cpu", "--out_dir", str(tmp_path / file.stem)])
        *lines, last = capsys.readouterr().out.splitlines()
        scores.append(json.loads(last)["bpb"])
        assert any("weights in int8, restored to fp32 for prompts" in line for line in lines) == (file == small)
    assert abs(scores[1] / scores[0] - 1) < 0.01


def test_a_damaged_int8_file_and_one_that_fails_its_check(weights, tmp_path, capsys, monkeypatch):
    """Nothing is left of an export that fails; the old file stays."""
    path, small = weights(), tmp_path / "out" / "SFT-int8.pth"
    words = ("--checkpoint", path, "--format", "int8", "--out", small.parent)
    said(capsys, *words)
    content = torch.load(small)
    for scales in ({}, {name: scale[1:] for name, scale in content["scales"].items()}, None):
        torch.save(content | {"scales": scales}, tmp_path / "x.pth")
        with pytest.raises(UserError, match="damaged int8 weights"):
            load_weights(tmp_path / "x.pth")
    before = small.read_bytes()
    monkeypatch.setattr(export, "round_weights", lambda model: None)
    assert refused(*words, "--force") == f"{small}: loaded again, it does not hold the rounded weights"
    assert small.read_bytes() == before and [file.name for file in small.parent.iterdir()] == [small.name]


def test_a_parameter_may_be_called_a_scale(tmp_path):
    """In an edited model.py."""
    state = {"a.weight": torch.randn(4, 64), "a.weight_scale": torch.ones(4), "q_scale": torch.ones(1)}
    back = int8.state_from_int8(*int8.state_to_int8(state))
    assert back.keys() == state.keys() and torch.equal(back["q_scale"], state["q_scale"])


def test_int8_without_a_compiler_is_restored_and_said_so(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastpath.native_decoder.library", lambda: (None, "no C compiler was found"))
    printed = said(capsys, "--checkpoint", weights(), "--format", "int8", "--out", tmp_path)
    assert "restored to float32" in printed and "no C compiler" in printed
    eval_model.main(["--checkpoint", str(tmp_path / "SFT-int8.pth"), "--prompt", "你好", "--max_new_tokens", "3",
                     "--dtype", "fp32"])
    assert "with the int8 weights restored to fp32: decode.c was not compiled" in capsys.readouterr().err


def test_int8_decoding_goes_through_the_check_of_every_replacement(weights, monkeypatch):
    if not shutil.which("cc"):
        pytest.skip("decode.c cannot be compiled")
    model, _ = load_model(weights())
    monkeypatch.setattr("fastpath.native_decoder.to_int8", lambda matrix: (
        int8.to_int8(matrix)[0], int8.to_int8(matrix)[1] * 1.01))
    assert "decode.c differs from model.py" in Decoder(model, int8=True).native_reason


def test_int8_is_for_decoding_alone(weights, tmp_path, capsys, data_dir):
    said(capsys, "--checkpoint", weights(), "--format", "int8", "--out", tmp_path)
    small = tmp_path / "SFT-int8.pth"
    assert "rounded to int8" in refused("--checkpoint", small, "--format", "hf", "--out", tmp_path / "hf")
    with pytest.raises(UserError, match="rounded to int8, to decode with; take the weights that it was exported from"):
        SFT.main(["--data_path", str(data_dir / "sft.jsonl"), "--init_from", str(small), "--out_dir",
                  str(tmp_path / "out")])


def test_an_int8_chat_says_what_computes(tmp_path, tokenizer, capsys):
    """Scripted weights answer the same in int8."""
    reply = TextEncoder.of(tokenizer).encode(["鳄🐊"])[0]
    path = save_nano(tmp_path / "SFT.pth", tokenizer, "SFT", reply)
    model, meta = load_model(path)
    save_weights(path, model, meta | {"tokenizer": tokenizer.files})
    said(capsys, "--checkpoint", path, "--format", "int8", "--out", tmp_path)
    eval_model.main(["--checkpoint", str(tmp_path / "SFT-int8.pth"), "--prompt", "你好", "--temperature", "0"])
    out, err = capsys.readouterr()
    assert out.strip() == "鳄🐊" and ("decode.c in int8" in err or not shutil.which("cc"))


# ---------------------------------------------------------------------------------------------
# gguf, as far as it goes without the package (test_llama_cpp.py goes further)


def test_the_table_of_names_covers_the_network():
    for changes in SHAPES.values():
        names = [gguf.their_name(name) for name in make_model(vocab_size=50, **changes).state_dict()]
        assert len(set(names)) == len(names) and all(name.endswith(".weight") for name in names)
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.extra.weight", "head.weight"):
        with pytest.raises(UserError, match=f"llama.cpp has no {re.escape(name)}: model.py was edited"):
            gguf.their_name(name)


def test_rows_are_rotated_in_pairs():
    """A head's dimensions i and i + D/2 become 2i and 2i + 1."""
    heads, D = 3, 8
    matrix = torch.arange(heads * D).float()[:, None]
    assert gguf.rotated_in_pairs(matrix, heads)[D:2 * D, 0].tolist() == [8, 12, 9, 13, 10, 14, 11, 15]


def test_a_modelfile_names_its_file_and_stops():
    for stage in ("pretrain", "SFT", "distill"):
        text = modelfile.modelfile("x-q8_0.gguf", stage, 1024)
        assert text.startswith("FROM ./x-q8_0.gguf\nTEMPLATE ") and 'PARAMETER stop "</s>"' in text
        assert ("<think>" in text) == (stage == "distill")
        assert text.count("{{") == text.count("}}") and text.count('"""') == 2


# ---------------------------------------------------------------------------------------------
# files and flags


@pytest.mark.parametrize("fmt", ["hf", "int8"])
def test_nothing_is_overwritten_without_force(weights, tmp_path, capsys, fmt):
    path, out = weights(), tmp_path / "out"
    words = ("--checkpoint", path, "--format", fmt, "--out", out)
    said(capsys, *words)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert "--force replaces it" in refused(*words)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    said(capsys, *words, "--force")
    assert {file.name for file in out.iterdir()} == {file.name for file in before}
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_force_does_not_delete_what_is_no_export(weights, tmp_path, capsys, monkeypatch):
    """A folder of something else, another program's model, an export with a file beside it, a file, the current
    folder. A link to an export stays a link; an empty folder is filled."""
    path = weights()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("ten years")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name, reason in (("thesis", "it also holds chapter.txt"), ("other", "export.py did not write it"),
                         ("file", "a file; name a folder")):
        for force in ([], ["--force"]):
            assert reason in refused("--checkpoint", path, "--format", "hf", "--out", tmp_path / name, *force)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "ten years"
    (tmp_path / "hf").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    for words in ([], ["--force"]):
        said(capsys, "--checkpoint", path, "--format", "hf", "--out", tmp_path / "link", *words)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "hf" / "model.safetensors").exists()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    words = ("--checkpoint", path, "--format", "hf", "--force", "--out")
    assert "it also holds notes.txt" in refused(*words, tmp_path / "hf")
    monkeypatch.chdir(tmp_path / "hf")
    assert "the current folder is in it" in refused(*words, ".")
    assert not list(tmp_path.glob(".*"))


def test_an_export_that_fails_leaves_the_old_one(weights, tmp_path, capsys, monkeypatch):
    path, out = weights(), tmp_path / "out"
    words = ("--checkpoint", path, "--format", "hf", "--out", out)
    said(capsys, *words)
    before = (out / "model.safetensors").read_bytes()

    def broken(folder, model):
        raise UserError("no")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "check", broken)
        assert refused(*words, "--force") == "no"
    assert (out / "model.safetensors").read_bytes() == before and not list(tmp_path.glob(".*"))
    renamed = files.rename
    with monkeypatch.context() as patch:  # the second of the two renames fails
        patch.setattr(files, "rename", lambda source, target, over=True: renamed(source, target, over) if (
            target != out or ".old." in str(source)) else (_ for _ in ()).throw(OSError("no")))
        assert "cannot save" in refused(*words, "--force")
    assert (out / "model.safetensors").read_bytes() == before and not list(tmp_path.glob(".*"))
    with monkeypatch.context() as patch:  # safetensors has its own error for a full disk
        patch.setattr("transformers.modeling_utils.PreTrainedModel.save_pretrained",
                      lambda model, folder: (_ for _ in ()).throw(Exception("I/O error: no space left")))
        assert "cannot save" in refused(*words, "--force")


def test_a_tokenizer_larger_than_the_weights_is_refused(weights, tmp_path):
    model, meta = load_model(weights())
    save_weights(tmp_path / "small.pth", make_model(vocab_size=100), meta)
    assert "entries" in refused("--checkpoint", tmp_path / "small.pth", "--format", "int8", "--out", tmp_path / "out")


@pytest.mark.parametrize("words, message", [
    (["--model_mode", "1", "--out", "x"], "--format: say what to write"),
    (["--model_mode", "1", "--format", "hf", "--quant", "f16", "--out", "x"], "--quant: only for --format gguf"),
    (["--model_mode", "1", "--format", "gguf", "--quant", "q4_0", "--out", "x"], "--quant q4_0: not one of f32, f16"),
    (["--from_hf", "y", "--format", "hf", "--out", "x"], "--from_hf makes a weights file"),
    (["--format", "hf", "--out", "x"], "one of the arguments --model_mode --checkpoint --from_hf is required"),
    (["--model_mode", "1", "--format", "hf"], "--out"),
    (["--from_hf", "y", "--out", "x", "--tokenizer_path", "z"], "the tokenizer in the folder"),
    (["--checkpoint", "y", "--format", "hf", "--out", "x", "--out_dir", "z"], "only with --model_mode"),
    (["--model_mode", "1", "--format", "hf", "--out", "x", "--out_dir", "nowhere"], "python SFT.py makes it"),
])
def test_flags_that_do_not_go_together(words, message):
    ended = run("export.py", words)
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1, ended


@pytest.mark.extra
@pytest.mark.parametrize("edit", ["GELU for SiLU", "another norm", "RoPE with neighbours", "a bias", "another width",
                                  "the norm after the branch", "nothing"])
def test_an_edit_of_model_py_is_exported_only_where_others_can_hold_it(tmp_path, tokenizer, edit):
    copy_with(tmp_path, EDITS[edit][:2])
    code = f"""
import torch
from common.weights import save_weights
from Config import LLMConfig
from model import WeakWater
from text.tokenizer import load_tokenizer
torch.manual_seed(0)
model = WeakWater(LLMConfig.preset("nano", vocab_size={len(tokenizer)}, dim=128))
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.5)
save_weights("x.pth", model, {{"stage": "SFT", "tokenizer": {tokenizer.files!r}}})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
    for fmt in ("hf", "int8", *(["gguf"] if importlib.util.find_spec("gguf") else [])):
        done = subprocess.run([sys.executable, "export.py", "--checkpoint", "x.pth", "--format", fmt, "--out", fmt],
                              cwd=tmp_path, capture_output=True, text=True)
        allowed = fmt == "int8" or edit == "nothing"
        assert (done.returncode == 0) == allowed, (fmt, done)
        assert allowed or "model.py was edited" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert (tmp_path / fmt).exists() == allowed
        assert ("restored to float32" in done.stdout) == (fmt == "int8" and edit != "nothing")


