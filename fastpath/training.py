"""Replacements of the network's forwards for training and scoring: the same results with fewer operations.

Each function replaces a method of one module (`fastpath.accelerate`), so `self` is the module. If the replacement was
not checked for the input's device and dtype, it calls model.py's method. Nothing here defines the network.
"""

import functools
import inspect
import math
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import model as network
from fastpath import kernels
from model import Packing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of matmuls with x: autocast's if it is on, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def checked(module: nn.Module, x: torch.Tensor) -> bool:
    """True if the module's replacement was checked for the device and compute dtype of x."""
    device, dtype = module.checked_for
    return x.device.type == device and compute_dtype(x) == dtype  # device first: not all devices support autocast


def fused_linear(x: torch.Tensor, *layers: nn.Linear) -> torch.Tensor:
    """Apply several linear layers to x with one matmul. Larger matmuls are faster, and x is cast only once."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]))


# ---------------------------------------------------------------------------------------------
# RMSNorm


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm with a handwritten gradient, which takes half as many passes over memory as autograd's.

    With r = 1 / rms(x), x̂ = x r and g = ∂L/∂y · weight:  ∂L/∂x = r (g - x̂ mean(g x̂)),  ∂L/∂weight = Σ ∂L/∂y x̂.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.float()
        r = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return weight * (x32 * r).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, r = ctx.saved_tensors
        unit = (x.float() * r).to(torch.promote_types(grad_y.dtype, torch.float32))
        grad_times_unit = grad_y * unit
        with torch.autocast(x.device.type, enabled=False):  # this matmul must not be rounded
            mean = (grad_times_unit @ weight.to(unit.dtype)).unsqueeze(-1) / x.shape[-1]
        grad_x = (grad_y * weight).to(unit.dtype).addcmul_(unit, mean, value=-1).mul_(r)
        return grad_x.to(x.dtype), grad_times_unit.flatten(0, -2).sum(0).to(weight.dtype), None


def norm_torch(self, x):
    """RMSNorm with the handwritten gradient, in torch operations."""
    return RMSNormFunction.apply(x, self.weight, self.eps) if checked(self, x) else type(self).forward(self, x)


def norm_cuda(self, x):
    """RMSNorm in float32: one CUDA kernel forward, one backward."""
    if checked(self, x) and x.dtype == self.weight.dtype == torch.float32:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
    return norm_torch(self, x)  # queries and keys in half precision


def norm_c(self, x):
    """RMSNorm in kernels.c, but not for the small inputs of decoding: there its threads compete with torch's, which
    costs 1.7 of 13 ms per step of 16 rows."""
    few = x.numel() < 2**16 and not torch.is_grad_enabled()
    if few or not checked(self, x) or x.dtype not in (torch.float32, torch.bfloat16) or x.shape[-1] % 16:
        return type(self).forward(self, x)
    return kernels.RMSNormFunction.apply(x, self.weight, self.eps)


# ---------------------------------------------------------------------------------------------
# SwiGLU


class GatedSiLU(torch.autograd.Function):
    """gate and up in one tensor (..., 2F) → silu(gate) · up (..., F). The backward pass recomputes silu(gate)."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate_up, = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)


def swiglu_torch(self, x):
    """SwiGLU with one matmul for gate and up."""
    if not checked(self, x):
        return type(self).forward(self, x)
    return self.down_proj(GatedSiLU.apply(fused_linear(x, self.gate_proj, self.up_proj)))


def swiglu_c(self, x):
    """SwiGLU with one matmul for gate and up, and kernels.c after it."""
    if not checked(self, x):
        return type(self).forward(self, x)
    return self.down_proj(kernels.GatedSiLU.apply(fused_linear(x, self.gate_proj, self.up_proj)))


# ---------------------------------------------------------------------------------------------
# packed attention


