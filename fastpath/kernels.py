"""Calls kernels.c through ctypes: the operations between matmuls for bf16 training on a CPU.

Each takes fewer passes over memory than model.py's operations, and rounds once where they round several times.
fastpath/training.py uses them.
"""

import functools
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p

import torch
from torch.autograd.function import once_differentiable

from fastpath.native import library

ARGUMENTS = {  # argument types of the functions of kernels.c, without the last, the number of threads
    "rms_norm": [c_void_p, c_int, c_void_p, c_float, c_int64, c_int, c_void_p, c_void_p],
    "rms_norm_backward": [c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_void_p, c_void_p],
    "gated_silu": [c_void_p, c_int64, c_int, c_void_p],
    "gated_silu_backward": [c_void_p, c_void_p, c_int64, c_int, c_void_p],
    "pack_heads": [c_void_p, c_int64, *[c_int] * 3, *[c_void_p] * 2, *[c_int] * 2, *[c_void_p] * 3],
    "causal_softmax": [c_void_p, *[c_int] * 5, c_float],
    "causal_softmax_backward": [*[c_void_p] * 2, *[c_int] * 5, c_float],
    "cross_entropy": [*[c_void_p] * 3, c_int64, c_int, c_void_p],
}
ARGUMENTS["unpack_heads"] = ARGUMENTS["pack_heads"]
BLOCK = 128  # queries per block of scores


@functools.cache
def compiled() -> CDLL | None:
    """The compiled library; None if there is no compiler."""
    loaded = library()[0]
    if loaded is not None:
        for name, types in ARGUMENTS.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = [*types, c_int], None
    return loaded


def why_unavailable() -> str | None:
    """The reason why kernels.c cannot be used; None if it can."""
    if compiled() is None:
        return f"kernels.c was not compiled: {library()[1]}"
    if not compiled().has_openmp() and torch.get_num_threads() > 1:
        return f"kernels.c, {library()[1]}, would use one of {torch.get_num_threads()} threads"
    return None


def require(condition: bool) -> None:
    """Raises ValueError unless the condition holds: C would read and write out of bounds."""
    if not condition:
        raise ValueError("kernels.c does not support a tensor of this shape or dtype")


def call(name: str, *arguments) -> None:
    """Call a function of kernels.c. Tensors are passed as addresses: the caller has checked shapes and dtypes."""
    for each in arguments:
        assert not isinstance(each, torch.Tensor) or each.is_contiguous() and each.device.type == "cpu"
    getattr(compiled(), name)(*(each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments),
                              torch.get_num_threads())


