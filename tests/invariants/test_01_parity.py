"""Invariant 1: parameters, logits, losses and gradients equal those of transformers' Llama (Qwen3 with qk_norm)."""

import pytest
import torch
from conftest import replace_forwards

from Config import LLMConfig, UserError
from fastpath import accelerate, kernels, training
from formats.hf import to_transformers
from model import WeakWater, attention

VARIANTS = {
    "llama, tied, MHA": dict(),
    "llama, untied, MHA": dict(tie_embeddings=False),
    "llama, tied, GQA": dict(n_heads=4, n_kv_heads=2),
    "llama, untied, one KV head": dict(n_heads=4, n_kv_heads=1, tie_embeddings=False, rope_theta=500.0, norm_eps=1e-3),
    "qwen3, tied, GQA": dict(n_heads=4, n_kv_heads=2, qk_norm=True),
    "qwen3, untied, MHA": dict(qk_norm=True, tie_embeddings=False),
}
LENGTHS = [1, 23, 7, 33]
PATHS = dict(argvalues=[False, True], ids=["plain", "replaced"])


def twins(variant: str, dtype: torch.dtype, replaced: bool):
    """(our model, transformers' model with the same weights). All weights are random, including norm scales. Ours is
    plain, or `replaced`: with the faster forwards.

    transformers' eager attention is not used: its softmax is in float32 whatever the model's dtype.
    """
    torch.manual_seed(1)
    c = LLMConfig.preset("nano", vocab_size=97, max_seq_len=64, **VARIANTS[variant])
    ours = WeakWater(c)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    theirs = to_transformers(ours).to(dtype)
    return replace_forwards(ours.to(dtype), dtype) if replaced else ours.to(dtype), theirs


def close(a: torch.Tensor, b: torch.Tensor, float64: float = 1e-9) -> bool:
    """True if the tensors agree to the invariant's tolerance, relative to the largest value."""
    tolerance = float64 if a.dtype == torch.float64 else 1e-5
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("preset, expected", [
    (None, 28_975_616), ("weakwater-30m", 28_975_616), ("weakwater-5m", 5_655_296), ("weakwater-30m-gqa", 29_503_232),
    ("nano", 6400 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64)])
def test_parameter_counts(preset, expected):
    """Every preset has the documented number of parameters, and the parts add up to it."""
    with torch.device("meta"):
        model = WeakWater(LLMConfig.preset(preset) if preset else LLMConfig())
    assert sum(p.numel() for p in model.parameters()) == expected
    assert sum(model.num_parameters().values()) == expected


def test_untied_head_is_counted():
    """An untied output projection is counted separately."""
    parts = WeakWater(LLMConfig.preset("nano", tie_embeddings=False)).num_parameters()
    assert parts["lm_head"] == parts["embedding"] == 6400 * 64


@pytest.mark.parametrize("replaced", **PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant, dtype, replaced):
    """Rows: logits, the training loss and every gradient equal those of transformers."""
    ours, theirs = twins(variant, dtype, replaced)
    tokens = torch.randint(0, 97, (3, 64))
    logits = theirs(tokens).logits
    assert close(ours(tokens), logits)

    index = torch.cat([torch.arange(63) + 64 * row for row in range(3)])  # all positions except the last of each row
    targets, weights = tokens[:, 1:].flatten(), torch.rand(3 * 63, dtype=dtype)
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
    (nats * weights).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for checkpointing in (False, True):
        ours.train().model.gradient_checkpointing = checkpointing
        ours.zero_grad()
        loss = ours(tokens, target_index=index, targets=targets, weights=weights)
        assert close(loss, (nats * weights).sum().to(loss.dtype))
        loss.backward()
        assert {n for n, _ in ours.named_parameters()} == set(expected)
        for name, parameter in ours.named_parameters():
            # both compute norms and their gradients in float32 whatever the dtype, but in different order
            assert close(parameter.grad.float(), expected[name].float()), name