def group_length(length: int) -> int:
    """The padded length of a document: one of 16, 24, 32, 48, 64, 96, …. For each new size of a matmul oneDNN compiles
    code, which may take longer than the matmul, so there should be few."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class LengthBuckets:
    """The documents of a packed buffer (1, T), grouped by similar length.

    groups          (starts, lengths, longest) per group: int32 (documents,) on the CPU, and an int
    shapes          (documents, longest) per group
    padded_index    (P,): for each slot of the padded groups, its token in the buffer
    unpadded_index  (T,): for each token of the buffer, its slot in the padded groups
    Shorter documents of a group are padded at the end with their last token; the causal mask hides the padding.
    """

    def __init__(self, packing: Packing):
        starts, members = [0], []
        for length in packing.lengths:
            starts.append(starts[-1] + length)
        lengths = packing.lengths
        for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
            size = group_length(lengths[document])
            if not members or size != group_length(lengths[members[-1][0]]):
                members.append([])
            members[-1].append(document)
        self.groups = [(torch.tensor([starts[d] for d in group], dtype=torch.int32),
                        torch.tensor([lengths[d] for d in group], dtype=torch.int32), group_length(lengths[group[0]]))
                       for group in members]
        self.shapes = [(len(group), longest) for group, (_, _, longest) in zip(members, self.groups, strict=True)]
        self.device, self.n_tokens = packing.boundaries.device, starts[-1]

    @functools.cached_property
    def index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(padded_index, unpadded_index), on the device."""
        padded_index, unpadded_index, first = [], torch.empty(self.n_tokens, dtype=torch.int64), 0
        for starts, lengths, longest in self.groups:
            last = lengths.long().unsqueeze(1) - 1
            offset = torch.arange(longest).expand(len(starts), longest)
            padded_index.append((starts.unsqueeze(1) + offset.minimum(last)).flatten())
            inside = (offset <= last).flatten()
            unpadded_index[padded_index[-1][inside]] = torch.arange(first, first + len(inside))[inside]
            first += len(inside)
        return torch.cat(padded_index).to(self.device), unpadded_index.to(self.device)


_BUCKETS = weakref.WeakKeyDictionary()  # filled by the first layer, read by the others and by the backward pass


def length_buckets(packing: Packing) -> LengthBuckets:
    """Group the documents of a buffer by similar length, once per buffer."""
    if packing not in _BUCKETS:
        _BUCKETS[packing] = LengthBuckets(packing)
    return _BUCKETS[packing]


class Gather(torch.autograd.Function):
    """x (T, ...) → x[padded_index] (P, ...). The gradient is a plain index: each token has one slot in
    `unpadded_index` (T,), and padding has no gradient. Autograd cannot know that and would add up all P slots."""

    @staticmethod
    def forward(ctx, x, padded_index, unpadded_index):
        ctx.save_for_backward(unpadded_index)
        return x[padded_index]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


class Scatter(torch.autograd.Function):
    """The inverse of Gather: x (P, ...) → x[unpadded_index] (T, ...)."""

    @staticmethod
    def forward(ctx, x, unpadded_index):
        ctx.save_for_backward(unpadded_index)
        ctx.shape = x.shape
        return x[unpadded_index]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], grad), None


def causal_attention(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor) -> torch.Tensor:
    """Causal attention within each row, (B, T, H, D)."""
    if q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.bfloat16:
        return attention_in_blocks(q_BTHD, k_BTKD, v_BTKD)
    return F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2), is_causal=True,
        enable_gqa=q_BTHD.shape[2] != k_BTKD.shape[2]).transpose(1, 2)


