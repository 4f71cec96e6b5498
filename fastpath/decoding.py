"""Replacements of the network's forwards for decoding, where weights seldom change.

As in training.py, each function replaces one module's forward. Matrices that multiply the same vector are concatenated
and cast to the run's dtype once. On a CPU they are also stored in oneDNN's layout.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from fastpath.training import checked


def cache_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a KVCache: the compute dtype on a GPU; float32 on a CPU, where attention over the cache is several
    times as fast as in bf16 (docs/LOG.md)."""
    return torch.float32 if device.type == "cpu" else dtype


def versions(*weights: torch.Tensor) -> list[tuple]:
    """A value that changes when a weight changes. Writes through `.data` and to inference tensors go unnoticed."""
    return [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in weights]


class Matmul:
    """x (..., C) → x @ weightᵀ (..., out) in `dtype`. Holds one copy of several layers' weights (out, C), in the
    layout of the matmul library, and makes a new one after they change."""

    def __init__(self, dtype: torch.dtype, *layers: nn.Linear):
        self.dtype, self.layers, self.versions = dtype, layers, None
        if all("weight" in layer.__dict__.get("_parameters", ()) for layer in layers):  # false during deepcopy
            self.pack()

    def pack(self) -> None:
        self.versions = versions(*(layer.weight for layer in self.layers))
        weight = torch.cat([layer.weight.detach() for layer in self.layers]).to(self.dtype)
        self.weight, self.packed = weight, None
        if weight.device.type == "cpu" and self.dtype in (torch.float32, torch.bfloat16):
            with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):  # torch without oneDNN
                self.packed, self.weight = torch.ops.mkldnn._reorder_linear_weight(weight), None

    def __reduce__(self):  # a tensor in oneDNN's layout cannot be copied
        return Matmul, (self.dtype, *self.layers)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.versions != versions(*(layer.weight for layer in self.layers)):
            self.pack()
        x = x.to(self.dtype)
        if self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def attention_cached(self, x, cos, sin, packing=None, cache=None):
    """Attention of each row's next tokens to the cache; RoPE in float32."""
    if cache is None or torch.is_grad_enabled() or not checked(self, x):
        return self.without_cache(x, cos, sin, packing, cache)
    D, T = self.head_dim, x.shape[1]
    H, K = self.q_proj.out_features // D, self.k_proj.out_features // D
    q_and_k, v = self.qkv(x).unflatten(-1, (-1, D)).split([H + K, K], dim=2)
    if self.qk_norm:
        q_and_k = torch.cat((self.q_norm(q_and_k[:, :, :H]), self.k_norm(q_and_k[:, :, H:])), dim=2)
    first, second = q_and_k.chunk(2, dim=-1)
    q, k = (q_and_k * cos + torch.cat((-second, first), dim=-1) * sin).split([H, K], dim=2)
    prefill = cache.aligned and not cache.longest and T > 1
    keys, values = cache.store(self.layer, k, v)
    if prefill:  # the cache was empty: the new keys and values are all there are
        q, keys, values = q.to(v.dtype), k.to(v.dtype), v
    mask = None if prefill or T == 1 and cache.aligned else cache.mask(T)  # all rows see all slots
    with torch.autocast(x.device.type, enabled=False):  # autocast would copy all keys and values to its dtype
        mixed = F.scaled_dot_product_attention(
            q.to(keys.dtype).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask,
            is_causal=prefill, enable_gqa=H != K).transpose(1, 2)
    return self.output(mixed.flatten(2))


def swiglu_packed(self, x):
    """SwiGLU with two matmuls: gate and up are one."""
    if torch.is_grad_enabled() or not checked(self, x):
        return self.with_gradient(x)
    gate, up = self.gate_up(x).chunk(2, dim=-1)
    return self.down(F.silu(gate).mul_(up))


def linear_packed(self, x):
    """The output projection, from packed weights."""
    if torch.is_grad_enabled() or not checked(self, x):
        return type(self).forward(self, x)
    return self.matmul(x)
