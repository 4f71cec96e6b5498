"""Invariant 4: a packed buffer has the loss, gradients and logits of its documents one by one. Also: loss functions,
compiled blocks and validation windows."""

import functools
import inspect
import json
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import replace_forwards

import model as network
from common import runtime
from common.scoring import score
from Config import LLMConfig
from dataset import MicroBatch, StepLoader, evaluated, evaluation_batches, load_documents
from fastpath import accelerate, training
from fastpath.training import LinearCrossEntropy
from model import WeakWater

VARIANTS = {
    "tied": dict(),
    "untied, GQA": dict(n_heads=4, n_kv_heads=2, tie_embeddings=False),
    "tied, GQA, qk_norm": dict(n_heads=4, n_kv_heads=2, qk_norm=True),
}
LENGTHS = [5, 1, 33, 2, 64, 17, 64]
CPU = torch.device("cpu")
PATHS = pytest.mark.parametrize("replaced", [False, True], ids=["plain", "replaced"])


def make_model(dtype=torch.float64, replaced=False, vocab_size=97, max_seq_len=64, **changes) -> WeakWater:
    """A nano model with nonuniform attention: its weights are ten times as large as initially. Plain, or `replaced`:
    with the faster forwards."""
    torch.manual_seed(3)
    model = WeakWater(LLMConfig.preset("nano", vocab_size=vocab_size, max_seq_len=max_seq_len, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model = model.to(dtype).train()
    return replace_forwards(model, dtype) if replaced else model


def make_buffer(dtype=torch.float64, lengths=LENGTHS):
    """(tokens (1, T), target_index, targets, weights). About half of the positions have a loss, including last
    positions of documents, as when a document continues in the next row."""
    total = sum(lengths)
    index = torch.randperm(total)[: total // 2].sort().values
    return (torch.randint(0, 97, (1, total)), index, torch.randint(0, 97, (len(index),)),
            torch.rand(len(index), dtype=dtype) * 3)


def loss_and_gradients(model, buffers) -> tuple[float, dict]:
    """The summed loss and gradients of buffers (tokens, lengths, target_index, targets, weights)."""
    model.zero_grad()
    total = 0.0
    for tokens, lengths, index, targets, weights in buffers:
        loss = model(tokens, lengths=lengths, target_index=index, targets=targets, weights=weights)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def one_by_one(tokens, index, targets, weights, lengths=LENGTHS):
    """Each document of a buffer as a separate buffer without `lengths`."""
    begin = 0
    for length in lengths:
        inside = (index >= begin) & (index < begin + length)
        yield tokens[:, begin:begin + length], None, index[inside] - begin, targets[inside], weights[inside]
        begin += length


def assert_same(a, b, tolerance: float):
    """Two (loss, gradients) agree to `tolerance` of each tensor's largest value."""
    assert abs(a[0] - b[0]) <= tolerance * abs(b[0])
    for name, expected in b[1].items():
        assert (a[1][name] - expected).abs().max() <= tolerance * expected.abs().max(), name


# RMSNorm computes in float32, as in transformers. Where the last bit of a float64 matmul differs, its float32 rounding
# may differ too, so float64 agrees only to 1e-7 in the worst case (mostly to 1e-12).
@PATHS
@pytest.mark.parametrize("checkpointing", [False, True], ids=["no checkpointing", "checkpointing"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_one_by_one(variant, checkpointing, replaced):
    """Loss and gradients of a packed buffer are the sums over its documents one by one."""
    model = make_model(replaced=replaced, **VARIANTS[variant])
    buffer = make_buffer()
    expected = loss_and_gradients(model, one_by_one(*buffer))
    assert expected[0] > 0 and all(g.abs().max() > 0 for g in expected[1].values())
    model.model.gradient_checkpointing = checkpointing
    assert_same(loss_and_gradients(model, [(buffer[0], LENGTHS, *buffer[1:])]), expected, 1e-7)


@PATHS
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_document_sees_another(variant, replaced):
    """A change in a document affects neither other documents nor its own earlier tokens."""
    model = make_model(replaced=replaced, **VARIANTS[variant])
    tokens = make_buffer()[0]
    before = model(tokens, lengths=LENGTHS)
    begin, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    changed = tokens.clone()
    changed[:, begin + 9:end] = (changed[:, begin + 9:end] + 1) % 97
    difference = (model(changed, lengths=LENGTHS) - before).abs().amax(-1)[0]
    assert difference[begin + 9:end].min() > 1e-3
    difference[begin + 9:end] = 0
    assert difference.max() <= 1e-7


@PATHS
def test_positions_restart(replaced):
    """A document has the same logits at any place in a buffer. Rows of equal length equal the same rows packed."""
    model = make_model(replaced=replaced)
    document = torch.randint(0, 97, (1, 20))
    packed = model(torch.cat([document[:, :7], document, document], 1), lengths=[7, 20, 20])
    alone = model(document)
    for begin in (7, 27):
        assert (packed[:, begin:begin + 20] - alone).abs().max() <= 1e-7 * alone.abs().max()
    rows = torch.randint(0, 97, (3, 20))
    difference = model(rows).flatten(0, 1) - model(rows.reshape(1, 60), lengths=[20] * 3)[0]
    assert difference.abs().max() <= 1e-7 * alone.abs().max()


@PATHS
def test_training_buffers_equal_their_documents(tokenizer, data_dir, cache_dir, replaced):
    """The buffers of StepLoader (whole conversations, or text cut at rows) have the loss of their segments alone."""
    for kind, file in (("text", "pretrain"), ("chat", "r1")):
        documents = load_documents(str(data_dir / f"{file}.jsonl"), tokenizer, kind, str(cache_dir), 256)
        model = make_model(replaced=replaced, vocab_size=800, max_seq_len=256)
        loader = StepLoader(documents, 256, 6, 1, seed=1, tag_weight=3.0, think_weight=0.5)
        step = loader.step(0, 0)
        batch = step.micro_batches[0].to("cpu")
        alone, total, begin = [], 0.0, 0
        for document, offset, length in loader.step(0, 0).segments:
            ids = torch.from_numpy(documents.tokens(document)[offset:][:length + 1])  # with the last position's target
            inside = (batch["target_index"] >= begin) & (batch["target_index"] < begin + length)
            index = batch["target_index"][inside] - begin
            weights = batch["weights"][inside].double()
            alone.append((ids[None, :length], None, index, ids[index + 1], weights))
            total, begin = total + weights.sum().item(), begin + length
        assert len(alone) > 5 and total == pytest.approx(step.total_weight, rel=1e-6)
        model.zero_grad()
        loss = model(**batch | {"weights": batch["weights"].double()})
        loss.backward()
        packed = loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
        assert_same(packed, loss_and_gradients(model, alone), 1e-7)


@PATHS
@pytest.mark.parametrize("n_tokens, n_targets", [(63, 5), (64, 64), (65, 0), (90, 89)])
def test_a_buffer_rounded_up_on_a_cpu_has_the_same_loss(n_tokens, n_targets, replaced):
    """Few sizes of matmuls: tokens and targets are multiples of 64, what is added has no weight, loss and gradients are
    those of the buffer as it is."""
    lengths = [n_tokens // 3, n_tokens - n_tokens // 3]
    tokens, index, targets, weights = make_buffer(lengths=lengths)
    index = torch.arange(n_targets)
    targets, weights = torch.randint(1, 97, (n_targets,)), torch.rand(n_targets, dtype=torch.float64) + 0.5
    batch = MicroBatch(tokens[0].numpy(), lengths, index.numpy(), targets.numpy(), weights.numpy()).to("cpu")
    assert batch["tokens"].shape[1] % 64 == len(batch["targets"]) % 64 == 0
    assert n_tokens <= sum(batch["lengths"]) < n_tokens + 64
    assert sum(batch["lengths"]) == batch["tokens"].shape[1] == int(batch["boundaries"][-1])
    assert len(batch["weights"]) == len(batch["target_index"]) == len(batch["targets"])
    assert not batch["weights"][n_targets:].any() and batch["targets"][:n_targets].equal(targets)
    model = make_model(replaced=replaced)
    model.zero_grad()
    loss = model(**batch)
    if n_targets:
        loss.backward()
        rounded = loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
        assert_same(rounded, loss_and_gradients(model, [(tokens, lengths, index, targets, weights)]), 1e-9)
    else:
        assert loss.item() == 0


def documents_alone(q, k, v, bounds):
    """Causal attention within each document of a buffer (T, H, D), as the variable-length kernel computes it."""
    return torch.cat([network.attention(*(x[None, a:b] for x in (q, k, v)))[0]
                      for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_call_of_the_varlen_kernel(monkeypatch, variant):
    """A stand-in with the kernel's signature checks the call on any machine: int32 boundaries from 0 to T, the maximum
    length, causal, grouped heads enabled where that is an option."""
    kernel = training.varlen_kernel()
    if kernel is None:
        pytest.skip("this torch has no varlen_attn")
    signature, calls = inspect.signature(kernel.func), []

    def stand_in(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        q, k, v, bounds_q, bounds_k, max_q, max_k = call.args[:7]
        options = call.arguments
        calls.append(options)
        assert options.get("is_causal", True) and options.get("window_size", (-1, 0)) in ((-1, 0), [-1, 0])
        assert "window_size" in options or options["is_causal"]
        assert options.get("enable_gqa", True) or q.shape[1] == k.shape[1]
        assert bounds_q.dtype == bounds_k.dtype == torch.int32 and torch.equal(bounds_q, bounds_k)
        assert max_q == max_k == 64 and q.ndim == k.ndim == v.ndim == 3
        return documents_alone(q, k, v, bounds_q)

    buffer, _ = make_buffer(), monkeypatch.setattr(training, "use_varlen", lambda device, dtype, head_dim: True)
    monkeypatch.setattr(training, "varlen_kernel", lambda: functools.partial(stand_in, **kernel.keywords))
    model = make_model(replaced=True, **VARIANTS[variant])
    expected = loss_and_gradients(model, one_by_one(*buffer))
    assert not calls  # rows do not use it
    assert_same(loss_and_gradients(model, [(buffer[0], LENGTHS, *buffer[1:])]), expected, 1e-7)
    assert len(calls) == 2


def test_where_the_varlen_kernel_can_run(monkeypatch):
    """Half precision, Ampere or later, head widths that are multiples of 8 and at most 256."""
    capability = [(8, 9)]
    monkeypatch.setattr(training, "varlen_kernel", lambda: functools.partial(print))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    gpu = torch.device("cuda", 0)
    assert training.use_varlen(gpu, torch.bfloat16, 64) and training.use_varlen(gpu, torch.float16, 8)
    assert training.use_varlen(gpu, torch.bfloat16, 256) and not training.use_varlen(gpu, torch.bfloat16, 264)
    assert not training.use_varlen(gpu, torch.bfloat16, 60) and not training.use_varlen(gpu, torch.float32, 64)
    assert not training.use_varlen(torch.device("cpu"), torch.bfloat16, 64)
    capability[0] = (7, 5)
    assert not training.use_varlen(gpu, torch.bfloat16, 64)


# ---------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize("block_rows", [64, 10_000], ids=["several blocks", "one block"])
@pytest.mark.parametrize("n", [0, 1, 64, 129])
def test_linear_cross_entropy(monkeypatch, n, block_rows):
    """Loss and both gradients equal a weighted F.cross_entropy, in float64 and float32, also without rows."""
    monkeypatch.setattr(LinearCrossEntropy, "BLOCK_LOGITS", block_rows * 131)
    torch.manual_seed(n)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        hidden = torch.randn(n, 16, dtype=dtype, requires_grad=True)
        weight = torch.randn(131, 16, dtype=dtype, requires_grad=True)
        targets, weights = torch.randint(0, 131, (n,)), torch.rand(n, dtype=dtype)
        weights[::3] = 0
        loss = LinearCrossEntropy.apply(hidden, weight, targets, weights)
        got = [loss, *torch.autograd.grad(loss * 0.7, (hidden, weight))]
        loss = (F.cross_entropy(hidden @ weight.t(), targets, reduction="none") * weights).sum()
        expected = [loss, *torch.autograd.grad(loss * 0.7, (hidden, weight))]
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and torch.isfinite(a).all()
            assert (a - b).abs().sum() <= tolerance * b.abs().sum()
        assert torch.equal(LinearCrossEntropy.apply(hidden.detach(), weight.detach(), targets, weights), got[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_cross_entropy_under_autocast(dtype):
    """Under autocast the matmuls are in half precision and the loss in float32. The error is that of the matmuls."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(300, 64, requires_grad=True), (torch.randn(131, 64) * 0.2).requires_grad_()
    targets, weights = torch.randint(0, 131, (300,)), torch.rand(300)
    with torch.autocast("cpu", dtype=dtype):
        loss = LinearCrossEntropy.apply(hidden, weight, targets, weights)
    got = torch.autograd.grad(loss, (hidden, weight))
    exact = (F.cross_entropy(hidden @ weight.t(), targets, reduction="none") * weights).sum()
    expected = torch.autograd.grad(exact, (hidden, weight))
    tolerance = torch.finfo(dtype).eps
    assert loss.dtype == torch.float32 and abs(loss - exact) <= tolerance * exact
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= tolerance * b.norm()


@PATHS
def test_no_target_no_loss(replaced):
    """A buffer without targets has loss 0 and gradients 0, not NaN."""
    empty = torch.zeros(0, dtype=torch.long)
    buffer = (torch.randint(0, 97, (1, sum(LENGTHS))), LENGTHS, empty, empty, torch.zeros(0, dtype=torch.float64))
    loss, gradients = loss_and_gradients(make_model(replaced=replaced), [buffer])
    assert loss == 0 and all((g == 0).all() for g in gradients.values())


@PATHS
@pytest.mark.parametrize("changes", [dict(), dict(n_heads=4, n_kv_heads=2, qk_norm=True)], ids=["llama", "qwen3"])
@pytest.mark.parametrize("packed", [True, False])
def test_attention_uses_the_compute_dtype(monkeypatch, changes, packed, replaced):
    """Under autocast norms and RoPE may return float32, which the fast kernels do not support."""
    module, name = (training, "causal_attention") if replaced else (network, "attention")
    attention, seen = getattr(module, name), set()
    model = make_model(torch.float32, **changes)
    if replaced:
        monkeypatch.setattr("fastpath.kernels.why_unavailable", lambda: "disabled by the test")
        replace_forwards(model, torch.bfloat16)
    monkeypatch.setattr(module, name, lambda q, k, v, *mask: seen.update((q.dtype, k.dtype, v.dtype)) or attention(
        q, k, v, *mask))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(1, 12, dtype=torch.long), lengths=[5, 7] if packed else None)
    assert seen == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------
# compiled


def compile_with(backend: str, monkeypatch) -> None:
    """Make compile_blocks use another backend of torch's compiler: only "inductor" needs a C++ compiler."""
    import torch._dynamo as dynamo

    monkeypatch.setattr(runtime, "compile_trouble", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=backend))
    dynamo.reset()
    dynamo.utils.counters.clear()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.extra)])
def test_compiled_blocks(monkeypatch, backend):
    """Compiled blocks equal plain ones, with and without checkpointing. Buffers with other numbers of documents and
    tokens compile no new graph (after some recompilations torch silently stops compiling)."""
    model, plain = make_model(torch.float32, n_layers=1), make_model(torch.float32, n_layers=1)
    if backend == "inductor" and (trouble := runtime.compile_trouble(CPU)):
        pytest.skip(trouble)
    compile_with(backend, monkeypatch)
    assert "attention (documents of similar length together), loss (in blocks)" in accelerate(
        model, CPU, "fp32", compile=True)[0]
    runtime.compile_blocks(model, CPU)
    import torch._dynamo as dynamo

    torch.manual_seed(5)
    graphs = []
    with dynamo.config.patch(assume_static_by_default=False):  # otherwise all compiles twice: 30 s
        for lengths in ([64, 64], [3, 50, 7], [1, 2, 3, 4, 5], [64], [9] * 11, [17, 30], [5, 1, 33, 2, 64, 17, 64]):
            tokens, *loss_on = make_buffer(torch.float32, lengths)
            buffer = [(tokens, lengths, *loss_on)]
            assert_same(loss_and_gradients(model, buffer), loss_and_gradients(plain, buffer), 1e-5)
            graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
        # the second buffer may add a graph: torch assumes that sizes that are equal in the first are always equal
        assert 0 < graphs[1] == graphs[-1], f"graphs compiled, buffer by buffer: {graphs}"
        breaks = [reason for reason in dynamo.utils.counters["graph_break"] if "attention_buckets" not in reason]
        assert not breaks, breaks  # everything except attention is one graph
        model.model.gradient_checkpointing = True
        assert_same(loss_and_gradients(model, buffer), loss_and_gradients(plain, buffer), 1e-5)


@torch.library.custom_op("weakwater_test::varlen", mutates_args=())
def varlen_stand_in(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, bounds_k: torch.Tensor,
                    longest: int, longest_k: int) -> torch.Tensor:
    """An operator like torch's variable-length kernel that runs on any machine."""
    return documents_alone(q, k, v, bounds)


@torch.library.custom_op("weakwater_test::varlen_gradient", mutates_args=())
def varlen_stand_in_gradient(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                             bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its gradient, handwritten, since autograd does not differentiate a custom operator."""
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        of_q, of_out = q[a:b].transpose(0, 1), grad[a:b].transpose(0, 1)  # (H, T, D)
        of_k, of_v = (x[a:b].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        ahead = torch.full((b - a, b - a), -math.inf).triu(1)
        p = torch.softmax(of_q @ of_k.mT * scale + ahead, -1)
        of_p = of_out @ of_v.mT
        of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True)) * scale
        grad_q[a:b] = (of_scores @ of_k).transpose(0, 1)
        for target, each in ((grad_k, of_scores.mT @ of_q), (grad_v, p.mT @ of_out)):
            target[a:b] = each.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return grad_q, grad_k, grad_v


varlen_stand_in.register_fake(lambda q, *others: torch.empty_like(q))
varlen_stand_in_gradient.register_fake(lambda grad, q, k, v, bounds: tuple(map(torch.empty_like, (q, k, v))))
varlen_stand_in.register_autograd(
    lambda ctx, grad: (*varlen_stand_in_gradient(grad.contiguous(), *ctx.saved_tensors), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:4]))


def test_a_block_is_one_graph(monkeypatch):
    """With a variable-length kernel, a whole block is one graph without a break, for 20 buffers of different lengths.
    At most two graphs for training (the last block computes only positions with a loss), two more for validation."""
    import torch._dynamo as dynamo

    monkeypatch.setattr(training, "varlen_kernel", lambda: varlen_stand_in)
    monkeypatch.setattr(training, "use_varlen", lambda device, dtype, head_dim: True)
    compile_with("aot_eager", monkeypatch)
    model, plain = (make_model(torch.float32, **VARIANTS["tied, GQA, qk_norm"]) for _ in range(2))
    assert "attention (a variable-length flash kernel)" in accelerate(model, CPU, "fp32", compile=True)[0]
    assert runtime.compile_blocks(model, CPU) == "each of 2 blocks, on first use"
    rng = np.random.default_rng(7)
    buffers = []
    for lengths in (rng.integers(1, 65, rng.integers(2, 12)).tolist() for _ in range(20)):
        tokens, *loss_on = make_buffer(torch.float32, lengths)
        buffers.append((tokens, lengths, *loss_on))
    for buffer in buffers:
        got, expected = (loss_and_gradients(m, [buffer]) for m in (model, plain))
        assert_same(got, expected, 1e-4)
    assert dynamo.utils.counters["stats"]["unique_graphs"] <= 2, dynamo.utils.counters
    model.eval(), plain.eval()
    for tokens, lengths, index, targets, weights in buffers:
        with torch.no_grad():
            got, expected = (m(tokens, lengths, target_index=index, targets=targets, weights=weights)
                             for m in (model, plain))
        assert abs(got - expected) <= 1e-5 * expected
    assert 2 <= dynamo.utils.counters["stats"]["unique_graphs"] <= 4, dynamo.utils.counters
    assert not dynamo.utils.counters["graph_break"]


def test_a_message_says_when_torch_stops_compiling(monkeypatch):
    """If a block needs too many graphs, torch runs it eagerly and warns only on the console."""
    import torch._dynamo as dynamo

    said = []
    monkeypatch.setattr(runtime, "compile_trouble", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: None)
    logger = logging.getLogger("torch._dynamo.convert_frame")
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    for _ in range(2):  # a second run in the same process must not add a second handler
        runtime.compile_blocks(make_model(torch.float32), CPU, said.append)
    dynamo.reset()
    compiled = torch.compile(lambda x, n: x * n, backend="eager", dynamic=False)
    for n in range(dynamo.config.recompile_limit + 2):
        compiled(torch.ones(3), n)
    assert len(said) == 1 and "now runs eagerly" in said[0], said


# ---------------------------------------------------------------------------------------------
# validation


@PATHS
@pytest.mark.parametrize("kind, file", [("text", "pretrain"), ("chat", "sft")])
@pytest.mark.parametrize("batch_tokens", [64, 500, 10**6])
def test_evaluation_windows(tokenizer, data_dir, cache_dir, kind, file, batch_tokens, replaced):
    """Each target counts once at weight 1, in disjoint windows that start at the document's `<s>`, however windows are
    batched. Loss and bits per byte equal those of the documents one by one."""
    window = 64 if kind == "text" else 1024
    documents = load_documents(str(data_dir / f"{file}.jsonl"), tokenizer, kind, str(cache_dir), 1024)
    documents = documents.take(np.arange(0, len(documents), 7))
    model, plain = (make_model(torch.float32, vocab_size=800, max_seq_len=window) for _ in range(2))
    if replaced:
        accelerate(model, CPU, "fp32")
    limit = 3000
    n = evaluated(documents, limit)
    assert documents.length[:n - 1].sum() < limit <= documents.length[:n].sum()
    assert evaluated(documents, 0) == len(documents) == evaluated(documents, 10**9)
    batches = list(evaluation_batches(documents, window, batch_tokens, limit))
    assert all(len(b.tokens) <= max(batch_tokens, window) for b in batches)
    assert max(max(b.lengths) for b in batches) <= window
    got = score(model, batches, documents.bytes[:n].sum(), "cpu", "fp32")

    records = [json.loads(line) for line in (data_dir / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
    nats = targets = n_bytes = 0
    for document in range(n):
        ids = torch.from_numpy(documents.tokens(document))
        counted = torch.ones(len(ids)) if kind == "text" else torch.from_numpy(documents.types(document) > 0).float()
        for begin in range(0, len(ids) - 1, window):
            following = ids[begin + 1:begin + window + 1]
            logits = plain(ids[None, begin:begin + window][:, :len(following)])[0]
            mask = counted[begin + 1:begin + window + 1]
            nats += (F.cross_entropy(logits, following, reduction="none") * mask).sum().item()
            targets += int(mask.sum())
        record = records[documents.caches[0].documents[documents.index[document]]["line"] - 1]
        said = [record["text"]] if kind == "text" else [
            m["content"] for m in record["conversations"] if m["role"] == "assistant"]
        n_bytes += len("".join(said).encode("utf-8"))
    assert got["targets"] == targets == documents.targets[:n].sum() and got["bytes"] == n_bytes
    assert got["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert got["ppl"] == pytest.approx(math.exp(nats / targets), rel=1e-4)
    assert got["bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
