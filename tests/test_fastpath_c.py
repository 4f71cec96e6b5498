"""fastpath/kernels.py: kernels.c computes the same as model.py; invariants 3 and 4 hold for it."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F

from common import runtime
from Config import LLMConfig
from fastpath import Case, accelerate, kernels, training
from fastpath.training import LinearCrossEntropy
from model import Packing, RMSNorm, SwiGLU, WeakWater, boundaries_of

CPU = torch.device("cpu")
VARIANTS = {
    "tied": dict(),
    "untied, an odd vocabulary": dict(tie_embeddings=False, vocab_size=301),
    "GQA, qk_norm": dict(dim=128, n_heads=4, n_kv_heads=2, qk_norm=True),
    "one key/value head": dict(dim=128, n_heads=4, n_kv_heads=1),
}
LENGTHS = [5, 1, 133, 2, 64, 17, 64, 300]
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


ALL_C = ("faster than model.py, and checked against it: attention (kernels.c), norm (kernels.c), mlp (kernels.c), "
         "loss (kernels.c)")


@pytest.fixture(autouse=True, scope="module")
def usable():
    assert kernels.why_unavailable() is None


def make(**changes) -> tuple[WeakWater, dict]:
    """A model with nonuniform attention, computed by kernels.c in bf16, and a buffer."""
    model, buffer = make_plain(**changes)
    assert accelerate(model, CPU, "bf16") == [ALL_C]
    return model, buffer


def make_plain(**changes) -> tuple[WeakWater, dict]:
    """The same model without replacements, and the buffer."""
    torch.manual_seed(3)
    model = WeakWater(LLMConfig.preset("nano", **({"vocab_size": 304, "max_seq_len": 512} | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    total = sum(LENGTHS)
    index = torch.randperm(total)[:total // 2].sort().values
    return model.train(), dict(tokens=torch.randint(0, 300, (1, total)), lengths=LENGTHS, target_index=index,
                               targets=torch.randint(0, 300, (len(index),)), weights=torch.rand(len(index)) * 3)


def learn(model: WeakWater, buffer: dict, dtype: str, expected_calls: bool | None = None) -> dict[str, torch.Tensor]:
    """Loss and gradients. `expected_calls`: whether all functions of kernels.c must be called (or none)."""
    calls, call = [], kernels.call
    kernels.call = lambda name, *arguments: (calls.append(name), call(name, *arguments))
    try:
        model.zero_grad()
        with runtime.autocast(CPU, dtype):
            loss = model(**buffer)
        loss.backward()
    finally:
        kernels.call = call
    assert expected_calls is None or expected_calls == (set(calls) == set(kernels.ARGUMENTS)) == bool(calls)
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def error(found: dict, truth: dict) -> dict[str, float]:
    """The relative error of each tensor."""
    return {name: float((found[name].double() - truth[name]).norm() / truth[name].norm()) for name in truth}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_as_accurate_as_without_kernels_c(variant, checkpointing, monkeypatch):
    if checkpointing:
        monkeypatch.setattr(LinearCrossEntropy, "BLOCK_LOGITS", 1)  # 64 rows per block, fewer in the last
    plain, buffer = make_plain(**VARIANTS[variant])
    truth = learn(copy.deepcopy(plain).double(), buffer | {"weights": buffer["weights"].double()}, "fp32",
                  expected_calls=False)
    model, by_torch = copy.deepcopy(plain), copy.deepcopy(plain)
    assert accelerate(model, CPU, "bf16") == [ALL_C]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "why_unavailable", lambda: "disabled by the test")
        assert "attention (documents of similar length together)" in accelerate(by_torch, CPU, "bf16")[0]
    for each in (plain, model, by_torch):
        each.model.gradient_checkpointing = checkpointing
    ours = error(learn(model, buffer, "bf16", expected_calls=True), truth)
    assert ours.pop("loss") < 1e-3
    for other, more in ((by_torch, 1.02), (plain, 1.05)):  # model.py's attention has float32 scores
        simple = error(learn(other, buffer, "bf16", expected_calls=False), truth)
        assert simple.pop("loss") < 1e-3
        for name in ours:  # small tensors vary by chance; the largest ratio of six seeds was 1.28
            assert ours[name] <= 1.4 * simple[name] + 1e-4, (name, ours[name], simple[name])
        assert sum(ours.values()) <= more * sum(simple.values()) and max(ours.values()) < 0.1


def test_a_buffer_equals_the_sum_of_its_parts():
    """Invariants 3 and 4: the gradients of a buffer are the sums over its documents, and over its halves."""
    model, buffer = make(**VARIANTS["GQA, qk_norm"])
    whole = learn(model, buffer, "bf16")
    for groups in ([[length] for length in LENGTHS], [LENGTHS[:4], LENGTHS[4:]]):
        parts, begin = [], 0
        for lengths in groups:
            end = begin + sum(lengths)
            inside = (buffer["target_index"] >= begin) & (buffer["target_index"] < end)
            part = dict(tokens=buffer["tokens"][:, begin:end], lengths=lengths,
                        target_index=buffer["target_index"][inside] - begin,
                        targets=buffer["targets"][inside], weights=buffer["weights"][inside])
            parts.append(learn(model, part, "bf16"))
            begin = end
        summed = {name: sum(part[name].double() for part in parts) for name in whole}
        assert max(error(whole, summed).values()) < 0.02  # bf16: matmuls of other shapes round differently


def test_logits_match_float64_and_documents_stay_separate():
    model, buffer = make()
    truth = copy.deepcopy(model).double()(buffer["tokens"], lengths=LENGTHS)
    with torch.no_grad(), runtime.autocast(CPU, "bf16"):
        logits = model(buffer["tokens"], lengths=LENGTHS)
        changed = buffer["tokens"].clone()
        changed[:, 6:139] += 1  # the third document
        difference = (model(changed, lengths=LENGTHS) - logits).abs().amax(-1)[0]
    assert (logits - truth).norm() < 0.02 * truth.norm()
    assert difference[6:139].min() > 0 and difference[:6].max() == 0 == difference[139:].max()


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_gradients(threads):
    """To rounding: gradients of norms are summed per thread. The same number of threads gives the same bits."""
    model, buffer = make(**VARIANTS["GQA, qk_norm"])
    usual, expected = torch.get_num_threads(), learn(model, buffer, "bf16")
    again = learn(model, buffer, "bf16")
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    torch.set_num_threads(threads)
    try:
        found = learn(model, buffer, "bf16")
    finally:
        torch.set_num_threads(usual)
    assert max(error(found, expected).values()) < 5e-3


# ---------------------------------------------------------------------------------------------
# each function against float64


def close(found: torch.Tensor, truth: torch.Tensor, tolerance: float) -> bool:
    return bool((found.double() - truth.double()).abs().max() <= tolerance * truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(dtype):
    torch.manual_seed(0)
    x = (torch.randn(7, 3, 48) * 10).to(dtype)
    x[0, 0] *= 1e-3  # here eps matters
    x[0, 1] = 0
    weight, grad = torch.randn(48), torch.randn(7, 3, 48).bfloat16()
    inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    y, truth = kernels.RMSNormFunction.apply(*inputs, 1e-5), F.rms_norm(exact[0], (48,), exact[1], 1e-5)
    y.backward(grad)
    truth.backward(grad.double())
    assert close(y, truth, 2**-8) and inputs[0].grad.dtype == dtype
    for row in (0, 1), (0, 2):  # separately: a smaller row has larger gradients
        assert close(inputs[0].grad[row], exact[0].grad[row], 2**-8)
    assert close(y[0, 0], truth[0, 0], 2**-8) and close(inputs[1].grad, exact[1].grad, 1e-5)


def test_gated_silu():
    torch.manual_seed(0)
    x, grad = (torch.randn(9, 64) * 30).bfloat16(), torch.randn(9, 32).bfloat16()
    found, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, truth = kernels.GatedSiLU.apply(found), F.silu(exact[:, :32]) * exact[:, 32:]
    y.backward(grad)
    truth.backward(grad.double())
    assert close(y, truth, 2**-8) and close(found.grad, exact.grad, 2**-8)


@pytest.mark.parametrize("vocab_size", [16, 33, 6400])
def test_cross_entropy(vocab_size):
    torch.manual_seed(0)
    logits, weights = (torch.randn(11, vocab_size) * 20).bfloat16(), torch.rand(11)
    logits[3] = -torch.inf
    logits[3, 5] = 1e4  # probability 1
    targets = torch.randint(0, vocab_size, (11,))
    targets[3], targets[4] = 5, vocab_size - 1
    exact = logits.double().requires_grad_()
    truth = F.cross_entropy(exact, targets, reduction="none")
    (truth * weights).sum().backward()
    kept = logits.clone()
    assert close(kernels.cross_entropy(logits, targets, None), truth, 1e-5) and torch.equal(logits, kept)
    assert close(kernels.cross_entropy(logits, targets, weights), truth, 1e-5)
    assert (logits.double() - exact.grad).abs().max() <= 2**-8 * weights.max()


def test_the_exponential_is_exact():
    """For logits 0 and -gap, the loss of the first is log(1 + exp(-gap)), its gradient -probability of the other."""
    gaps = torch.linspace(0, 12, 97).bfloat16()
    logits, targets = torch.stack([torch.zeros_like(gaps), -gaps], 1), torch.zeros(97, dtype=torch.int64)
    losses = kernels.cross_entropy(logits, targets, torch.ones(97))
    truth = torch.log1p(torch.exp(-gaps.double()))
    assert (losses - truth).abs().max() <= 2e-7
    share = torch.sigmoid(-gaps.double())
    for column, expected in enumerate((-share, share)):
        assert ((logits[:, column] - expected).abs() <= 2**-8 * share + 2e-7).all()


@pytest.mark.parametrize("targets, dtype, error", [
    ([0, -100], torch.int64, ValueError), ([32, 0], torch.int64, ValueError), ([0, 1], torch.int32, AssertionError)])
def test_targets_out_of_bounds_are_rejected(targets, dtype, error):
    with pytest.raises(error):
        kernels.cross_entropy(torch.zeros(2, 32, dtype=torch.bfloat16), torch.tensor(targets, dtype=dtype), None)


@pytest.mark.parametrize("n_targets, n_weights", [(3, 3), (5, 5), (4, 3), (4, 5)])
def test_numbers_of_targets_and_weights_must_match(n_targets, n_weights):
    """The caller gets an error instead of C reading out of bounds."""
    model, buffer = make()
    wrong = dict(target_index=torch.arange(4), targets=torch.zeros(n_targets, dtype=torch.int64),
                 weights=torch.ones(n_weights))
    with pytest.raises(ValueError, match="4 rows of logits"):
        learn(model, buffer | wrong, "bf16")


def test_a_buffer_without_targets():
    model, buffer = make()
    none = torch.zeros(0, dtype=torch.int64)
    found = learn(model, buffer | dict(target_index=none, targets=none, weights=torch.zeros(0)), "bf16")
    assert found["loss"] == 0 and not any(each.any() for each in found.values())


def test_double_backward_raises():
    x, weight = torch.randn(2, 32).bfloat16().requires_grad_(), torch.ones(16).bfloat16().requires_grad_()
    grad, = torch.autograd.grad((kernels.GatedSiLU.apply(x) * weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_stays_nan(poison):
    """A non-finite weight must make the loss non-finite, so that training stops."""
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
                 "model.layers.1.mlp.gate_proj.weight", "model.layers.1.input_layernorm.weight"):
        model, buffer = make()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[:64 * 300] = poison
        found = learn(model, buffer, "bf16", expected_calls=True)
        assert not found["loss"].isfinite(), name


# ---------------------------------------------------------------------------------------------
# where kernels.c is used


def test_kernels_c_is_used_for_bf16_on_a_cpu_only():
    config = LLMConfig.preset("nano")
    assert Case(config, CPU, torch.bfloat16, compile=False).c_applies
    for device, dtype in ((CPU, torch.float32), (CPU, torch.float16), (torch.device("meta"), torch.bfloat16)):
        assert not Case(config, device, dtype, compile=False).c_applies
    plain, buffer = make_plain()
    assert not any("kernels.c" in line for line in accelerate(plain, CPU, "fp32"))
    learn(plain, buffer, "fp32", expected_calls=False)
    learn(plain, buffer, "bf16", expected_calls=False)
    model, buffer = make()
    learn(model, buffer, "fp32", expected_calls=False)
    learn(model, buffer, "fp16", expected_calls=False)
    learn(model.bfloat16(), buffer | {"weights": buffer["weights"].bfloat16()}, "fp32", expected_calls=True)


def test_inputs_of_each_forward(monkeypatch):
    """kernels.c is not called for a float64 norm, also under autocast, nor for another device, nor in float32."""
    model, _ = make()
    seen, call = [], kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *arguments: (seen.append(name), call(name, *arguments)))
    modules = [next(m for m in model.modules() if type(m) is kind) for kind in (RMSNorm, SwiGLU)]
    x = torch.zeros(2, 64)
    with runtime.autocast(CPU, "bf16"):
        modules[0](x.double())
        copy.deepcopy(modules[0]).to("meta")(x.to("meta"))
        copy.deepcopy(modules[1]).to("meta")(x.to("meta"))
    for module in modules:
        module(x)
    assert not seen
    with runtime.autocast(CPU, "bf16"):
        for module in modules:
            module(x)
    assert seen == ["rms_norm", "gated_silu"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.extra)])
def test_compiled_blocks_do_not_use_kernels_c(backend, monkeypatch):
    """torch's compiler cannot trace a ctypes call. Outside the blocks, the loss still uses kernels.c."""
    model, buffer = make()
    expected = learn(model, buffer, "bf16", expected_calls=True)
    model, buffer = make_plain()
    assert accelerate(model, CPU, "bf16", compile=True) == [
        "faster than model.py, and checked against it: attention (documents of similar length together), "
        "loss (kernels.c)"]
    if backend == "inductor":
        said = runtime.compile_blocks(model, CPU)
        if said.startswith("off"):
            pytest.skip(said)
    else:
        for block in model.model.layers:
            block.compile(backend=backend)
    seen, call = [], kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *arguments: (seen.append(name), call(name, *arguments)))
    with runtime.autocast(CPU, "bf16"):
        loss = model(**buffer)
    loss.backward()
    assert set(seen) == {"cross_entropy"}
    assert abs(loss - expected["loss"]) <= 0.01 * expected["loss"]


