"""The programs of docs/TUTORIAL_zh.md: one sample from JSONL to loss, one answer from prompt to text, in numbers.

    python docs/tutorial.py sample --line 1
    python docs/tutorial.py answer --prompt "23加5等于多少？"

The commands read the output of `bash quickstart.sh` in out/quickstart (data, tokenizer, weights; --out_dir names
another folder) and run on the CPU in float32. They use the project's own functions and the network of model.py; only
`resume` and `answer` also use the faster forwards of fastpath/. Where a command computes a result step by step, it
asserts that the result equals that of the project's function.
"""

import contextlib
import io
import json
import math
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

import pretrain
from common import generation
from common.answers import read_reply, wilson
from common.exits import run
from common.generation import Decoder
from common.optim import learning_rate, make_optimizers
from common.runtime import autocast
from common.scoring import score
from common.weights import load_model, load_weights  # noqa: E402
from Config import FLAGS, OneLineParser, UserError
from dataset import StepLoader, evaluation_batches, load_documents, make_micro_batch
from experiments.no_think_control import AS_DISTILL, without_thoughts
from model import Packing, apply_rotary, attention, boundaries_of
from text.chat import CONTEXT, REPLY, TAG, THINK, ChatEncoder, encode_chat
from text.content import OPEN_THINK, Reading
from text.records import parse_record, read_lines
from text.tokenizer import TextEncoder, load_tokenizer
from train_tokenizer import CONTROL, MAX_WORD_CHARS, token_byte_lengths

TOKEN_TYPES = {CONTEXT: "CONTEXT", REPLY: "REPLY", TAG: "TAG", THINK: "THINK"}
ALL_ONE = np.array([0, 1, 1, 1], np.float32)  # loss weight by token type, as in SFT.py and SFT_long.py
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------
# the output of quickstart.sh, and helpers to print it


def existing(args, name: str) -> Path:
    """The path of a file or folder in --out_dir. Raises UserError if it does not exist."""
    path = Path(args.out_dir) / name
    if not path.exists():
        raise UserError(f"{path} does not exist: run `bash quickstart.sh` first, or name its folder with --out_dir")
    return path


def open_tokenizer(args):
    """The tokenizer in --out_dir."""
    return load_tokenizer(str(existing(args, "tokenizer")))


def open_model(args, stage: str):
    """The model of a stage, in eval mode."""
    return load_model(existing(args, f"{stage}.pth"))[0]


def open_documents(args, name: str, reading: Reading | str, tokenizer, max_seq_len: int):
    """The documents of a data file, in the order of its lines."""
    path, cache_dir = str(existing(args, f"data/{name}")), str(Path(args.out_dir) / "cache")
    with contextlib.redirect_stdout(io.StringIO()):  # hides the log: it contains times, which vary
        return load_documents(path, tokenizer, reading, cache_dir, max_seq_len)


def line_of(documents, document: int) -> int:
    """The line number of a document in the data file, from 1."""
    return int(documents.caches[0].documents["line"][documents.index[document]])


def find_document(documents, line: int | None) -> int:
    """The document in a line of the data file, or the shortest document if `line` is None."""
    if line is None:
        return int(documents.length.argmin())
    for document in range(len(documents)):
        if line_of(documents, document) == line:
            return document
    raise UserError(f"--line {line}: no document in that line of {documents.caches[0].files[0]}")


def texts(tokenizer, ids) -> list[str]:
    """The text of each id alone, or its number of bytes if it is only part of a character."""
    sizes = token_byte_lengths(tokenizer)
    alone = [tokenizer.decode([int(i)]) for i in ids]
    return [f"({sizes[i]} byte{'s' * (sizes[i] > 1)})" if "\ufffd" in text else repr(text)[1:-1]
            for i, text in zip(ids, alone, strict=True)]


