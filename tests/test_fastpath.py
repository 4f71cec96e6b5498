"""fastpath: replacements are used where they agree with model.py, and refused where one constant in them is wrong."""

import copy
import functools
import re
import shutil
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpath
from common import runtime
from common.generation import Decoder, Sampling, generate
from Config import LLMConfig
from fastpath import decoding, kernels, training
from fastpath.replace import replace
from fastpath.twin import Twins, make_twin, reason_against, twin_config
from model import Attention, Block, RMSNorm, SwiGLU, WeakWater, apply_rotary, attention

CPU = torch.device("cpu")
has_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
DTYPES = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not has_compiler, reason="no C compiler"))]


def nano(**changes) -> WeakWater:
    return WeakWater(LLMConfig.preset("nano", **{"vocab_size": 331, "max_seq_len": 256} | changes))


@pytest.mark.parametrize("preset", ["nano", "demo", "weakwater-5m", "weakwater-30m", "weakwater-30m-gqa"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_parts_of_the_presets_are_accelerated(preset, dtype):
    """Also of a fresh model, whose output projections are zero, and of one in which they are not."""
    model = WeakWater(LLMConfig.preset(preset))
    model.zero_init_residual()
    lines = fastpath.accelerate(model, CPU, dtype, inference=True)
    assert len(lines) == 1 and lines[0].startswith("faster than model.py"), lines
    assert all(f"{slot} (" in lines[0] for slot in fastpath.REPLACEMENTS)
    assert ("kernels.c" in lines[0]) == (dtype == "bf16")


def test_accelerating_draws_no_random_number_and_leaves_the_weights():
    model = nano()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    fastpath.accelerate(model, CPU, "fp32", inference=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.model.layers[0].self_attn._parameters, "nothing registered"


def test_restored_it_is_plain():
    model = nano()
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    fastpath.accelerate(model, CPU, "fp32", inference=True)
    assert "forward" in vars(model.model.layers[0].mlp)
    fastpath.restore(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names


def test_a_copy_has_weights_of_its_own():
    model = nano()
    fastpath.accelerate(model, CPU, "fp32")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    tokens = torch.randint(0, 331, (1, 9))
    assert twin(tokens, lengths=[4, 5]).abs().max() == 0 < model(tokens, lengths=[4, 5]).abs().max()


def test_another_precision_is_computed_plainly(monkeypatch):
    """What was checked in float32 is not used in bf16 or float64."""
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
    """At most 0.3 s on two quiet cores; ten times that where other tests run."""
    import time

    model = WeakWater(LLMConfig.preset(preset))
    fastpath.accelerate(model, CPU, dtype)
    begin = time.perf_counter()
    fastpath.accelerate(model, CPU, dtype)
    assert time.perf_counter() - begin < 3


def test_the_twin_is_small_and_alike():
    for preset in ("weakwater-30m", "weakwater-30m-gqa"):
        config = LLMConfig.preset(preset)
        small = twin_config(config)
        assert small.head_dim == config.head_dim and small.qk_norm == config.qk_norm
        assert small.n_heads // small.n_kv_heads == config.n_heads // config.n_kv_heads
        assert small.n_layers == 2 and sum(WeakWater(small).num_parameters().values()) < 2e6


# ---------------------------------------------------------------------------------------------
# a wrong constant is found


def changed(function, old: str, new: str):
    """The function with one piece of its source replaced."""
    import inspect
    import textwrap

    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) >= 1, f"{old!r} is not in {function}"
    space = dict(function.__globals__)
    exec(compile(source.replace(old, new, 1), "<changed>", "exec"), space)  # noqa: S102
    return space[function.__name__]


FAULTS = {  # name: (class or module, attribute, piece of its source, what it becomes, dtype)
    "norm, eps": (training.RMSNormFunction, "forward", "keepdim=True) + eps)", "keepdim=True) + 10 * eps)", "fp32"),
    "norm, gradient of x": (training.RMSNormFunction, "backward", "value=-1)", "value=1)", "fp32"),
    "norm, gradient of the scale": (training.RMSNormFunction, "backward", "grad_times_unit.flatten(0, -2).sum(0)",
                                    "1.1 * grad_times_unit.flatten(0, -2).sum(0)", "fp32"),
    "swiglu": (training.GatedSiLU, "forward", "F.silu(gate) * up", "F.gelu(gate) * up", "fp32"),
    "swiglu, gradient": (training.GatedSiLU, "backward", "grad * F.silu(gate)", "-grad * F.silu(gate)", "fp32"),
    "attention, scale": (training, "causal_attention", "is_causal=True,", "is_causal=True, scale=0.2,", "fp32"),
    "attention, order": (training.Scatter, "forward", "return x[place]", "return x[place.flip(0)]", "fp32"),
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
def test_a_wrong_constant_is_refused(monkeypatch, fault):
    """The slot stays plain or takes another choice, a line says so, and the model computes what model.py says."""
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
def test_a_wrong_constant_in_decoding_is_refused(monkeypatch, function, old, new):
    monkeypatch.setattr(decoding, function.__name__, changed(function, old, new))
    model = nano()
    lines = fastpath.accelerate(model, CPU, "fp32", inference=True)
    assert any(line.startswith("decoding: ") and "not used" in line for line in lines), lines
    assert not hasattr(model.lm_head, "matmul")


@pytest.mark.skipif(not has_compiler, reason="no C compiler")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_c_decoder_is_refused(monkeypatch, dtype):
    from fastpath import decoder

    assert Decoder(nano(), dtype).native_reason is None
    monkeypatch.setattr(decoder, "Model", functools.partial(WrongEps, decoder.Model))
    assert "decode.c differs from model.py" in Decoder(nano(), dtype).native_reason


def WrongEps(make, *values):
    """decoder.Model with another eps."""
    made = make(*values)
    made.norm_eps *= 30
    return made


# ---------------------------------------------------------------------------------------------
# what the twin cannot stand for


class Wrapped(nn.Module):
    """An adapter around one projection."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.down, self.weight = inner, nn.Linear(inner.in_features, 2), inner.weight
        self.out_features, self.in_features = inner.out_features, inner.in_features

    def forward(self, x):
        return self.inner(x) + self.down(x).sum(-1, keepdim=True)


def test_a_wrapped_projection_is_computed():
    model = nano()
    attention = model.model.layers[1].self_attn
    attention.q_proj = Wrapped(attention.q_proj)
    assert reason_against(model) == "its modules are not those that model.py makes"
    assert "without replacements" in fastpath.accelerate(model, CPU, "fp32", inference=True)[0]
    decoder = Decoder(model)
    assert decoder.native is None and generate(decoder, [[1, 2, 3]], 5, Sampling(), ())


def test_hooks_and_forwards_of_others_are_left():
    model = nano()
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    assert reason_against(model)
    model = nano()
    model.model.layers[0].mlp.forward = types.MethodType(lambda self, x: x, model.model.layers[0].mlp)
    assert reason_against(model)


def test_one_that_answers_two_seeds_differently(monkeypatch):
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: self.down_proj(F.dropout(F.silu(self.gate_proj(x)), 0.5)))
    assert reason_against(nano()) == "it answers differently with another random seed"


def test_a_constant_of_one_module():
    model = nano()
    model.model.layers[0].input_layernorm.eps = 0.1
    assert reason_against(model) == "its modules are not those that model.py makes"


def test_dropout_inside_a_replaced_part(monkeypatch):
    """Known by its randomness; the dropout that model.py has between its parts goes on as it is."""
    assert fastpath.accelerate(nano(dropout=0.1), CPU, "fp32")[0].startswith("faster")
    plain = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: F.dropout(plain(self, x), self.p, self.training))
    monkeypatch.setattr(SwiGLU, "__init__", lambda self, config, make=SwiGLU.__init__: (
        make(self, config), setattr(self, "p", config.dropout))[0])
    assert reason_against(nano(dropout=0.1)) == "it answers differently with another random seed"
    assert reason_against(nano()) is None


def test_a_network_of_which_no_twin_can_be_made(monkeypatch):
    def only_here(self, x):
        assert x.shape[-1] == 512, "made for one width"
        return x

    monkeypatch.setattr(SwiGLU, "forward", only_here)
    assert "no small model of the same kind can be made" in reason_against(nano())


# ---------------------------------------------------------------------------------------------
# edits of the classes, in this process; tests/test_edits.py makes them in the file


def other_norm(self, x):
    x = x - x.mean(-1, keepdim=True)
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


EDITS = {
    "norm": (RMSNorm, other_norm, "norm"),
    "activation": (SwiGLU, lambda self, x: self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x)), "mlp"),
    "soft cap": (WeakWater, "loss", "loss"),
}


def windowed(width: int):
    """Attention.forward in which a token sees `width` tokens."""
    def forward(self, x, cos, sin, packing=None, cache=None):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            slots = cache.positions(q.shape[1])
            k, v = cache.store(self.layer, k, v)
            near = torch.arange(k.shape[1]) > slots[:, None, :, None] - width
            mixed = attention(q, k, v, cache.mask(q.shape[1]) & near)
        else:
            T = q.shape[1]
            document = torch.arange(T) if packing is None else torch.repeat_interleave(torch.tensor(packing.lengths))
            same = document[:, None] == document if packing is not None else torch.ones(T, T, dtype=torch.bool)
            back = torch.arange(T)[:, None] - torch.arange(T)
            mixed = attention(q, k, v, same & (back >= 0) & (back < width))
        return self.o_proj(mixed.flatten(2))
    return forward


def some_without_rotary(self, x, cos, sin, packing=None, cache=None, plain=Attention.forward):
    """Attention.forward: in every fourth layer positions do not count."""
    if self.layer % 4 == 3:
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    return plain(self, x, cos, sin, packing, cache)


def only_in_evaluation(self, x, cos, sin, packing=None, cache=None, plain=Attention.forward):
    return plain(self, x, cos, sin, packing, cache) * (1 if self.training else 0.9)


@pytest.mark.parametrize("forward", [windowed(500), windowed(40), some_without_rotary, only_in_evaluation])
def test_an_edit_that_acts_far_back_or_in_some_layers_or_in_evaluation_only(monkeypatch, forward):
    monkeypatch.setattr(Attention, "forward", forward)
    model = nano(n_layers=5, max_seq_len=1024)
    assert reason_against(model) is None
    decoder = Decoder(model)
    assert any(re.match("attention: .* differs from model.py", line) for line in decoder.lines), decoder.lines
    assert any(line.startswith("decoding: ") for line in decoder.lines)
    assert not has_compiler or "decode.c differs from model.py" in decoder.native_reason
    assert "norm (" in decoder.lines[0] and "attention (" not in decoder.lines[0]


@pytest.mark.parametrize("batch", [1, 2])
def test_weights_that_change_are_seen_by_a_decoder(batch):
    """By an optimizer in place, and by loading others."""
    model, prompts = nano().eval(), [[5, 6, 7], [8, 9, 10]][:batch]
    decoder, others = Decoder(model), nano()
    before = generate(decoder, prompts, 8, Sampling(), ())
    for change in (lambda: torch.optim.SGD(model.parameters(), lr=3.0).step(),
                   lambda: model.load_state_dict(others.state_dict())):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        change()
        after = generate(decoder, prompts, 8, Sampling(), ())
        assert after != before and after == generate(Decoder(copy.deepcopy(model)), prompts, 8, Sampling(), ())
        before = after


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edit", ["norm", "activation"])
def test_an_edited_part_stays_plain(monkeypatch, edit, dtype):
    owner, forward, slot = EDITS[edit]
    monkeypatch.setattr(owner, "forward", forward)
    model = nano()
    lines = fastpath.accelerate(model, CPU, dtype, inference=True)
    assert f"{slot}: computed as model.py says" in lines, lines
    tokens, lengths = torch.randint(0, 331, (1, 60)), [20, 40]
    with runtime.autocast(CPU, dtype):
        got = model(tokens, lengths=lengths)
        fastpath.restore(model)
        expected = model(tokens, lengths=lengths)
    assert (got - expected).abs().max() <= (1e-5 if dtype == "fp32" else 0.03) * expected.abs().max()


def test_the_order_of_norm_and_branch(monkeypatch):
    """A norm after the branch: each part is what it was, and all are used where they agree together."""
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


def test_the_twin_finds_what_a_fresh_model_hides():
    """With output projections at zero, GELU for SiLU changes nothing of the loss: the twin's are random."""
    twin = make_twin(nano())
    assert all(p.abs().min() > 0 for name, p in twin.named_parameters() if "proj" in name and p.numel() < 10)
    forward, checked_for = EDITS["activation"][1], ("cpu", torch.float32)
    assert Twins(nano(), CPU, torch.float32).error(lambda twin: [
        replace(m, "forward", forward, checked_for) for m in twin.modules() if isinstance(m, SwiGLU)]) > 0.01
    assert isinstance(twin.model.layers[0].self_attn, Attention)