def empty(*shape: int) -> torch.Tensor:
    """An uninitialized float32 tensor on the CPU, whatever torch's defaults are."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm as in model.py, but the result is in bf16: a matmul would round it to that anyway."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        require(x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1:] == weight.shape and len(weight) % 16 == 0)
        y, r = torch.empty_like(x, dtype=torch.bfloat16), empty(x.numel() // x.shape[-1])
        call("rms_norm", x, x.dtype == torch.bfloat16, weight.float(), eps, len(r), x.shape[-1], y, r)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, r = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), empty(torch.get_num_threads(), x.shape[-1]).zero_()
        call("rms_norm_backward", x, x.dtype == torch.bfloat16, weight.float(), r, grad_y.contiguous(), len(r),
             x.shape[-1], grad_x, grad_weight)
        return grad_x, grad_weight.sum(0).to(weight.dtype), None


class GatedSiLU(torch.autograd.Function):
    """gate and up in one tensor (..., 2F) → silu(gate) · up (..., F)."""

    @staticmethod
    def forward(ctx, gate_up):
        require(gate_up.dtype == torch.bfloat16 and gate_up.is_contiguous() and gate_up.shape[-1] % 32 == 0)
        ctx.save_for_backward(gate_up)
        width = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], width)
        call("gated_silu", gate_up, y.numel() // width, width, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        gate_up, = ctx.saved_tensors
        grad, width = torch.empty_like(gate_up), grad_y.shape[-1]
        call("gated_silu_backward", gate_up, grad_y.contiguous(), grad_y.numel() // width, width, grad)
        return grad


class PackedAttention(torch.autograd.Function):
    """RoPE and causal attention within each document: queries, keys and values (T, H + 2K, D) of a buffer → (T, H, D).

    Computes one block of queries at a time. The G query heads that share a key/value head are adjacent.
    """

    @staticmethod
    def forward(ctx, heads_TWD, cos, sin, n_heads, buckets):
        T, width, D = heads_TWD.shape
        require(heads_TWD.is_contiguous() and heads_TWD.dtype == cos.dtype == sin.dtype == torch.bfloat16)
        require(D % 32 == 0 and cos.numel() == sin.numel() == T * D)
        K, cos, sin = (width - n_heads) // 2, cos.contiguous(), sin.contiguous()
        out, saved, G = heads_TWD.new_empty(T, n_heads, D), [], n_heads // K
        for starts, lengths, longest in buckets:
            where, batch = (starts, lengths, len(starts), longest), len(starts) * K
            q, k, v = (heads_TWD.new_empty(batch, longest * g, D) for g in (G, 1, 1))
            for rows, part, g, angles in head_parts(q, k, v, heads_TWD, cos, sin, n_heads):
                call("pack_heads", part.data_ptr(), width * D, part.shape[1], g, D, *where, *angles, rows)
            attended, probabilities = torch.empty_like(q), []
            for begin in range(0, longest, BLOCK):
                end = min(begin + BLOCK, longest)
                queries = slice(begin * G, end * G)
                scores = torch.bmm(q[:, queries], k[:, :end].transpose(1, 2))
                call("causal_softmax", scores, batch, scores.shape[1], end, begin, G, D**-0.5)
                attended[:, queries] = torch.bmm(scores, v[:, :end])
                probabilities.append(scores)
            call("unpack_heads", out, n_heads * D, n_heads, G, D, *where, None, None, attended)
            saved += [q, k, v, *probabilities]
        ctx.save_for_backward(cos, sin, *saved)
        ctx.buckets, ctx.K = buckets, K
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THD):
        (T, n_heads, D), K, grad_THD = grad_THD.shape, ctx.K, grad_THD.contiguous()
        G, (cos, sin, *saved), saved_here = n_heads // K, ctx.saved_tensors, 0
        grad = grad_THD.new_empty(T, n_heads + 2 * K, D)
        for starts, lengths, longest in ctx.buckets:
            where, batch, blocks = (starts, lengths, len(starts), longest), len(starts) * K, range(0, longest, BLOCK)
            q, k, v, *probabilities = saved[saved_here:saved_here + 3 + len(blocks)]
            saved_here += 3 + len(blocks)
            grad_out, grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(q), None, None
            call("pack_heads", grad_THD, n_heads * D, n_heads, G, D, *where, None, None, grad_out)
            # in reverse: the last block attends to all keys, so its gradients have full size
            for begin, p in reversed(list(zip(blocks, probabilities, strict=True))):
                end = min(begin + BLOCK, longest)
                queries = slice(begin * G, end * G)
                scores = torch.bmm(grad_out[:, queries], v[:, :end].transpose(1, 2))
                call("causal_softmax_backward", p, scores, batch, scores.shape[1], end, begin, G, D**-0.5)
                grad_q[:, queries] = torch.bmm(scores, k[:, :end])
                of_k = torch.bmm(scores.transpose(1, 2), q[:, queries])
                of_v = torch.bmm(p.transpose(1, 2), grad_out[:, queries])
                if grad_k is None:
                    grad_k, grad_v = of_k, of_v
                else:
                    grad_k[:, :end] += of_k
                    grad_v[:, :end] += of_v
            for rows, part, g, angles in head_parts(grad_q, grad_k, grad_v, grad, cos, sin, n_heads):
                call("unpack_heads", part.data_ptr(), (n_heads + 2 * K) * D, part.shape[1], g, D, *where, *angles, rows)
        return grad, None, None, None, None


def head_parts(q, k, v, heads_TWD, cos, sin, n_heads: int):
    """For q, k and v: (its rows, its part of the buffer, heads per group, cos and sin or None)."""
    K = (heads_TWD.shape[1] - n_heads) // 2
    return zip((q, k, v), heads_TWD.split([n_heads, K, K], 1), (n_heads // K, 1, 1),
               ((cos, sin), (cos, sin), (None, None)), strict=True)


def cross_entropy(logits_NV: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Losses (N,) in nats. With weights (N,), the logits are overwritten with the gradient of the weighted sum.

    Raises ValueError if the lengths differ or a target is outside the vocabulary: C would read and write out of bounds.
    """
    assert logits_NV.dtype == torch.bfloat16 and targets.dtype == torch.int64
    assert weights is None or weights.dtype == torch.float32
    if not len(logits_NV) == len(targets) == (len(targets) if weights is None else len(weights)):
        raise ValueError(f"{len(logits_NV)} rows of logits, but {len(targets)} targets and "
                         f"{len(targets) if weights is None else len(weights)} weights")
    if len(targets):
        low, high = targets.aminmax()
        if low < 0 or high >= logits_NV.shape[1]:
            raise ValueError(f"targets from {low} to {high} are outside a vocabulary of {logits_NV.shape[1]} ids")
    losses = empty(len(targets))
    call("cross_entropy", logits_NV, targets, weights, *logits_NV.shape, losses)
    return losses