def same(a, b) -> None:
    """Assert that two tensors are equal up to rounding."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def given(micro_batch) -> dict:
    """What the model gets of a micro-batch, without what fills it up on a CPU (MicroBatch.to)."""
    return micro_batch.to(CPU, multiple_of=1)


def shape(tensor) -> str:
    """The shape of a tensor as text, e.g. "(1, 68, 192)"."""
    return str(tuple(tensor.shape))


def title(text: str) -> None:
    """Print a heading."""
    print(f"--- {text}")


# ---------------------------------------------------------------------------------------------
# stage 0


def show_tokenizer(args) -> None:
    """the vocabulary; which strings become one token, and which never do"""
    tokenizer = open_tokenizer(args)
    encoder, sizes = TextEncoder.of(tokenizer), token_byte_lengths(tokenizer)
    n_special = len(CONTROL) + len(encoder.tag_ids)
    print(f"{encoder.vocab_size} entries = {n_special} control tokens and tags + 256 bytes + "
          f"{encoder.vocab_size - n_special - 256} merges")
    vocabulary = tokenizer.get_vocab()
    print("  ".join(f"{token} {vocabulary[token]}" for token in (*CONTROL, *encoder.tag_ids)))

    title("text to ids and back")
    for text in ("小明有12个苹果。", "2024", "𠮷"):
        ids = encoder.encode([text])[0]
        assert tokenizer.decode(ids) == text and sum(sizes[i] for i in ids) == len(text.encode("utf-8"))
        print(f"{text}  {len(text)} characters, {len(text.encode('utf-8'))} bytes, {len(ids)} tokens")
        print(f"    {ids}\n    {' | '.join(texts(tokenizer, ids))}")

    title(f"words, in which merges stay (in training cut after {MAX_WORD_CHARS} characters, or at every hanzi)")
    text = "学而时习之，不亦说乎？2024年有12个月。"
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    print(" | ".join(text[begin:end] for _, (begin, end) in words))

    chat = ChatEncoder.of(tokenizer)
    title("the same characters, said by the user and by the assistant")
    for said in ("</s>", "<think>"):
        for role in ("user", "assistant"):
            ids, _ = encode_chat(tokenizer, [{"role": role, "content": said}])
            content = ids[len(chat.headers[role]):-1 - len(chat.newline)]  # without header, </s> and newline
            assert encoder.eos_id not in content
            print(f"{said:8} {role:10} {content}")


# ---------------------------------------------------------------------------------------------
# one sample, from JSONL to loss


def show_sample(args) -> None:
    """one chat record: line, ids, mask; the packed micro-batch; shapes through the network; the loss"""
    tokenizer, model = open_tokenizer(args), open_model(args, "SFT")
    documents = open_documents(args, "val/sft_512.jsonl", "chat", tokenizer, max_seq_len=512)
    document = find_document(documents, args.line)
    # a small optimizer step: this conversation and the next three, in two micro-batches
    few = documents.take(np.arange(document, document + 4) % len(documents))
    loader = StepLoader(few, max_seq_len=512, batch_size=1, accumulation_steps=2, seed=1, order="file")
    step = loader.step(epoch=0, step_in_epoch=0)
    with torch.no_grad():
        if args.part in ("all", "record"):
            sample_record(args, tokenizer, documents, document)
        if args.part in ("all", "batch"):
            sample_batch(tokenizer, few, step)
        if args.part in ("all", "forward"):
            sample_forward(model, step)
        if args.part in ("all", "loss"):
            sample_loss(tokenizer, model, step)


def sample_record(args, tokenizer, documents, document: int) -> None:
    """JSONL line → messages → ids, mask and token types."""
    file, number = existing(args, "data/val/sft_512.jsonl"), line_of(documents, document)
    title(f"line {number} of val/sft_512.jsonl")
    line = next(line for n, line in read_lines(file) if n == number)
    print(line.decode("utf-8"))
    conversation = parse_record(line, "chat")["conversations"]
    ids, mask = encode_chat(tokenizer, conversation)
    types = documents.types(document)
    assert ids == documents.tokens(document).tolist()  # the token cache holds the same ids
    assert mask == (types != CONTEXT).astype(int).tolist()
    title(f"{len(conversation)} messages, {len(ids)} ids, {sum(mask)} with a loss")
    print(f"{'t':>3} {'id':>5}  {'kind':8}{'mask':>5}  token")
    for t, text in enumerate(texts(tokenizer, ids)):
        print(f"{t:3} {ids[t]:5}  {TOKEN_TYPES[int(types[t])]:8}{mask[t]:5}  {text}")


def documents_of(step) -> list[list[int]]:
    """The documents in each micro-batch of a step."""
    segments = iter(step.segments)
    return [[next(segments)[0] for _ in micro_batch.lengths] for micro_batch in step.micro_batches]


def with_first(step) -> tuple:
    """(micro-batch, begin, end): the micro-batch with document 0 of a step, and the document's range in its buffer."""
    for micro_batch, inside in zip(step.micro_batches, documents_of(step), strict=True):
        if 0 in inside:
            position = inside.index(0)
            begin = sum(micro_batch.lengths[:position])
            return micro_batch, begin, begin + micro_batch.lengths[position]
    raise AssertionError("the step does not contain document 0")


