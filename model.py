"""The network: a LLaMA-style decoder, written out.

    tokens → embedding → n_layers × [RMSNorm → attention → + · RMSNorm → SwiGLU → +] → RMSNorm → logits

Module names are those of transformers' Llama (of Qwen3 with `qk_norm`), so that the state dict
loads there strictly and without renaming.

A tensor's name ends in its shape where that helps: B batch, T tokens, C model width (dim), V vocabulary,
H query heads, K key/value heads, D head width, S keys and values, N tokens with a loss.

Attention comes in two forms, the same function of the same weights: rows (B, T) that are each causal, and one packed
buffer (1, T) in which documents stand end to end and none sees another. A third, a few new tokens against a cache of
those before, is in common/generation.py.
"""

import functools
import inspect
import math
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from Config import LLMConfig, UserError

kernels = None  # common/kernels.py puts itself here: on a CPU in bf16 it computes some of this faster


def fast(x: torch.Tensor, width: int = 16) -> bool:
    """Whether `kernels` computes what comes next of x; `width`: how many numbers lie together."""
    return kernels is not None and kernels.take(x, width)


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / rms(x) * weight, 1 / rms(x)), rms over the last dimension and in float32 (Zhang & Sennrich 2019,
    arXiv:1910.07467)."""
    x32 = x.float()
    r = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x32 * r).to(x.dtype), r


class RMSNorm(nn.Module):
    """`normalise` with a weight of its own."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # the compiler fuses the plain form, forward and backward
            return normalise(x, self.weight, self.eps)[0]
        if x.is_cuda and x.dtype == self.weight.dtype == torch.float32:  # one kernel each way
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return (kernels.Normalise if fast(x, x.shape[-1]) else Normalise).apply(x, self.weight, self.eps)


class Normalise(torch.autograd.Function):
    """`normalise` with its gradient by hand, in half as many passes over memory as autograd takes.

    With r = 1 / rms(x), x̂ = x r and g = ∂L/∂y · weight:  ∂L/∂x = r (g - x̂ mean(g x̂)),  ∂L/∂weight = Σ ∂L/∂y x̂.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, r = normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, r = ctx.saved_tensors
        unit = (x.float() * r).to(torch.promote_types(grad_y.dtype, torch.float32))
        grad_times_unit = grad_y * unit
        with torch.autocast(x.device.type, enabled=False):  # a product, but not one to be rounded
            mean = (grad_times_unit @ weight.to(unit.dtype)).unsqueeze(-1) / x.shape[-1]
        grad_x = (grad_y * weight).to(unit.dtype).addcmul_(unit, mean, value=-1).mul_(r)
        return grad_x.to(x.dtype), grad_times_unit.flatten(0, -2).sum(0).to(weight.dtype), None


class RotaryEmbedding(nn.Module):
    """Rotary position embedding, rotate-half form (Su et al. 2021, arXiv:2104.09864).

    Dimension i of a head is paired with i + D/2, as in transformers' Llama; position p turns the
    pair by the angle p · theta^(-2i/D).
    """

    def __init__(self, head_dim: int, theta: float, max_seq_len: int):
        super().__init__()
        frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        angle = torch.outer(torch.arange(max_seq_len).float(), frequency)
        angle_SD = torch.cat((angle, angle), dim=-1)
        # tables, not weights: kept out of the state dict, and in float32 until they are used
        self.register_buffer("cos_SD", angle_SD.cos(), persistent=False)
        self.register_buffer("sin_SD", angle_SD.sin(), persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for positions (B, T): each (B, T, 1, D), to be broadcast over heads."""
        return self.cos_SD[positions].unsqueeze(2).to(dtype), self.sin_SD[positions].unsqueeze(2).to(dtype)


