"""The network: a decoder-only transformer like LLaMA, in plain PyTorch.

    tokens → embedding → n_layers × [RMSNorm → attention → + · RMSNorm → SwiGLU → +] → RMSNorm → logits

This file is the only definition of the network: change it here. `fastpath/` computes parts of it faster, each only
after a check that the result is the same. Module names are those of transformers' Llama (Qwen3 with `qk_norm`), so the
state dict loads there strictly and without renaming.

A tensor's name may end in its shape: B batch, T tokens, C model width (dim), V vocabulary, H query heads, K key/value
heads, D head width, S key/value positions, N positions with a loss.
"""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from Config import LLMConfig, UserError


class RMSNorm(nn.Module):
    """x / rms(x) · weight, rms over the last dimension and in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding, rotate-half form (Su et al. 2021, arXiv:2104.09864).

    Dimension i of a head is paired with i + D/2; position p rotates the pair by the angle p · theta^(-2i/D).
    """

    def __init__(self, head_dim: int, theta: float, max_seq_len: int):
        super().__init__()
        frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        angle = torch.outer(torch.arange(max_seq_len).float(), frequency)
        angle_SD = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos_SD", angle_SD.cos(), persistent=False)  # not a weight, so not in the state dict
        self.register_buffer("sin_SD", angle_SD.sin(), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for positions (B, T): (B, T, 1, D) each, to broadcast over heads."""
        return self.cos_SD[positions].unsqueeze(2), self.sin_SD[positions].unsqueeze(2)


def apply_rotary(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of dimensions of each head."""
    first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos.to(x_BTHD.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x_BTHD.dtype)


def attention(q_BTHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, mask=None) -> torch.Tensor:
    """Scaled dot-product attention with grouped heads, (B, T, H, D): causal, or where the mask (B, 1, T, S) is true."""
    return F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
        enable_gqa=q_BTHD.shape[2] != k_BSKD.shape[2]).transpose(1, 2)


class Packing:
    """The documents of a packed buffer (1, T): `lengths` on the host, and boundaries_of(lengths) on the device."""

    def __init__(self, lengths: list[int], boundaries: torch.Tensor):
        self.lengths, self.boundaries = lengths, boundaries

    def positions(self) -> torch.Tensor:
        """Positions (1, T) that restart at 0 in each document. Does not wait for the device."""
        index = torch.arange(sum(self.lengths), device=self.boundaries.device)
        document = torch.searchsorted(self.boundaries[1:], index, right=True)
        return (index - self.boundaries[document]).unsqueeze(0)