def sample_batch(tokenizer, few, step) -> None:
    """The micro-batches of a step, and the arrays of the one with our conversation."""
    title(f"a step: {len(step.segments)} conversations, {step.tokens} tokens, {len(step.micro_batches)} micro-batches")
    for number, (micro_batch, inside) in enumerate(zip(step.micro_batches, documents_of(step), strict=True), 1):
        print(f"micro-batch {number}: lines {[line_of(few, d) for d in inside]}, lengths {micro_batch.lengths}, "
              f"{len(micro_batch.tokens)} tokens, {len(micro_batch.targets)} targets, "
              f"weights sum to {micro_batch.weights.sum():g}")
    assert math.isclose(step.total_weight, sum(float(m.weights.sum()) for m in step.micro_batches), rel_tol=1e-5)
    print(f"total_weight of the step: {step.total_weight:g}")

    micro_batch, begin, end = with_first(step)
    title(f"the micro-batch with line {line_of(few, 0)}, as the model gets it")
    batch = given(micro_batch)
    print(", ".join(f"{name} {shape(batch[name])}" for name in ("tokens", "boundaries", "target_index", "targets",
                                                                "weights")))
    positions = Packing(batch["lengths"], batch["boundaries"]).positions()[0]
    ranges = [f"{part[0]}..{part[-1]}" for part in positions.split(batch["lengths"])]
    print(f"lengths {batch['lengths']}, boundaries {batch['boundaries'].tolist()}, positions {', '.join(ranges)}")
    ours = np.flatnonzero((micro_batch.target_index >= begin) & (micro_batch.target_index < end))
    index = micro_batch.target_index[ours]
    print(f"of our conversation (places {begin} to {end - 1} in the buffer):")
    print(f"  target_index  {index.tolist()}")
    print(f"  tokens there  {' | '.join(texts(tokenizer, micro_batch.tokens[index]))}")
    print(f"  targets       {' | '.join(texts(tokenizer, micro_batch.targets[ours]))}")
    print(f"  weights       {micro_batch.weights[ours].tolist()}")