def rotate(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each head's pairs of dimensions by the angles behind cos and sin."""
    first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x_BTC, cos, sin, packing=None, wanted=None):
        c = self.config
        B, T, _ = x_BTC.shape
        heads = project(x_BTC, self.q_proj, self.k_proj, self.v_proj).view(B, T, -1, c.head_dim)
        q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=2)
        if c.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # under autocast a norm gives float32
        if packing is not None and fast(heads, c.head_dim // 2):  # rotation takes one half with the other
            heads = torch.cat((q, k, v), dim=2) if c.qk_norm else heads
            out = kernels.PackedAttention.apply(heads.flatten(0, 1), cos, sin, c.n_heads, packing)
        else:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            out = attend(q, k, v, causal=True) if packing is None else attend_packed(q, k, v, packing)
        return self.o_proj(select(out.reshape(B, T, c.n_heads * c.head_dim), wanted))


def select(x_BTC: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """The positions `wanted` (N,), none of them twice, of the flattened buffer as (1, N, C); all of x without."""
    return x_BTC if wanted is None else Collect.apply(x_BTC.flatten(0, 1), wanted).unsqueeze(0)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The precision of matrix products with x: autocast's where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def project(x: torch.Tensor, *layers: nn.Linear) -> torch.Tensor:
    """What several linear layers make of the same x, side by side, as one product: larger products are faster, and x
    is brought to the precision of the product once."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]))


def attend(q_BTHD, k_BSKD, v_BSKD, causal: bool, mask=None) -> torch.Tensor:
    """Scaled dot-product attention, (B, T, H, D). K and V are never copied out to H heads: the kernel groups."""
    if causal and q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.bfloat16:
        return attend_in_blocks(q_BTHD, k_BSKD, v_BSKD)
    return F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2),
        attn_mask=mask, is_causal=causal, enable_gqa=q_BTHD.shape[2] != k_BSKD.shape[2],
    ).transpose(1, 2)


def attend_in_blocks(q_BTHD, k_BTKD, v_BTKD, block: int = 128) -> torch.Tensor:
    """Causal attention as plain products, a block of queries at a time against the keys up to its end.

    For bf16 on a CPU, where the library's kernel takes two to three times as long for documents of up to 512 tokens
    (docs/LOG.md). Scores and probabilities are rounded to bf16.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.shape[2]  # each key/value head serves G = H / K query heads, stacked on top of one another
    q = (q_BTHD * D**-0.5).unflatten(2, (K, H // K)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (BK, G, T, D)
    k, v = k_BTKD.permute(0, 2, 3, 1).flatten(0, 1), v_BTKD.transpose(1, 2).flatten(0, 1)  # (BK, D, T), (BK, T, D)
    ahead = torch.full((block, block), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    outs = []
    for begin in range(0, T, block):
        end = min(begin + block, T)
        size = end - begin
        scores = torch.bmm(q[:, :, begin:end].flatten(1, 2), k[:, :, :end])
        scores = scores.unflatten(1, (-1, size))  # (BK, G, size, end)
        scores[..., begin:] += ahead[:size, :size]
        outs.append(torch.bmm(F.softmax(scores, dim=-1).flatten(1, 2), v[:, :end]).unflatten(1, (-1, size)))
    return torch.cat(outs, dim=2).unflatten(0, (B, K)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class Packing:
    """Where the documents of a packed buffer (1, T) lie: `lengths`, on the host, and `boundaries`, int32
    (documents + 1,) on the device, from 0 to T. `varlen` is the kernel that attends to all of them at once, or None,
    and `longest` the length of a document that it must expect.

    One object and not its parts is handed down, since torch.compile would compile anew for each list of lengths. For
    the same reason `longest` is the model's limit and not the length of the longest document here.
    """

    def __init__(self, lengths: list[int], boundaries: torch.Tensor, varlen: Callable | None = None, longest: int = 0):
        self.lengths, self.boundaries, self.varlen, self.longest = lengths, boundaries, varlen, longest
        self._alike = self._groups = None

    def positions(self) -> torch.Tensor:
        """Positions (1, T) that restart at 0 with each document; nothing here waits for the device."""
        place = torch.arange(sum(self.lengths), device=self.boundaries.device)
        document = torch.searchsorted(self.boundaries[1:], place, right=True)
        return (place - self.boundaries[document]).unsqueeze(0)

    def alike(self) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """Documents of about the same length put together: where those of a group start and how long they are, both
        int32 (documents,) on the CPU, and how long the longest is."""
        if self._alike is None:
            starts, members = [0, *accumulate(self.lengths)], []
            for document in sorted(range(len(self.lengths)), key=lambda d: -self.lengths[d]):
                if not members or self.lengths[document] < 0.8 * self.lengths[members[-1][0]] - 8:
                    members.append([])
                members[-1].append(document)
            self._alike = [(torch.tensor([starts[d] for d in group], dtype=torch.int32),
                            torch.tensor([self.lengths[d] for d in group], dtype=torch.int32),
                            self.lengths[group[0]]) for group in members]
        return self._alike

    def groups(self) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]:
        """The groups that are `alike`, each document made as long as the longest of its group: [(documents, length) of
        each group], where in the buffer each of the P places of all groups is read from, (P,), and at which of these
        places each of the buffer's T tokens stands, (T,)."""
        if self._groups is None:
            shapes, source, place, first = [], [], torch.empty(sum(self.lengths), dtype=torch.int64), 0
            for starts, lengths, longest in self.alike():
                shapes.append((len(starts), longest))
                last = lengths.long().unsqueeze(1) - 1
                offset = torch.arange(longest).expand(len(starts), longest)
                index = starts.unsqueeze(1) + offset.minimum(last)  # past its end a document repeats its last token
                source.append(index.flatten())
                inside = (offset <= last).flatten()
                place[source[-1][inside]] = torch.arange(first, first + len(inside))[inside]
                first += len(inside)
            device = self.boundaries.device
            self._groups = shapes, torch.cat(source).to(device), place.to(device)
        return self._groups


def boundaries_of(lengths: list[int]) -> torch.Tensor:
    """Where each document begins, and where the last one ends: int32 (documents + 1,) on the CPU."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


class Spread(torch.autograd.Function):
    """x (T, ...) → x[source] (P, ...). Only the places in `place` (T,), each of a token of its own, have a gradient;
    autograd does not know that and would add up all P, one after another."""

    @staticmethod
    def forward(ctx, x, source, place):
        ctx.save_for_backward(place)
        return x[source]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


class Collect(torch.autograd.Function):
    """The way back: x (P, ...) → x[place] (T, ...)."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.save_for_backward(place)
        ctx.shape = x.shape
        return x[place]

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], grad), None


def attend_packed(q_BTHD, k_BTKD, v_BTKD, packing: Packing) -> torch.Tensor:
    """Causal attention inside each document of a packed buffer, (1, T, H, D): one variable-length flash kernel where
    the packing has it, else documents of about the same length together."""
    if packing.varlen is None:
        return attend_in_groups(q_BTHD, k_BTKD, v_BTKD, packing)
    bounds, longest = packing.boundaries, packing.longest
    q, k, v = (x.squeeze(0) for x in (q_BTHD, k_BTKD, v_BTKD))  # x[0] would have a costly gradient
    return packing.varlen(q, k, v, bounds, bounds, longest, longest).unsqueeze(0)


def attend_in_groups(q_BTHD, k_BTKD, v_BTKD, packing: Packing) -> torch.Tensor:
    """`attend_packed` without a variable-length kernel: documents of about the same length together, as rows; shorter
    ones are padded at the end, and the causal mask hides the padding.

    `split` and not slices: its gradient is one concatenation, theirs a full-size zero tensor for each group.
    """
    shapes, source, place = packing.groups()
    sizes = [documents * length for documents, length in shapes]
    parts = (Spread.apply(x.squeeze(0), source, place).split(sizes) for x in (q_BTHD, k_BTKD, v_BTKD))
    outs = [attend(*(x.unflatten(0, shape) for x in qkv), causal=True).flatten(0, 1)
            for shape, *qkv in zip(shapes, *parts, strict=True)]
    return Collect.apply(torch.cat(outs), place).unsqueeze(0)


def use_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """True if the variable-length flash kernel can run: half precision on an Ampere GPU or later, heads of a multiple
    of 8 and at most 256 dimensions. Its backward pass is deterministic where torch is told to be."""
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
            and head_dim <= 256 and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(device) >= (8, 0) and varlen_kernel() is not None)


@functools.cache
def varlen_kernel() -> Callable | None:
    """torch's variable-length flash attention, causal, with grouped key/value heads; None where this torch has none.

    Asked for only where it can run: importing it takes a second.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    # earlier versions say is_causal=True, later ones window_size=(-1, 0): look back without limit, never ahead
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:  # earlier versions group without being asked
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = project(x, self.gate_proj, self.up_proj)
        if torch.compiler.is_compiling():  # the compiler fuses the plain form, forward and backward
            gate, up = gate_up.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)
        gated = (kernels.GatedSiLU if fast(gate_up, gate_up.shape[-1] // 2) else GatedSiLU).apply(gate_up)
        return self.down_proj(gated)


class GatedSiLU(torch.autograd.Function):
    """gate and up in one tensor (..., 2F) → silu(gate) * up (..., F). By hand, so that silu(gate) is computed again
    instead of kept."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate_up, = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)


class Block(nn.Module):
    """One layer: attention and SwiGLU, each behind a norm and added to the stream. With `wanted` only those positions
    come out, (1, N, C), and all after the attention, which sees every position, is computed for them alone."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def outputs(self) -> tuple[nn.Linear, nn.Linear]:
        """The projections into the residual stream."""
        return self.self_attn.o_proj, self.mlp.down_proj

    def forward(self, x_BTC, cos, sin, packing=None, wanted=None):
        attended = self.self_attn(self.input_layernorm(x_BTC), cos, sin, packing, wanted)
        x_BTC = select(x_BTC, wanted) + self.dropout(attended)
        return x_BTC + self.dropout(self.mlp(self.post_attention_layernorm(x_BTC)))


class Decoder(nn.Module):
    """Everything below the output projection: tokens (B, T) → hidden states (B, T, C), or those `wanted`, (1, N, C)."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.max_seq_len)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False

    def forward(self, tokens, lengths=None, boundaries=None, wanted=None):
        B, T = tokens.shape
        limit, longest = self.rotary.cos_SD.shape[0], max(lengths) if lengths is not None else T
        if longest > limit:
            raise UserError(f"a sequence of {longest} tokens is longer than the model's max_seq_len of {limit}")
        packing, positions = None, torch.arange(T, device=tokens.device).expand(B, T)
        if lengths is not None:
            if B != 1 or sum(lengths) != T or min(lengths) < 1:
                raise UserError(f"a packed buffer is (1, T) with lengths of at least 1 that sum to T, not ({B}, {T}) "
                                f"with lengths of at least {min(lengths)} that sum to {sum(lengths)}")
            if boundaries is None:
                boundaries = boundaries_of(lengths).to(tokens.device)
            dtype = product_dtype(self.embed_tokens.weight)
            varlen = varlen_kernel() if use_varlen(tokens.device, dtype, self.rotary.cos_SD.shape[1]) else None
            packing = Packing(lengths, boundaries, varlen, limit)
            positions = packing.positions()
        x_BTC = self.dropout(self.embed_tokens(tokens))
        cos, sin = self.rotary(positions, product_dtype(x_BTC))
        for block in self.layers:
            only = wanted if block is self.layers[-1] else None
            if self.gradient_checkpointing and self.training:
                x_BTC = checkpoint(block, x_BTC, cos, sin, packing, only, use_reentrant=False,
                                   preserve_rng_state=self.dropout.p > 0)
            else:
                x_BTC = block(x_BTC, cos, sin, packing, only)
        return self.norm(x_BTC)


class WeakWater(nn.Module):
    """The language model. `model(tokens (B, T))` gives logits (B, T, V).

    lengths            the documents in a packed buffer (1, T): each is attended to alone, from position 0
    boundaries         what boundaries_of(lengths) gives, on the device already, where the caller has it there
    target_index,      training: the positions (N,) in the flattened buffer that predict, the ids (N,) they should
    targets, weights   predict, and the loss weight (N,) of each. Returns the weighted *sum* of the cross-entropies
                       in nats, a float32 scalar, and no logits.

    Raises UserError when a sequence is longer than the config's max_seq_len, or lengths do not make up the buffer.
    """

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, 0.02); projections into the residual stream smaller by sqrt(2 · layers), so that the
        stream's variance does not grow with depth (GPT-2, Radford et al. 2019)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Block):
            for projection in module.outputs():
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layers))

    def zero_outputs(self) -> None:
        """Let every layer begin as the identity: nothing comes out of its projections into the residual stream (after
        Zhang et al. 2019, arXiv:1901.09321). Learns more from real text so (docs/PERFORMANCE.md, "Recipe")."""
        for block in self.model.layers:
            for projection in block.outputs():
                nn.init.zeros_(projection.weight)

    def forward(self, tokens, lengths=None, boundaries=None, target_index=None, targets=None, weights=None):
        # positions without a target cost no logits, and hardly anything in the last layer
        hidden_BTC = self.model(tokens, lengths, boundaries, wanted=target_index if targets is not None else None)
        if targets is None:
            return self.lm_head(hidden_BTC)
        return LinearCrossEntropy.apply(hidden_BTC.squeeze(0), self.lm_head.weight, targets, weights,
                                        torch.is_grad_enabled())

    def num_parameters(self) -> dict[str, int]:
        """Parameters by part; tied weights count once, with the embedding."""
        parts = {"embedding": self.model.embed_tokens.weight.numel(), "attention": 0, "mlp": 0, "norm": 0}
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parts["norm"] += parameter.numel()
            elif ".self_attn." in name:
                parts["attention"] += parameter.numel()
            elif ".mlp." in name:
                parts["mlp"] += parameter.numel()
        parts["lm_head"] = 0 if self.config.tie_embeddings else self.lm_head.weight.numel()
        return parts

    def flops_per_token(self, context: float) -> float:
        """Training FLOPs per token, forward and backward: 6N + 12·L·T·C, with N the parameters in matrix products
        and T the `context`, the tokens in a row (PaLM, Chowdhery et al. 2022, appendix B; causality not deducted)."""
        parts = self.num_parameters()
        head = self.config.vocab_size * self.config.dim
        return 6 * (parts["attention"] + parts["mlp"] + head) + 12 * self.config.n_layers * context * self.config.dim


class LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies of softmax(hidden (N, C) @ weight (V, C)ᵀ), without the (N, V) logits in memory.

    A block of rows at a time: logits, loss and at once both gradients, then the logits are dropped. With a
    vocabulary of 150,000 the logits of one micro-batch would fill a 24 GB card. (The idea: Liger kernel,
    Hsu et al. 2024, arXiv:2410.10989.)
    """

    BLOCK_LOGITS = 2**24  # logits at a time: 64 MiB in float32

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_weights, needs_grad=True):
        dtype = product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            weight_VC = weight.to(dtype)
            rows = max(64, LinearCrossEntropy.BLOCK_LOGITS // weight.shape[0])
            total = torch.zeros((), device=hidden.device, dtype=torch.promote_types(dtype, torch.float32))
            # gradients are formed with weights of at most 1, and scaled in float32: fp16 would overflow or lose them
            scale = loss_weights.amax().clamp_min(1e-30) if len(loss_weights) else torch.ones_like(total)
            grad_hidden = torch.empty_like(hidden, dtype=total.dtype) if needs_grad else None
            grad_weight = torch.zeros_like(weight) if needs_grad else None
            for start in range(0, hidden.shape[0], rows):
                block = slice(start, start + rows)
                hidden_NC = hidden[block].to(dtype)
                logits_NV = hidden_NC @ weight_VC.t()
                if fast(logits_NV):
                    relative = (loss_weights[block] / scale).float() if needs_grad else None
                    losses = kernels.cross_entropy(logits_NV, targets[block].contiguous(), relative)
                    total += (losses * loss_weights[block]).sum()
                    grad_NV = logits_NV  # overwritten
                else:
                    target_N1 = targets[block].unsqueeze(1)
                    loss_weight_N1 = loss_weights[block].unsqueeze(1).to(total.dtype)
                    log_prob_NV = F.log_softmax(logits_NV, dim=-1, dtype=total.dtype)
                    total -= (log_prob_NV.gather(1, target_N1) * loss_weight_N1).sum()
                    if needs_grad:  # d loss / d logits = (softmax - one_hot) · weight
                        grad_NV = log_prob_NV.exp_().mul_(loss_weight_N1 / scale)
                        grad_NV.scatter_add_(1, target_N1, -loss_weight_N1 / scale)
                        grad_NV = grad_NV.to(dtype)
                if needs_grad:
                    grad_hidden[block] = grad_NV @ weight_VC
                    grad_weight += grad_NV.t() @ hidden_NC
            if needs_grad:
                ctx.save_for_backward(grad_hidden.mul_(scale), grad_weight.mul_(scale))
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, None, None, None