def boundaries_of(lengths: list[int]) -> torch.Tensor:
    """The start of each document and the end of the last one: int32 (documents + 1,) on the CPU."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


class KVCache:
    """Keys and values of the tokens so far, in buffers of fixed size (layers, B, K, S, D).

    Each row has its own position. Prompts of unequal length are padded at the end, then each row is rewound to its
    length. The mask hides the padding's entries until they are overwritten.
    """

    def __init__(self, config: LLMConfig, batch_size: int, length: int, device=None, dtype=None):
        shape = (config.n_layers, batch_size, config.n_kv_heads, length, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.filled_B = torch.zeros(batch_size, dtype=torch.int64, device=device)  # tokens of each row
        self.longest, self.aligned, self.room = 0, True, min(length, config.max_seq_len)  # on the host; all rows equal?

    def positions(self, T: int) -> torch.Tensor:
        """Positions (B, T) of the next T tokens of each row. Raises UserError if the cache has no room for them."""
        if self.longest + T > self.room:
            raise UserError(f"position {self.longest + T} is beyond the {self.room} that cache and context hold")
        return self.filled_B[:, None] + torch.arange(T, device=self.filled_B.device)

    def store(self, layer: int, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values of the next T tokens. Returns all keys and values so far, (B, S, K, D) each."""
        S, keys, values = self.longest + k_BTKD.shape[1], *(x[layer].transpose(1, 2) for x in (self.keys, self.values))
        if self.aligned:
            keys[:, self.longest:S], values[:, self.longest:S] = k_BTKD, v_BTKD
        else:
            rows_B1 = torch.arange(len(self.filled_B), device=keys.device).unsqueeze(1)
            positions_BT = self.positions(k_BTKD.shape[1])
            keys[rows_B1, positions_BT], values[rows_B1, positions_BT] = k_BTKD.to(keys.dtype), v_BTKD.to(keys.dtype)
        return keys[:, :S], values[:, :S]

    def mask(self, T: int) -> torch.Tensor:
        """(B, 1, T, S): each of the next T tokens attends to the slots up to its own."""
        return torch.arange(self.longest + T, device=self.keys.device) <= self.positions(T)[:, None, :, None]

    def advance(self, T: int) -> None:
        """Move every row by T tokens, after all layers have stored them."""
        self.filled_B, self.longest = self.filled_B + T, self.longest + T

    def rewind(self, lengths: list[int], rows: torch.Tensor | None = None) -> None:
        """Set the number of tokens of each row. With `rows`, first keep only these rows."""
        if rows is not None:
            self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.filled_B = torch.tensor(lengths, device=self.filled_B.device)
        self.longest, self.aligned = max(lengths), len(set(lengths)) == 1


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: LLMConfig, layer: int):
        super().__init__()
        self.head_dim, self.qk_norm, self.layer = config.head_dim, config.qk_norm, layer
        self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x_BTC, cos, sin, packing: Packing | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """Causal in each row; with `packing`, in each document; with `cache`, new tokens attend to all so far."""
        q, k, v = (p(x_BTC).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # norms return float32 under autocast
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.store(self.layer, k, v)
            mixed = attention(q.to(k.dtype), k, v, cache.mask(q.shape[1]))
        elif packing is not None:
            documents = zip(*(x.split(packing.lengths, dim=1) for x in (q, k, v)), strict=True)
            mixed = torch.cat([attention(*document) for document in documents], dim=1)
        else:
            mixed = attention(q, k, v)
        return self.o_proj(mixed.flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and SwiGLU, each applied to the normalized input and added to the residual stream."""

    def __init__(self, config: LLMConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def outputs(self) -> tuple[nn.Linear, nn.Linear]:  # the projections into the residual stream
        return self.self_attn.o_proj, self.mlp.down_proj

    def forward(self, x_BTC, cos, sin, packing=None, cache=None, rows=None) -> torch.Tensor:
        """With `rows` (N,), only these positions of the flattened buffer are computed after attention: (1, N, C)."""
        x_BTC = x_BTC + self.dropout(self.self_attn(self.input_layernorm(x_BTC), cos, sin, packing, cache))
        if rows is not None:
            x_BTC = x_BTC.flatten(0, 1).index_select(0, rows).unsqueeze(0)
        return x_BTC + self.dropout(self.mlp(self.post_attention_layernorm(x_BTC)))


class Transformer(nn.Module):
    """Everything before the output projection: tokens (B, T) → hidden states (B, T, C), or (1, N, C) of `rows`."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.max_seq_len)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False

    def forward(self, tokens, positions, packing=None, cache=None, rows=None) -> torch.Tensor:
        x_BTC = self.dropout(self.embed_tokens(tokens))
        cos, sin = self.rotary(positions)
        for block in self.layers:
            only = rows if block is self.layers[-1] else None
            if self.gradient_checkpointing and self.training:
                x_BTC = checkpoint(block, x_BTC, cos, sin, packing, None, only, use_reentrant=False,
                                   preserve_rng_state=self.dropout.p > 0)
            else:
                x_BTC = block(x_BTC, cos, sin, packing, cache, only)
        return self.norm(x_BTC)


class WeakWater(nn.Module):
    """The language model. `model(tokens (B, T))` returns logits (B, T, V), or with

    lengths            `tokens` is a packed buffer (1, T) of documents: attention stays inside each, positions restart
    boundaries         boundaries_of(lengths), if the caller already has it on the device
    target_index       return logits (N, V) of these positions (N,) of the flattened buffer only
    targets, weights   for training: the ids (N,) to predict at these positions, and their loss weights (N,). Returns
                       the weighted *sum* of the cross-entropies in nats, at least float32, instead of logits
    cache              a KVCache: `tokens` are the next tokens of each row

    Raises UserError if a sequence is longer than max_seq_len, or if lengths do not add up to the buffer."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, 0.02); projections into the residual stream / sqrt(2 · layers) (GPT-2, Radford et al. 2019)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Block):
            for projection in module.outputs():
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layers))

    def zero_init_residual(self) -> None:
        """Make every layer start as the identity (after Zhang et al. 2019, arXiv:1901.09321; docs/PERFORMANCE.md)."""
        for block in self.model.layers:
            for projection in block.outputs():
                nn.init.zeros_(projection.weight)

    def forward(self, tokens, lengths=None, boundaries=None, target_index=None, targets=None, weights=None, cache=None):
        (B, T), packing, limit = tokens.shape, None, self.config.max_seq_len
        longest = T if lengths is None else max(lengths)
        if longest > limit:
            raise UserError(f"a sequence of {longest} tokens is longer than the model's max_seq_len of {limit}")
        if lengths is not None:
            if B != 1 or sum(lengths) != T or min(lengths) < 1:
                raise UserError(f"a packed buffer is (1, T), its lengths at least 1 and T in all, not ({B}, {T}) with "
                                f"lengths of at least {min(lengths)} and {sum(lengths)} in all")
            packing = Packing(lengths, boundaries_of(lengths).to(tokens.device) if boundaries is None else boundaries)
            positions = packing.positions()
        elif cache is not None:
            positions = cache.positions(T)
        else:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        hidden_BTC = self.model(tokens, positions, packing, cache, target_index)
        if cache is not None:
            cache.advance(T)
        hidden = hidden_BTC if target_index is None else hidden_BTC.squeeze(0)  # (N, C)
        return self.lm_head(hidden) if targets is None else self.loss(hidden, targets, weights)

    def loss(self, hidden_NC: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the cross-entropies in nats, at least float32."""
        logits_NV = (logits := self.lm_head(hidden_NC)).to(torch.promote_types(logits.dtype, torch.float32))
        return (F.cross_entropy(logits_NV, targets, reduction="none") * weights).sum()

    def num_parameters(self) -> dict[str, int]:
        """The number of parameters by part. Tied weights count once, as embedding."""
        parts = {"embedding": self.model.embed_tokens.weight.numel(), "attention": 0, "mlp": 0, "norm": 0}
        for name, parameter in self.named_parameters():
            part = next((part for part in ("norm", "attn", "mlp") if part in name), None)
            if part is not None:
                parts[{"attn": "attention"}.get(part, part)] += parameter.numel()
        parts["lm_head"] = 0 if self.config.tie_embeddings else self.lm_head.weight.numel()
        return parts

    def flops_per_token(self, context: float) -> float:
        """Training FLOPs per token, forward and backward: 6N + 12·L·T·H·D, where N counts the parameters in matmuls and
        T is the `context` in tokens (PaLM, Chowdhery et al. 2022, appendix B; the causal mask is not deducted)."""
        parts, c = self.num_parameters(), self.config
        matmuls = parts["attention"] + parts["mlp"] + c.vocab_size * c.dim
        return 6 * matmuls + 12 * c.n_layers * context * c.n_heads * c.head_dim