@pytest.mark.parametrize("widths, not_called", [
    (dict(dim=40, n_heads=1, n_kv_heads=1, hidden_dim=24), {"rms_norm", "gated_silu", "pack_heads"}),
    (dict(dim=40, n_heads=5, n_kv_heads=5, hidden_dim=100), {"rms_norm", "gated_silu", "pack_heads"}),
    (dict(dim=48, n_heads=3, n_kv_heads=3, hidden_dim=64), {"pack_heads"})])
def test_unsupported_widths_use_torch(widths, not_called, monkeypatch):
    model, buffer = make_plain(**widths)
    accelerate(model, CPU, "bf16")
    seen, call = set(), kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *arguments: (seen.add(name), call(name, *arguments)))
    with runtime.autocast(CPU, "bf16"):
        model(**buffer).backward()
    assert {"rms_norm", "gated_silu", "pack_heads", "cross_entropy"} - seen == not_called


def test_without_a_compiler_torch_is_used(monkeypatch):
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    monkeypatch.setattr(kernels, "library", lambda: (None, "no C compiler was found"))
    model, buffer = make_plain()
    used, said = accelerate(model, CPU, "bf16")
    assert said == "kernels.c is not used: kernels.c was not compiled: no C compiler was found"
    assert "kernels.c" not in used and "norm (fewer passes)" in used
    learn(model, buffer, "bf16", expected_calls=False)
    for dtype, compile in (("fp32", False), ("fp16", False), ("fp32", True)):  # kernels.c is not for these
        assert not any("kernels.c" in line for line in accelerate(make_plain()[0], CPU, dtype, compile))