def attention_in_blocks(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor,
                        block: int = 128) -> torch.Tensor:
    """Causal attention as plain matmuls: each block of queries attends to the keys up to its end.

    For bf16 on a CPU: torch's kernel takes two to three times as long for documents of up to 512 tokens (docs/LOG.md).
    Scores and probabilities are rounded to bf16.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.shape[2]  # G = H / K query heads share a key/value head and are stacked along T
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


def project_heads(self, x_BTC: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v of an Attention before RoPE, with one matmul: (B, T, H or K, D) each."""
    D = self.head_dim
    heads = fused_linear(x_BTC, self.q_proj, self.k_proj, self.v_proj).unflatten(-1, (-1, D))
    q, k, v = heads.split([p.out_features // D for p in (self.q_proj, self.k_proj, self.v_proj)], dim=2)
    if self.qk_norm:
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
    return q, k, v


def attention_buckets(self, x, cos, sin, packing=None, cache=None):
    """Attention in rows of documents of similar length.

    Uses `split`, not slices: the gradient of `split` is one concatenation; that of a slice is a full-size zero tensor
    for each group.
    """
    if cache is not None or not checked(self, x):
        return type(self).forward(self, x, cos, sin, packing, cache)
    q, k, v = project_heads(self, x)
    q, k = network.apply_rotary(q, cos, sin), network.apply_rotary(k, cos, sin)
    if packing is None:
        return self.o_proj(causal_attention(q, k, v).flatten(2))
    buckets = length_buckets(packing)
    padded_index, unpadded_index = buckets.index
    sizes = [documents * longest for documents, longest in buckets.shapes]
    parts = (Gather.apply(x.squeeze(0), padded_index, unpadded_index).split(sizes) for x in (q, k, v))
    outs = [causal_attention(*(x.unflatten(0, shape) for x in qkv)).flatten(0, 1)
            for shape, *qkv in zip(buckets.shapes, *parts, strict=True)]
    return self.o_proj(Scatter.apply(torch.cat(outs), unpadded_index).flatten(1).unsqueeze(0))


def attention_c(self, x, cos, sin, packing=None, cache=None):
    """RoPE and attention in kernels.c."""
    if packing is None or cache is not None or not checked(self, x):
        return attention_buckets(self, x, cos, sin, packing, cache)
    heads = fused_linear(x, self.q_proj, self.k_proj, self.v_proj).unflatten(-1, (-1, self.head_dim))
    H, K = (p.out_features // self.head_dim for p in (self.q_proj, self.k_proj))
    if self.qk_norm:
        q, k, v = heads.split([H, K, K], dim=2)
        heads = torch.cat((self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v), dim=2)
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    out = kernels.PackedAttention.apply(heads.flatten(0, 1), cos, sin, H, length_buckets(packing).groups)
    return self.o_proj(out.flatten(1).unsqueeze(0))


def attention_varlen(self, x, cos, sin, packing=None, cache=None):
    """Attention of all documents in one variable-length flash kernel. It works inside a compiled graph, since it needs
    no value on the host: the maximum length is the model's limit."""
    if packing is None or cache is not None or not checked(self, x):
        return type(self).forward(self, x, cos, sin, packing, cache)
    q, k, v = project_heads(self, x)
    q, k = network.apply_rotary(q, cos, sin), network.apply_rotary(k, cos, sin)
    q, k, v = (heads.squeeze(0) for heads in (q, k, v))  # the gradient of x[0] would be costly
    bounds, longest = packing.boundaries, self.longest
    out = self.varlen_kernel(q, k, v, bounds, bounds, longest, longest)
    return self.o_proj(out.flatten(1).unsqueeze(0))


def use_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """True if the variable-length flash kernel can run: half precision on an Ampere GPU or later, heads whose
    width is a multiple of 8 and at most 256. Its backward pass is deterministic with --deterministic."""
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
            and head_dim <= 256 and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(device) >= (8, 0) and varlen_kernel() is not None)


@functools.cache
def varlen_kernel() -> Callable | None:
    """torch's variable-length flash attention, causal, with grouped key/value heads; None if this torch lacks it.

    Called only on a GPU that can run it: the import takes a second.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    # earlier versions take is_causal=True, later ones window_size=(-1, 0): no limit to the left, nothing to the right
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:  # earlier versions always allow grouped heads
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)


# ---------------------------------------------------------------------------------------------
# the loss


class LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies of softmax(hidden (N, C) @ weight (V, C)ᵀ), without the (N, V) logits in memory.

    For each block of rows, the forward pass computes logits, loss and both gradients, and frees the logits. With a
    vocabulary of 150,000 the logits of one micro-batch would fill a 24 GB GPU. The idea is from Liger Kernel
    (Hsu et al. 2024, arXiv:2410.10989).
    """

    BLOCK_LOGITS = 2**24  # logits per block: 64 MiB in float32

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_weights, needs_grad=True, use_c=False):
        dtype = compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            weight_VC = weight.to(dtype)
            rows = max(64, LinearCrossEntropy.BLOCK_LOGITS // weight.shape[0])
            total = torch.zeros((), device=hidden.device, dtype=torch.promote_types(dtype, torch.float32))
            # gradients use weights of at most 1 and are scaled back in float32: fp16 would overflow or underflow
            scale = loss_weights.amax().clamp_min(1e-30) if len(loss_weights) else torch.ones_like(total)
            grad_hidden = torch.empty_like(hidden, dtype=total.dtype) if needs_grad else None
            grad_weight = torch.zeros_like(weight) if needs_grad else None
            for start in range(0, hidden.shape[0], rows):
                block = slice(start, start + rows)
                hidden_NC = hidden[block].to(dtype)
                logits_NV = hidden_NC @ weight_VC.t()
                if use_c:
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
    @once_differentiable
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, None, None, None, None


def loss_blocks(self, hidden_NC, targets, weights):
    """The loss, one block of rows at a time."""
    if not checked(self, hidden_NC) or weights.requires_grad:
        return type(self).loss(self, hidden_NC, targets, weights)
    return LinearCrossEntropy.apply(hidden_NC, self.lm_head.weight, targets, weights, torch.is_grad_enabled())


def loss_c(self, hidden_NC, targets, weights):
    """The loss, one block of rows at a time, with softmax and its gradient in kernels.c."""
    if not checked(self, hidden_NC) or weights.requires_grad:
        return type(self).loss(self, hidden_NC, targets, weights)
    return LinearCrossEntropy.apply(hidden_NC, self.lm_head.weight, targets, weights, torch.is_grad_enabled(), True)