def query_key_value(block, x_BTC, cos, sin):
    """Inputs of a block's attention: q and k (rotated by RoPE) and v, each (B, T, heads, D)."""
    layer, h_BTC = block.self_attn, block.input_layernorm(x_BTC)
    q, k, v = (linear(h_BTC).unflatten(-1, (-1, layer.head_dim))
               for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    if layer.qk_norm:
        q, k = layer.q_norm(q), layer.k_norm(k)
    rotated_q, rotated_k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    same(rotated_q.norm(dim=-1), q.norm(dim=-1))  # a rotation does not change the norm
    return rotated_q, rotated_k, v


def sample_forward(model, step) -> None:
    """One micro-batch through the network: embedding, the first block step by step, the other blocks, norm and head."""
    micro_batch, begin, _ = with_first(step)
    batch = given(micro_batch)
    packing = Packing(batch["lengths"], batch["boundaries"])
    c, network = model.config, model.model
    title(f"through the network: dim {c.dim}, {c.n_layers} layers, {c.n_heads} heads of {c.head_dim}, "
          f"hidden {c.hidden_dim}, {c.vocab_size} entries")

    def tell(name: str, tensor: torch.Tensor) -> None:
        root_mean_square = f"rms {tensor.pow(2).mean().sqrt():8.3f}" if tensor.is_floating_point() else ""
        print(f"{name:34}{shape(tensor):18} {root_mean_square}")

    tell("tokens", batch["tokens"])
    x = network.embed_tokens(batch["tokens"])
    tell("embedding x", x)
    cos, sin = network.rotary(packing.positions())
    tell("cos (and sin) of RoPE", cos)
    block = network.layers[0]
    tell("layer 0: RMSNorm(x)", block.input_layernorm(x))
    q, k, v = query_key_value(block, x, cos, sin)
    tell("  q after RoPE", q)
    tell("  k after RoPE", k)
    tell("  v", v)
    documents = zip(*(heads.split(packing.lengths, dim=1) for heads in (q, k, v)), strict=True)
    mixed = torch.cat([attention(*document) for document in documents], dim=1)
    tell("  attention inside each document", mixed)
    attended = block.self_attn.o_proj(mixed.flatten(2))
    tell("  o_proj, joins the heads", attended)
    y = x + attended
    tell("  x + attention", y)
    h = block.post_attention_layernorm(y)
    inside = F.silu(block.mlp.gate_proj(h)) * block.mlp.up_proj(h)
    tell("  silu(gate) * up", inside)
    y = y + block.mlp.down_proj(inside)
    tell("  x + SwiGLU: the block's output", y)
    same(y, block(x, cos, sin, packing))
    for block in network.layers[1:]:
        y = block(y, cos, sin, packing)
    tell(f"after all {c.n_layers} blocks", y)
    hidden = network.norm(y)
    tell("final RMSNorm", hidden)
    same(hidden, network(batch["tokens"], packing.positions(), packing))
    predicting = hidden[0, batch["target_index"]]
    tell("only where there is a target", predicting)
    logits = model.lm_head(predicting)
    tell("logits", logits)
    loss = (F.cross_entropy(logits, batch["targets"], reduction="none") * batch["weights"]).sum()
    same(loss, model(**batch))
    print(f"weighted sum of the cross-entropies {loss:.3f}: what model(**micro_batch) returns")


def losses_of(model, micro_batch) -> torch.Tensor:
    """The loss (N,) of each target of a micro-batch; their weighted sum is what the model returns."""
    batch = given(micro_batch)
    logits = model(batch["tokens"], lengths=batch["lengths"])[0, batch["target_index"]]
    losses = F.cross_entropy(logits, batch["targets"], reduction="none")
    same((losses * batch["weights"]).sum(), model(**batch))
    return losses


def sample_loss(tokenizer, model, step) -> None:
    """The loss of each target of our conversation, and the loss of the step."""
    micro_batch, begin, end = with_first(step)
    losses = losses_of(model, micro_batch)
    title("the loss of each target: -ln p")
    print(f"{'t':>3} {'p':>6} {'loss':>7} {'weight':>7}  after > comes")
    for n in np.flatnonzero((micro_batch.target_index >= begin) & (micro_batch.target_index < end)):
        t = int(micro_batch.target_index[n])
        before, after = texts(tokenizer, [micro_batch.tokens[t], micro_batch.targets[n]])
        print(f"{t - begin:3} {math.exp(-losses[n]):6.3f} {losses[n]:7.3f} {micro_batch.weights[n]:7g}  "
              f"{before} > {after}")
    title("the loss of the step")
    sums = [model(**given(part)).item() for part in step.micro_batches]
    counts = [float(part.weights.sum()) for part in step.micro_batches]
    for number, (total, count) in enumerate(zip(sums, counts, strict=True), start=1):
        print(f"micro-batch {number}: sum {total:.3f} over a weight of {count:g}")
    added = " + ".join(f"{total:.3f}" for total in sums)
    print(f"({added}) / {step.total_weight:g} = {sum(sums) / step.total_weight:.3f}")
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    print(f"the mean of the two means would be {sum(means) / len(means):.3f}")


def show_step(args) -> None:
    """text in rows; the same optimizer step, divided into micro-batches in three ways"""
    tokenizer = open_tokenizer(args)
    text = open_documents(args, "val/pretrain.jsonl", "text", tokenizer, max_seq_len=64)
    loader = StepLoader(text, max_seq_len=64, batch_size=3, accumulation_steps=1, seed=1)
    title("pretraining: the first three rows of 64 tokens, (document, first token, tokens)")
    row, filled, segments = [], 0, loader.step(0, 0).segments
    for segment in segments:
        row, filled = [*row, segment], filled + segment[2]
        if filled == 64:
            print("  ".join(map(str, row)))
            row, filled = [], 0
    for document in dict.fromkeys(document for document, first, _ in segments if first):
        print(f"document {document} has {text.length[document]} tokens and goes on in the next row")

    model = open_model(args, "SFT")
    chats = open_documents(args, "val/sft_512.jsonl", "chat", tokenizer, max_seq_len=512)
    title("chat: 2,048 tokens a step, cut as batch_size x accumulation_steps")
    seen = []
    for batch_size, accumulation_steps in ((4, 1), (2, 2), (1, 4)):
        loader = StepLoader(chats, 512, batch_size, accumulation_steps, seed=1)
        step = loader.step(0, 0)
        model.zero_grad()
        losses = [model(**given(micro_batch)) for micro_batch in step.micro_batches]
        loss = sum(losses) / step.total_weight
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        means = [part.item() / float(m.weights.sum()) for part, m in zip(losses, step.micro_batches, strict=True)]
        print(f"{batch_size} x {accumulation_steps}: {len(step.segments)} documents, micro-batches of "
              f"{[len(m.tokens) for m in step.micro_batches]} tokens, total_weight {step.total_weight:g}")
        print(f"       loss {loss.item():.4f}, gradient norm {norm:.3f}; mean of means {sum(means) / len(means):.4f}")
        seen.append((sorted(step.segments), loss.detach(), norm))
    for segments, loss, norm in seen[1:]:
        assert segments == seen[0][0]
        same((loss, norm), seen[0][1:])


def show_attention(args) -> None:
    """two packed documents do not see each other"""
    tokenizer, model = open_tokenizer(args), open_model(args, "SFT")
    documents = open_documents(args, "val/sft_512.jsonl", "chat", tokenizer, max_seq_len=512)
    first, second = (torch.from_numpy(documents.tokens(document)) for document in (0, 1))
    with torch.no_grad():
        title("attention weights of head 0 in layer 0: two packed documents of four tokens each")
        said = slice(len(ChatEncoder.of(tokenizer).headers["user"]), len(ChatEncoder.of(tokenizer).headers["user"]) + 4)
        tokens, lengths = torch.cat([first[said], second[said]])[None], [4, 4]
        packing = Packing(lengths, boundaries_of(lengths))
        block, x = model.model.layers[0], model.model.embed_tokens(tokens)
        cos, sin = model.model.rotary(packing.positions())
        q, k, v = query_key_value(block, x, cos, sin)
        position, document = torch.arange(8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        visible = (position[:, None] >= position) & (document[:, None] == document)
        group = q.shape[2] // k.shape[2]  # query heads per key/value head
        k, v = (heads.repeat_interleave(group, dim=2) for heads in (k, v))
        scores = torch.einsum("thd,shd->hts", q[0], k[0]) / math.sqrt(model.config.head_dim)
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        mixed = torch.einsum("hts,shd->thd", weights, v[0]).flatten(1)
        same(block.self_attn.o_proj(mixed), block.self_attn(block.input_layernorm(x), cos, sin, packing)[0])
        for row, text in zip(weights[0].tolist(), texts(tokenizer, tokens[0].tolist()), strict=True):
            print(" ".join(f"{w:.2f}" if w else "   ." for w in row) + f"   {text}")

        title("how far the second document's logits move, at most")
        both, lengths = torch.cat([first, second])[None], [len(first), len(second)]
        packed, alone = model(both, lengths=lengths)[0, len(first):], model(second[None])[0]
        changed = both.clone()
        changed[0, 2:len(first) - 2] = both[0, 2:len(first) - 2].flip(0)  # changes the first document
        moved = {
            "packed, against alone": (packed, alone),
            "packed, the first document changed": (packed, model(changed, lengths=lengths)[0, len(first):]),
            "one row without lengths, against alone": (model(both)[0, len(first):], alone),
        }
        for name, (a, b) in moved.items():
            print(f"{name:40} {(a - b).abs().max():.3f}")
        same(packed, alone)


# ---------------------------------------------------------------------------------------------
# the other stages


def show_distill(args) -> None:
    """one R1 record: token types, their loss weights by --tag_weight and --think_weight, the loss before and after"""
    tokenizer = open_tokenizer(args)
    documents = open_documents(args, "val/r1_1024.jsonl", AS_DISTILL, tokenizer, max_seq_len=1024)
    document = find_document(documents, args.line)
    few = documents.take(np.arange(document, document + 1))
    loader = StepLoader(few, 1024, batch_size=1, accumulation_steps=1, seed=1, tag_weight=args.tag_weight,
                        think_weight=args.think_weight)
    ids, types = few.tokens(0), few.types(0)
    weights = loader.type_weights[types] * few.weight[0]
    step = loader.step(0, 0)
    assert math.isclose(step.total_weight, weights[1:].sum(), rel_tol=1e-5)
    title(f"line {line_of(few, 0)} of val/r1_1024.jsonl with --tag_weight {args.tag_weight:g} "
          f"--think_weight {args.think_weight:g}")
    cuts = [0, *(np.flatnonzero(np.diff(types)) + 1).tolist(), len(ids)]
    print(f"{'t':>9}  {'kind':8}{'weight':>7}  tokens")
    for begin, end in zip(cuts, cuts[1:], strict=False):  # one line per run of tokens of the same type
        print(f"{begin:4}..{end - 1:<3}  {TOKEN_TYPES[int(types[begin])]:8}{weights[begin]:7g}  "
              f"{' | '.join(texts(tokenizer, ids[begin:end]))}")
    parts = [f"{(types == type_).sum()} {TOKEN_TYPES[type_]} x {loader.type_weights[type_]:g}"
             for type_ in (REPLY, TAG, THINK)]
    print(f"total_weight: {' + '.join(parts)} = {step.total_weight:g}")

    title("mean loss by kind, over the first 64 records")
    first = documents.take(np.arange(min(64, len(documents))))
    segments = [(d, 0, int(first.length[d])) for d in range(len(first))]
    micro_batch = make_micro_batch(first, segments, ALL_ONE)
    types = np.concatenate([first.types(d) for d in range(len(first))])[micro_batch.target_index + 1]
    print(f"{'':24}" + "".join(f"{TOKEN_TYPES[type_]:>8}" for type_ in (REPLY, TAG, THINK)) + f"{'all':>8}")
    for stage, name in (("SFT_long", "before, SFT_long.pth"), ("distill", "after, distill.pth")):
        with torch.no_grad():
            losses = losses_of(open_model(args, stage), micro_batch)
        means = [losses[types == type_].mean() for type_ in (REPLY, TAG, THINK)]
        print(f"{name:24}" + "".join(f"{mean:8.3f}" for mean in means) + f"{losses.mean():8.3f}")


def show_control(args) -> None:
    """the same R1 record in the control experiment: the plain answer, behind an empty thought"""
    tokenizer = open_tokenizer(args)
    documents = open_documents(args, "val/r1_1024.jsonl", AS_DISTILL, tokenizer, max_seq_len=1024)
    number = line_of(documents, find_document(documents, args.line))
    line = next(line for n, line in read_lines(existing(args, "data/val/r1_1024.jsonl")) if n == number)
    record = parse_record(line, "chat")
    for name, shown in (("distill", record), ("control", without_thoughts(record))):
        ids, mask = encode_chat(tokenizer, shown["conversations"], thinking=True)
        encoder = ChatEncoder.of(tokenizer)
        begin = len(ids) - 1 - ids[::-1].index(encoder.text.bos_id) + len(encoder.headers["assistant"])  # of the reply
        first, end = mask.index(1, begin), len(ids) - 1 - mask[::-1].index(1)
        without_loss, targets = tokenizer.decode(ids[begin:first]), tokenizer.decode(ids[first:end])
        print(f"{name}: {sum(mask)} targets\n    without loss {without_loss!r}, then {targets!r} and </s>")


def show_optimizer(args) -> None:
    """which weights Muon and AdamW update, with or without weight decay; how Muon changes a gradient"""
    tokenizer, model = open_tokenizer(args), open_model(args, "pretrain")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for choice in ("muon", "adamw"):
        title(f"--optimizer {choice}")
        for optimizer in make_optimizers(model, choice, learning_rate=5e-3, weight_decay=0.1):
            for group in optimizer.param_groups:
                parameters = group["params"]
                print(f"{type(optimizer).__name__}, decay {group['weight_decay']}: {len(parameters)} weights of "
                      f"{sum(p.numel() for p in parameters):,} parameters")
                if choice == "muon":
                    patterns = dict.fromkeys(re.sub(r"layers\.\d+", "layers.*", names[id(p)]) for p in parameters)
                    print("    " + "\n    ".join(patterns))

    title("one Muon step on layers.0.mlp.up_proj: singular values, largest / median / smallest")
    documents = open_documents(args, "val/pretrain.jsonl", "text", tokenizer, max_seq_len=256)
    step = StepLoader(documents, 256, batch_size=8, accumulation_steps=1, seed=1).step(0, 0)
    for micro_batch in step.micro_batches:
        (model(**given(micro_batch)) / step.total_weight).backward()
    muon, _ = make_optimizers(model, "muon", learning_rate=1.0, weight_decay=0.0)
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    muon.step()
    update = before - weight.detach()
    for name, matrix in (("gradient", weight.grad), ("update / learning rate", update)):
        values = torch.linalg.svdvals(matrix)
        values = values / values.max()
        print(f"{name:24} 1 / {values.median():.2f} / {values.min():.2f}")
    print(f"root mean square of the update / learning rate: {update.pow(2).mean().sqrt():.2f}")


def show_schedule(args) -> None:
    """learning rate relative to its peak over 1,000 steps, for each --lr_schedule and for runs/original.sh"""
    ratios = ("warmup_ratio", "decay_ratio", "min_lr_ratio")
    ours = {name: FLAGS[name].default for name in ratios}
    original = ours | dict(warmup_ratio=0.0, min_lr_ratio=0.1)
    print(f"{'step':>5}{'constant':>10}{'cosine':>10}{'trapezoid':>11}{'original':>12}")
    for step in (0, 19, 250, 500, 700, 900, 999):
        rates = [learning_rate(step, 1000, 1.0, name, **ours) for name in ("constant", "cosine", "trapezoid")]
        rates.append(learning_rate(step, 1000, 1.0, "cosine", **original))
        print(f"{step:5}{rates[0]:10.3f}{rates[1]:10.3f}{rates[2]:11.3f}{rates[3]:12.3f}")


def show_precision(args) -> None:
    """fp32, bf16 and fp16: range, precision, and one loss computed in each"""
    tokenizer, model = open_tokenizer(args), open_model(args, "SFT")
    documents = open_documents(args, "val/sft_512.jsonl", "chat", tokenizer, max_seq_len=512)
    micro_batch = StepLoader(documents, 512, batch_size=2, accumulation_steps=1, seed=1).step(0, 0).micro_batches[0]
    print(f"{'':6}{'largest':>9}{'smallest normal':>17}{'eps':>10}{'1e-8':>10}{'loss':>9}")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with torch.no_grad(), autocast(CPU, name):
            loss = model(**given(micro_batch)) / float(micro_batch.weights.sum())
        info = torch.finfo(dtype)
        tiny = torch.tensor(1e-8).to(dtype).item()
        print(f"{name:6}{info.max:9.1e}{info.tiny:17.1e}{info.eps:10.1e}{tiny:10.1e}{loss:9.2f}")


def show_resume(args) -> None:
    """six steps in one run, and three steps followed by --resume: the same losses, the same weights"""
    flags = ["--data_path", str(existing(args, "data/val/pretrain.jsonl")), "--tokenizer_path",
             str(existing(args, "tokenizer")), "--preset", "nano", "--max_seq_len", "64", "--batch_size", "4",
             "--accumulation_steps", "1", "--lr_schedule", "constant", "--dropout", "0.1", "--log_interval", "1",
             "--device", "cpu", "--dtype", "fp32"]
    losses, weights = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            for name, *runs in (("at once", ["--max_steps", "6"]),
                                ("resumed", ["--max_steps", "3"], ["--max_steps", "6", "--resume"])):
                out = Path(folder) / name
                for more in runs:
                    pretrain.main([*flags, "--out_dir", str(out), "--cache_dir", f"{folder}/cache", *more])
                rows = (out / "log" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
                losses[name] = [json.loads(row)["loss"] for row in rows]
                weights[name] = load_weights(out / "pretrain.pth")[2]["weights_sha256"]
    for name, values in losses.items():
        print(f"{name}: losses {'  '.join(f'{value:.4f}' for value in values)}")
    assert losses["at once"] == losses["resumed"] and weights["at once"] == weights["resumed"]
    print("all six losses are equal to the last bit, and so are the weights (SHA-256)")


# ---------------------------------------------------------------------------------------------
# one answer, from prompt to text; scores


def show_answer(args) -> None:
    """from prompt to text: prefill, KV cache, and each new token with the three likeliest candidates"""
    tokenizer, model = open_tokenizer(args), open_model(args, args.stage)
    encoder, sampling = TextEncoder.of(tokenizer), generation.Sampling(args.temperature, args.top_p)
    thinking = True if args.stage == "distill" else None  # its prompt ends in <think>, which the reply begins with
    prompt, _ = encode_chat(tokenizer, [{"role": "user", "content": args.prompt}], add_generation_prompt=True,
                            thinking=thinking)
    decoder = Decoder(open_model(args, args.stage))  # `model` remains that of model.py
    whole = generation.generate(decoder, [prompt], args.max_new_tokens, sampling, {encoder.eos_id},
                                generator=torch.Generator().manual_seed(args.seed))[0]
    title(f"the prompt: {len(prompt)} ids")
    print(f"{prompt}\n{' | '.join(texts(tokenizer, prompt))}")

    longest = min(len(prompt) + args.max_new_tokens, model.config.max_seq_len)
    cache = decoder.new_cache(1, longest)
    logits = generation.prefill(decoder, [prompt], cache)
    title("prefill")
    print(f"keys and values (layers, B, heads, slots, D) {shape(cache.keys)}, of which {len(prompt)} slots are filled; "
          f"logits {shape(logits)}")

    title("token by token: position, id, p, the three likeliest, text so far certain")
    generator, words = torch.Generator().manual_seed(args.seed), generation.StreamDecoder(tokenizer)
    ids, shown = [], OPEN_THINK if thinking else ""
    while True:
        scores = generation.adjust(logits, sampling)
        probability = scores.softmax(-1)[0]
        token = generation.sample(scores, sampling.greedy, generator)
        ids.append(int(token))
        position = len(prompt) + len(ids) - 1
        likeliest = probability.topk(3)
        candidates = [f"{text} {p:.3f}" for text, p in zip(texts(tokenizer, likeliest.indices.tolist()),
                                                          likeliest.values.tolist(), strict=True)]
        if ids[-1] != encoder.eos_id:
            shown += words.push(ids[-1])
        print(f"{position:4} {ids[-1]:5}  {probability[token].item():.3f}  [{', '.join(candidates)}]  {shown[-12:]!r}")
        if ids[-1] == encoder.eos_id or position + 1 == longest:
            break
        logits = generation.decode_one_token(decoder, token, cache)
    with torch.no_grad():  # a full forward without a cache gives the same logits
        same(logits[0], model(torch.tensor([prompt + ids[:-1]]))[0, -1])
    ended = ids[-1] == encoder.eos_id
    assert whole.ids == (ids[:-1] if ended else ids) and (whole.reason == "eos") == ended
    title("the answer" if ended else f"cut after --max_new_tokens {args.max_new_tokens}")
    print(repr(shown + words.flush()))


def show_score(args) -> None:
    """bits per byte of four documents, step by step; how answers are read; the interval of an accuracy"""
    tokenizer, model = open_tokenizer(args), open_model(args, "pretrain")
    documents = open_documents(args, "val/pretrain.jsonl", "text", tokenizer, max_seq_len=model.config.max_seq_len)
    four = documents.take(np.arange(4))
    title("each document alone, from <s>")
    total = 0.0
    for document in range(len(four)):
        ids = torch.from_numpy(four.tokens(document))
        with torch.no_grad():
            nats = F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="sum").item()
        total += nats
        print(f"line {line_of(four, document)}: {len(ids) - 1:4} targets, {four.bytes[document]:4} bytes, "
              f"{nats:7.2f} nats, {nats / math.log(2) / four.bytes[document]:.3f} bits per byte")
    scores = score(model, evaluation_batches(four, model.config.max_seq_len, 16_384), four.bytes.sum(), CPU,
                   "fp32")
    assert math.isclose(scores["bpb"], total / math.log(2) / four.bytes.sum(), rel_tol=1e-4)
    print(f"together: loss {scores['loss']:.3f}, PPL {scores['ppl']:.2f}, bits per byte {scores['bpb']:.3f}")

    title("what is read from a reply, where the right answer is a number")
    for reply in ("<think>\n20+8=28。\n</think>\n<answer>现在有28个苹果。</answer>", "3个桃子用掉1个，剩下2个。",
                  "答案：75%", "不知道"):
        print(f"{read_reply(reply, is_number=True)!s:>5}  from {reply!r}")
    title("right answers, and the 95 % interval of the share (Wilson)")
    for correct, n in ((0, 20), (18, 20), (252, 280)):
        low, high = wilson(correct, n)
        print(f"{correct:4} of {n:3}: {correct / n:4.0%}, {low:.1%} to {high:.1%}")


# ---------------------------------------------------------------------------------------------


COMMANDS = (show_tokenizer, show_sample, show_step, show_attention, show_precision, show_optimizer, show_schedule,
            show_resume, show_distill, show_control, show_answer, show_score)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="docs/tutorial.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for show in COMMANDS:
        name = show.__name__.removeprefix("show_")
        command = commands.add_parser(name, help=show.__doc__, description=show.__doc__, allow_abbrev=False)
        command.set_defaults(show=show)
        command.add_argument("--out_dir", default="out/quickstart", help="output of quickstart.sh (%(default)s)")
        if name in ("sample", "distill", "control"):
            command.add_argument("--line", type=int, help="line of the validation file (default: the shortest record)")
        if name == "sample":
            command.add_argument("--part", choices=("all", "record", "batch", "forward", "loss"), default="all")
        if name == "distill":
            command.add_argument("--tag_weight", type=float, default=1.0, help="as in distill.py (%(default)s)")
            command.add_argument("--think_weight", type=float, default=1.0, help="as in distill.py (%(default)s)")
        if name == "answer":
            command.add_argument("--prompt", default="23加5等于多少？", help="the user's message (%(default)s)")
            command.add_argument("--stage", choices=("SFT", "SFT_long", "distill"), default="SFT")
            command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
            command.add_argument("--top_p", type=float, default=1.0, help="1 is off (%(default)s)")
            command.add_argument("--seed", type=int, default=42)
            command.add_argument("--max_new_tokens", type=int, default=24)
    args = parser.parse_args(argv)
    args.show(args)


if __name__ == "__main__":
    sys.exit(run(main))