def test_without_openmp_torch_is_used_on_several_threads(monkeypatch):
    """For training, torch on all threads is faster than kernels.c on one."""
    class WithoutOpenMP:
        def has_openmp(self):
            return 0

        def __getattr__(self, name):
            return getattr(whole, name)

    whole, usual = kernels.compiled(), torch.get_num_threads()
    monkeypatch.setattr(kernels, "compiled", WithoutOpenMP)
    try:
        torch.set_num_threads(3)
        used, said = accelerate(make_plain()[0], CPU, "bf16")
        assert "would use one of 3 threads" in said and "kernels.c" not in used
        torch.set_num_threads(1)
        assert accelerate(make_plain()[0], CPU, "bf16") == [ALL_C]
    finally:
        torch.set_num_threads(usual)


def test_length_buckets_are_computed_once_per_packing():
    packing = Packing(LENGTHS, boundaries_of(LENGTHS))
    buckets = training.length_buckets(packing)
    groups = buckets.groups
    assert training.length_buckets(packing) is buckets
    assert training.length_buckets(Packing(LENGTHS, packing.boundaries)) is not buckets
    assert sum(len(starts) for starts, _, _ in groups) == len(LENGTHS)
    assert sorted(zip((s for starts, _, _ in groups for s in starts.tolist()),
                      (n for _, lengths, _ in groups for n in lengths.tolist()), strict=True)) == \
        sorted(zip(boundaries_of(LENGTHS)[:-1].tolist(), LENGTHS, strict=True))
