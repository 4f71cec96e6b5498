"""fastpath: replacements are used where they agree with model.py, and rejected if a single constant is wrong."""

import copy
import inspect
import linecache
import re
import shutil
import textwrap
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpath
import model as network
from common import runtime
from common.generation import Decoder, Sampling, generate
from Config import LLMConfig
from fastpath import decoding, kernels, known, training
from fastpath.native_decoder import NativeDecoder
from fastpath.replace import replace
from fastpath.twin import Twin, make_twin, small_copy, twin_config
from model import Block, RMSNorm, SwiGLU, WeakWater

CPU = torch.device("cpu")
has_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
DTYPES = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not has_compiler, reason="no C compiler"))]


def reason_against(model: WeakWater) -> str | None:
    """The reason why no twin can represent a model."""
    return make_twin(model, CPU, torch.float32)[1]


def nano(**changes) -> WeakWater:
    return WeakWater(LLMConfig.preset("nano", **{"vocab_size": 331, "max_seq_len": 256} | changes))


@pytest.mark.parametrize("preset", ["nano", "demo", "weakwater-5m", "weakwater-30m", "weakwater-30m-gqa"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_parts_of_the_presets_are_accelerated(preset, dtype):
    """Also in a fresh model, whose output projections are zero."""
    model = WeakWater(LLMConfig.preset(preset))
    model.zero_init_residual()
    lines = fastpath.accelerate(model, CPU, dtype, inference=True)
    assert len(lines) == 1 and lines[0].startswith("faster than model.py"), lines
    assert all(f"{slot} (" in lines[0] for slot in fastpath.REPLACEMENTS)
    assert ("kernels.c" in lines[0]) == (dtype == "bf16")


def test_accelerate_keeps_the_random_state_and_the_weights():
    model = nano()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    fastpath.accelerate(model, CPU, "fp32", inference=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.model.layers[0].self_attn._parameters, "no parameter is registered"


def test_restore_removes_all_replacements():
    model = nano()
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    fastpath.accelerate(model, CPU, "fp32", inference=True)
    assert "forward" in vars(model.model.layers[0].mlp)
    fastpath.restore(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names


def test_a_copy_computes_with_its_own_weights():
    model = nano()
    fastpath.accelerate(model, CPU, "fp32")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    tokens = torch.randint(0, 331, (1, 9))
    assert twin(tokens, lengths=[4, 5]).abs().max() == 0 < model(tokens, lengths=[4, 5]).abs().max()


def test_another_dtype_runs_the_code_of_model_py(monkeypatch):
    """A replacement checked in float32 is not used in bf16 or float64."""
    model = nano()
    fastpath.accelerate(model, CPU, "fp32")
    used = []
    monkeypatch.setattr(training.GatedSiLU, "forward", staticmethod(lambda ctx, x: used.append(x) or x.chunk(2, -1)[0]))
    model.double()(torch.zeros(1, 4, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        model.float()(torch.zeros(1, 4, dtype=torch.long))
    assert not used
    model(torch.zeros(1, 4, dtype=torch.long))
    assert len(used) == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["nano", "weakwater-30m", "weakwater-30m-gqa"])
def test_the_check_is_quick(preset, dtype):
    """It takes at most 0.3 s on two idle cores. The limit is ten times that, since other tests may run."""
    import time

    model = WeakWater(LLMConfig.preset(preset))
    fastpath.accelerate(model, CPU, dtype)
    begin = time.perf_counter()
    fastpath.accelerate(model, CPU, dtype)
    assert time.perf_counter() - begin < 3


def test_the_twin_is_small_and_similar():
    for preset in ("weakwater-30m", "weakwater-30m-gqa"):
        config = LLMConfig.preset(preset)
        small = twin_config(config)
        assert small.head_dim == config.head_dim and small.qk_norm == config.qk_norm
        assert small.n_heads // small.n_kv_heads == config.n_heads // config.n_kv_heads
        assert small.n_layers == 2 and sum(WeakWater(small).num_parameters().values()) < 4e6


# ---------------------------------------------------------------------------------------------
# faults in a replacement


def changed(function, old: str, new: str):
    """The function with one part of its source replaced."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) >= 1, f"{old!r} is not in {function}"
    space = dict(inspect.unwrap(function).__globals__)
    exec(compile(source.replace(old, new, 1), "<changed>", "exec"), space)  # noqa: S102
    return space[function.__name__]


FAULTS = {  # name: (class or module, attribute, part of its source, replacement text, dtype)
    "norm, eps": (training.RMSNormFunction, "forward", "keepdim=True) + eps)", "keepdim=True) + 10 * eps)", "fp32"),
    "norm, gradient of x": (training.RMSNormFunction, "backward", "value=-1)", "value=1)", "fp32"),
    "norm, gradient of the scale": (training.RMSNormFunction, "backward", "grad_times_unit.flatten(0, -2).sum(0)",
                                    "1.1 * grad_times_unit.flatten(0, -2).sum(0)", "fp32"),
    "swiglu": (training.GatedSiLU, "forward", "F.silu(gate) * up", "F.gelu(gate) * up", "fp32"),
    "swiglu, gradient": (training.GatedSiLU, "backward", "grad * F.silu(gate)", "-grad * F.silu(gate)", "fp32"),
    "attention, scale": (training, "causal_attention", "is_causal=True,", "is_causal=True, scale=0.2,", "fp32"),
    "attention, order": (training.Scatter, "forward", "return x[unpadded_index]", "return x[unpadded_index.flip(0)]",
                         "fp32"),
    "attention, gradient": (training.Gather, "backward", "return grad[", "return 0.9 * grad[", "fp32"),
    "loss": (training.LinearCrossEntropy, "forward", "* loss_weight_N1).sum()", "* loss_weight_N1).sum() * 1.001",
             "fp32"),
    "loss, gradient of hidden": (training.LinearCrossEntropy, "backward", "grad_hidden * grad_total",
                                 "grad_hidden * 1.01 * grad_total", "fp32"),
    "loss, gradient of the head": (training.LinearCrossEntropy, "backward", "grad_weight * grad_total",
                                   "-grad_weight * grad_total", "fp32"),
    "C norm, eps": (kernels.RMSNormFunction, "forward", "weight.float(), eps, len(r)",
                    "weight.float(), 10 * eps, len(r)", "bf16"),
    "C norm, gradient": (kernels.RMSNormFunction, "backward", "return grad_x,", "return 1.2 * grad_x,", "bf16"),
    "C swiglu, gradient": (kernels.GatedSiLU, "backward", "return grad", "return -grad", "bf16"),
    "C attention, scale": (kernels.PackedAttention, "forward", "begin, G, D**-0.5)", "begin, G, 1.2 * D**-0.5)",
                           "bf16"),
    "C attention, gradient's scale": (kernels.PackedAttention, "backward", "begin, G, D**-0.5)",
                                      "begin, G, -D**-0.5)", "bf16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_constant_is_rejected(monkeypatch, fault):
    """A log line names the slot and the error."""
    owner, name, old, new, dtype = FAULTS[fault]
    if dtype == "bf16" and not has_compiler:
        pytest.skip("no C compiler")
    wrong = changed(getattr(owner, name), old, new)
    if isinstance(owner, type):
        source = owner.__dict__[name]
        while isinstance(wrong, staticmethod):
            wrong = wrong.__func__
        monkeypatch.setattr(owner, name, staticmethod(wrong) if isinstance(source, staticmethod) else wrong)
    else:
        monkeypatch.setattr(owner, name, wrong)
    model = nano(n_heads=2, n_kv_heads=1)
    lines = fastpath.accelerate(model, CPU, dtype)
    slot = fault.removeprefix("C ").split(",")[0].replace("swiglu", "mlp")
    assert any(re.match(rf"{slot}: .* differs from model.py by [\d.einf-]+, more than", line) for line in lines), lines


@pytest.mark.parametrize("function, old, new", [
    (decoding.attention_cached, "* sin)", "* -sin)"), (decoding.attention_cached, "cache.mask(T)", "~cache.mask(T)"),
    (decoding.swiglu_packed, "F.silu(gate)", "F.relu(gate)")])
def test_a_wrong_constant_in_decoding_is_rejected(monkeypatch, function, old, new):
    monkeypatch.setattr(decoding, function.__name__, changed(function, old, new))
    model = nano()
    lines = fastpath.accelerate(model, CPU, "fp32", inference=True)
    assert any(line.startswith("decoding: ") and "not used" in line for line in lines), lines
    assert not hasattr(model.lm_head, "matmul")


@pytest.mark.skipif(not has_compiler, reason="no C compiler")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("old, new", [("[dtype], c.norm_eps", "[dtype], 30 * c.norm_eps"),
                                      ("address(decoder.rotary.sin_SD", "address(-decoder.rotary.sin_SD"),
                                      ("attention.v_proj, (keys", "attention.k_proj, (keys")])
def test_a_wrong_c_decoder_is_rejected(monkeypatch, dtype, old, new):
    assert Decoder(nano(), dtype).native_reason is None
    monkeypatch.setattr(NativeDecoder, "__init__", changed(NativeDecoder.__init__, old, new))
    assert "decode.c differs from model.py by" in Decoder(nano(), dtype).native_reason


@pytest.mark.skipif(not has_compiler, reason="no C compiler")
@pytest.mark.parametrize("rows", [8, 9])
def test_a_c_decoder_that_is_wrong_with_several_rows_is_rejected(monkeypatch, rows):
    decode = NativeDecoder.__call__

    def wrong(self, tokens, *more):
        logits = decode(self, tokens, *more)
        return logits.flip(0) if len(tokens) == rows else logits

    monkeypatch.setattr(NativeDecoder, "__call__", wrong)
    assert f"with {rows} rows" in Decoder(nano(), "fp32").native_reason


# ---------------------------------------------------------------------------------------------
# models that the twin cannot represent


class Wrapped(nn.Module):
    """An adapter around one projection."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.down, self.weight = inner, nn.Linear(inner.in_features, 2), inner.weight
        self.out_features, self.in_features = inner.out_features, inner.in_features

    def forward(self, x):
        return self.inner(x) + self.down(x).sum(-1, keepdim=True)


def test_a_model_with_a_wrapped_projection_is_not_accelerated():
    model = nano()
    attention = model.model.layers[1].self_attn
    attention.q_proj = Wrapped(attention.q_proj)
    assert reason_against(model) == "its modules differ from those that model.py makes"
    assert "without replacements" in fastpath.accelerate(model, CPU, "fp32", inference=True)[0]
    decoder = Decoder(model)
    assert decoder.native is None and generate(decoder, [[1, 2, 3]], 5, Sampling(), ())


def test_a_model_with_hooks_or_other_forwards_is_not_accelerated():
    model = nano()
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    assert reason_against(model)
    model = nano()
    model.model.layers[0].mlp.forward = types.MethodType(lambda self, x: x, model.model.layers[0].mlp)
    assert reason_against(model)


def test_a_random_network_is_not_accelerated(monkeypatch):
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: self.down_proj(F.dropout(F.silu(self.gate_proj(x)), 0.5)))
    assert reason_against(nano()) == "its output depends on the random seed"


def test_a_model_with_one_different_constant_is_not_accelerated():
    model = nano()
    model.model.layers[0].input_layernorm.eps = 0.1
    assert reason_against(model) == "its modules differ from those that model.py makes"


def test_a_network_that_cannot_be_made_smaller_is_not_accelerated(monkeypatch):
    def one_width(self, x):
        assert x.shape[-1] == 512, "for one width only"
        return x

    monkeypatch.setattr(SwiGLU, "forward", one_width)
    assert "a small copy of the model cannot be made" in reason_against(nano())


# ---------------------------------------------------------------------------------------------
# edits of the classes in this process; tests/test_edits.py edits the file


def other_norm(self, x):
    x = x - x.mean(-1, keepdim=True)
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


EDITS = {
    "norm": (RMSNorm, other_norm, "norm"),
    "activation": (SwiGLU, lambda self, x: self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x)), "mlp"),
}


def edit_model(monkeypatch, old: str, new: str) -> None:
    """Edit one function of model.py in this process, including the source that inspect returns."""
    for name, part in list(vars(network).items()):
        owner = part if isinstance(part, type) and part.__module__ == "model" else network
        for attribute, function in list(vars(owner).items()) if owner is part else [(name, part)]:
            if isinstance(function, types.FunctionType) and old in (source := inspect.getsource(function)):
                file = f"<edited {attribute}>"
                source = textwrap.dedent(source.replace(old, new, 1))
                linecache.cache[file] = (len(source), None, source.splitlines(True), file)
                space: dict = {}
                exec(compile(source, file, "exec"), vars(network), space)  # noqa: S102
                monkeypatch.setattr(owner, attribute, space[attribute])
                return
    raise AssertionError(f"{old!r} is not in model.py")


QUIET = {  # edits that a comparison on a small model may miss: name → (old, new, edited part of model.py)
    "a window of 500 tokens": ("mixed = attention(q.to(k.dtype), k, v, cache.mask(q.shape[1]))",
                               "mixed = attention(q.to(k.dtype), k[:, -500:], v[:, -500:], "
                               "cache.mask(q.shape[1])[..., -500:])", "Attention"),
    "no positions in every fourth layer": (
        "q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)",
        "q, k = (q, k) if self.layer % 4 == 3 else (apply_rotary(q, cos, sin), apply_rotary(k, cos, sin))",
        "Attention"),
    "only in evaluation": ("return self.down_proj(", "return (1 if self.training else 0.9) * self.down_proj(",
                           "SwiGLU"),
    "a clamped gate": ("F.silu(self.gate_proj(x))", "F.silu(self.gate_proj(x).clamp(max=7))", "SwiGLU"),
    "a tiny z-loss": ("(F.cross_entropy(logits_NV", "(1e-4 * logits_NV.logsumexp(-1)**2 + F.cross_entropy(logits_NV",
                      "WeakWater.loss"),
    "soft-capped logits": ("self.lm_head(hidden) if targets", "30 * torch.tanh(self.lm_head(hidden) / 30) if targets",
                           "WeakWater.forward"),
    "a clipped norm": ("x32 = x.float()", "x32 = x.float().clamp(-50, 50)", "RMSNorm"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edit", QUIET)
def test_edited_parts_are_not_replaced_even_if_the_twin_agrees(monkeypatch, edit, dtype):
    """decode.c depends on the whole network, so it is not used after any edit of the forward."""
    old, new, part = QUIET[edit]
    edit_model(monkeypatch, old, new)
    assert known.edited() == {part}
    decoder = Decoder(nano(), dtype)
    slot = {"Attention": "attention", "SwiGLU": "mlp", "RMSNorm": "norm", "WeakWater.loss": "loss"}.get(part)
    assert slot is None or f"{slot}: computed as model.py says, since {part} edited in model.py" in decoder.lines
    assert (decoder.native_reason or "") == ("" if slot == "loss" and has_compiler else f"{part} edited in model.py")
    attention, mlp = decoder.model.model.layers[0].self_attn, decoder.model.model.layers[0].mlp
    assert ("forward" in vars(attention), "forward" in vars(mlp)) == (part != "Attention", part != "SwiGLU")


def test_comments_and_docstrings_are_not_edits(monkeypatch):
    edit_model(monkeypatch, 'return self.weight * (x32', '"""Scaled."""\n        return self.weight * (x32')
    assert known.edited() == {"RMSNorm"}, "a string that is not a docstring"
    monkeypatch.undo()
    edit_model(monkeypatch, "x32 = x.float()", "x32 = x.float()  # at least\n\n        # this")
    assert not known.edited()


def test_the_c_norm_is_not_used_after_an_edit_of_block(monkeypatch):
    """It returns bf16, and the edited Block adds a norm's output to the residual stream."""
    edit_model(monkeypatch, "self.mlp(self.post_attention_layernorm(x_BTC))",
               "self.post_attention_layernorm(self.mlp(x_BTC))")
    lines = fastpath.accelerate(nano(), CPU, "bf16")
    assert not has_compiler or "norm: fewer passes only, since Block edited in model.py" in lines, lines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_decoder_uses_changed_weights(batch, dtype):
    """Weights change in place by an optimizer step, and by loading others."""
    model, prompts = nano().eval(), [[5, 6, 7], [8, 9, 10]][:batch]
    decoder, others = Decoder(model, dtype), nano()
    before = generate(decoder, prompts, 8, Sampling(), ())
    for change in (lambda: torch.optim.SGD(model.parameters(), lr=3.0).step(),
                   lambda: model.load_state_dict(others.state_dict())):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        change()
        after = generate(decoder, prompts, 8, Sampling(), ())
        assert after != before and after == generate(Decoder(copy.deepcopy(model), dtype), prompts, 8, Sampling(), ())
        before = after


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edit", ["norm", "activation"])
def test_a_replacement_that_disagrees_is_rejected(monkeypatch, edit, dtype):
    """The comparison alone rejects it: `known.edited` reports no edit here."""
    owner, forward, slot = EDITS[edit]
    monkeypatch.setattr(owner, "forward", forward)
    monkeypatch.setattr(known, "edited", lambda: set())
    model = nano()
    lines = fastpath.accelerate(model, CPU, dtype, inference=True)
    assert f"{slot}: computed as model.py says" in lines, lines
    tokens, lengths = torch.randint(0, 331, (1, 60)), [20, 40]
    with runtime.autocast(CPU, dtype):
        got = model(tokens, lengths=lengths)
        fastpath.restore(model)
        expected = model(tokens, lengths=lengths)
    assert (got - expected).abs().max() <= (1e-5 if dtype == "fp32" else 0.03) * expected.abs().max()


def test_norms_after_the_branches(monkeypatch):
    """With the norm after each branch, generated ids still equal those of model.py."""
    def after(self, x, cos, sin, packing=None, cache=None, rows=None):
        x = x + self.input_layernorm(self.self_attn(x, cos, sin, packing, cache))
        x = x if rows is None else x.flatten(0, 1).index_select(0, rows).unsqueeze(0)
        return x + self.post_attention_layernorm(self.mlp(x))

    monkeypatch.setattr(Block, "forward", after)
    model = nano().eval()
    prompts = [[5, 6, 7, 8], [9, 10]]
    expected = generate(Decoder(model, plain=True), prompts, 12, Sampling(), ())
    assert generate(Decoder(model), prompts, 12, Sampling(), ()) == expected
    with torch.no_grad():
        rows = [model(torch.tensor([p + g.ids]))[0, len(p) - 1:-1].argmax(-1).tolist() for p, g in
                zip(prompts, expected, strict=True)]
    assert rows == [g.ids for g in expected]


def test_the_twin_finds_faults_that_a_fresh_model_hides():
    """With output projections of zero, GELU instead of SiLU does not change the loss. The twin's are random."""
    model = nano()
    model.zero_init_residual()
    assert all(p.abs().median() > 0.01 for p in small_copy(model).parameters())
    twin, forward = make_twin(model, CPU, torch.float32)[0], EDITS["activation"][1]
    assert isinstance(twin, Twin) and twin.mismatch(lambda target: [
        replace(m, "forward", forward, ("cpu", torch.float32)) for m in target.modules() if isinstance(m, SwiGLU)])