@pytest.mark.parametrize("replaced", **PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_logits(variant, dtype, replaced):
    """Packed: each document has the logits that transformers computes for it alone.

    Matmuls of other shapes differ in the last bit. A norm rounds to float32, also in a float64 model, and can turn that
    into 1e-8 (one value in this test; none in 900 other documents). For rows, shapes are equal and this cannot happen.
    """
    ours, theirs = twins(variant, dtype, replaced)
    documents = [torch.randint(0, 97, (1, n)) for n in LENGTHS]
    packed = ours(torch.cat(documents, 1), lengths=LENGTHS).split(LENGTHS, 1)
    for document, logits in zip(documents, packed, strict=True):
        assert close(logits, theirs(document).logits, float64=1e-7)


@pytest.mark.parametrize("wrong, reason", [
    (dict(dim=66, n_heads=4), "dim 66 is not divisible by n_heads 4"),
    (dict(n_heads=8, n_kv_heads=3), "n_heads 8 is not divisible by n_kv_heads 3"),
    (dict(dim=60, n_heads=4), "head width 15"),
    (dict(n_kv_heads=0), "n_kv_heads must be a whole number of at least 1"),
    (dict(vocab_size=0), "vocab_size must be"),
    (dict(n_layers=-1), "n_layers must be"),
    (dict(hidden_dim=1.5), "hidden_dim must be"),
    (dict(max_seq_len=True), "max_seq_len must be"),
    (dict(dropout=1.0), "dropout must be in"),
    (dict(dropout=float("nan")), "dropout must be a finite number"),
    (dict(norm_eps=0.0), "norm_eps must be greater than 0"),
    (dict(rope_theta=-1.0), "rope_theta and norm_eps must be greater"),
    (dict(rope_theta="1e4"), "rope_theta must be a finite number"),
    (dict(tie_embeddings=1), "tie_embeddings must be True or False"),
])
def test_invalid_configs_are_rejected(wrong, reason):
    """The error names the reason."""
    with pytest.raises(UserError, match=reason):
        LLMConfig(**wrong)


def test_unknown_names_are_rejected():
    """The error names the unknown preset or field."""
    with pytest.raises(UserError, match="7b.*weakwater-30m"):
        LLMConfig.preset("7b")
    with pytest.raises(UserError, match="experts"):
        LLMConfig.from_dict(LLMConfig().to_dict() | {"experts": 8})
    assert LLMConfig.from_dict(LLMConfig().to_dict()) == LLMConfig()


def test_sequences_that_are_too_long_are_rejected():
    """Sequences beyond max_seq_len, packed or not, and lengths that do not add up."""
    model = WeakWater(LLMConfig.preset("nano", vocab_size=97, max_seq_len=16))
    model(torch.zeros(1, 32, dtype=torch.long), lengths=[16, 16])
    for tokens, lengths in ((17, None), (20, [3, 17]), (20, [10, 9]), (8, [10, -2]), (8, [0, 8])):
        with pytest.raises(UserError, match="longer than the model's max_seq_len|packed buffer"):
            model(torch.zeros(1, tokens, dtype=torch.long), lengths=lengths)


@pytest.mark.parametrize("shape", [(2, 50, 4, 4, 16), (1, 300, 4, 2, 16), (3, 128, 4, 1, 32), (2, 129, 2, 1, 8)],
                         ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.015)], ids=str)
def test_attention_in_blocks(shape, dtype, tolerance):
    """The attention for bf16 on a CPU equals torch's attention in float32 on the same numbers; so do its gradients."""
    torch.manual_seed(3)
    B, T, H, K, D = shape
    ours = [torch.randn(B, T, heads, D, dtype=dtype, requires_grad=True) for heads in (H, K, K)]
    theirs = [x.detach().float().requires_grad_() for x in ours]
    out = training.attention_in_blocks(*ours)
    expected = attention(*theirs)
    gradient = torch.randn_like(expected)
    out.backward(gradient.to(dtype))
    expected.backward(gradient)
    for a, b in zip([out, *(x.grad for x in ours)], [expected, *(x.grad for x in theirs)], strict=True):
        assert (a.float() - b).abs().max() <= tolerance * b.abs().max()


def test_attention_on_a_cpu(monkeypatch):
    """In bf16, attention in blocks (for packed buffers only without kernels.c); in float32, torch's."""
    called, has_c = [], kernels.why_unavailable() is None
    tokens = torch.randint(0, 97, (1, 30))

    def net(dtype: str) -> WeakWater:
        model = WeakWater(LLMConfig.preset("nano", vocab_size=97))
        assert "attention (" in accelerate(model, torch.device("cpu"), dtype)[0]
        return model

    single, half = net("fp32"), net("bf16")
    monkeypatch.setattr(kernels, "why_unavailable", lambda: "disabled by the test")
    half_without_c = net("bf16")
    monkeypatch.setattr(training, "attention_in_blocks", lambda q, k, v: called.append(q.dtype) or q)
    single(tokens)
    single(tokens, lengths=[10, 10, 10])
    assert not called
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half_without_c(tokens)
        half_without_c(tokens, lengths=[10, 10, 10])
        assert called == [torch.bfloat16] * 4  # two layers, twice
        half(tokens)
        half(tokens, lengths=[10, 10, 10])
    assert called == [torch.bfloat16] * (6 if has_c else 8)
