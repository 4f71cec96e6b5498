"""Optimizers and learning-rate schedules."""

import functools
import math

import torch

from common.runtime import DTYPES, pick_dtype
from Config import UserError
from model import WeakWater


def make_optimizers(model: WeakWater, name: str, learning_rate: float, weight_decay: float, beta2: float = 0.95,
                    weight_decay_on: str = "matrices") -> list[torch.optim.Optimizer]:
    """Returns [AdamW], or [Muon, AdamW] with Muon for the matrices inside the layers.

    `weight_decay_on` is "matrices" or "all" (norm scales too).
    AdamW: Loshchilov & Hutter 2019 (arXiv:1711.05101), betas 0.9 and `beta2`.
    Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon). Its update is scaled to the size of AdamW's
    (Moonlight, arXiv:2502.16982), so that one learning rate suits both.
    """
    named = dict(model.named_parameters())  # tied weights appear once
    hidden = [p for n, p in named.items() if p.ndim == 2 and n.startswith("model.layers.")] if name == "muon" else []
    in_muon = {id(p) for p in hidden}
    rest = [p for p in named.values() if id(p) not in in_muon]
    vector_decay = weight_decay if weight_decay_on == "all" else 0.0
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": vector_decay}]
    adamw = AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=True)
    if name != "muon":
        return [adamw]
    muon = Muon(hidden, lr=learning_rate, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def unwrapped(method):
    """An optimizer's method without torch's `_disable_dynamo` wrapper, which imports torch._dynamo on its first call.

    No optimizer is compiled here, and the import would delay the first step of every run by about 1 s (1.0 s on 2 CPU
    cores): python -c "import time, torch; t = time.time(); import torch._dynamo; print(time.time() - t)"
    """
    return getattr(method, "__wrapped__", method)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with `unwrapped` methods."""

    step = torch.no_grad()(unwrapped(torch.optim.AdamW.step))
    add_param_group = unwrapped(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrapped(torch.optim.Optimizer.zero_grad)
    state_dict = unwrapped(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrapped(torch.optim.Optimizer.load_state_dict)


class Muon(torch.optim.Muon):
    """torch.optim.Muon with one batched matmul for all matrices of the same shape.

    torch's own processes one matrix at a time, and the matrices of a small model cannot occupy even two cores. Results
    differ only by bfloat16 rounding. Implements only what `make_optimizers` uses: Nesterov momentum and adjust_lr_fn
    "match_rms_adamw".
    """

    add_param_group, zero_grad = AdamW.add_param_group, AdamW.zero_grad
    state_dict, load_state_dict = AdamW.state_dict, AdamW.load_state_dict

    @torch.no_grad()
    def step(self) -> None:
        """One optimizer step on every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            directions = torch._foreach_lerp(grads, momenta, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            by_shape = {}  # (short side, long side) → (parameter, direction) pairs, wide and tall
            for p, direction in zip(params, directions, strict=True):
                by_shape.setdefault((min(p.shape), max(p.shape)), []).append((p, direction))
            for (short, long), pairs in by_shape.items():
                wide = torch.stack([d if len(d) == short else d.T for _, d in pairs])
                updates = newton_schulz(wide, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update if len(p) == short else update.T, alpha=-0.2 * math.sqrt(long) * group["lr"])


@functools.cache
def matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the device's fastest matmuls: bfloat16; float16 on GPUs without it; else float32."""
    return DTYPES[pick_dtype("auto", device)[0]]


def newton_schulz(matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int,
                  eps: float) -> torch.Tensor:
    """Orthogonalize matrices (N, short, long): U S Vᵀ → about U Vᵀ, by Newton–Schulz iteration in `matmul_dtype`.

    Singular values end between 0.7 and 1.2, except those that are tiny next to the largest: these grow but stay
    smaller.
    """
    a, b, c = coefficients
    dtype = matmul_dtype(matrices.device)
    x = matrices if dtype == torch.float16 else matrices.to(dtype)  # small gradients underflow in float16: scale first
    x = (x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def learning_rate(step: int, total_steps: int, peak: float, schedule: str, warmup_ratio: float,
                  decay_ratio: float, min_lr_ratio: float) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    Linear warmup over warmup_ratio of the steps, then one of three schedules. constant: the peak. cosine: from the peak
    to peak · min_lr_ratio (arXiv:1608.03983). trapezoid (WSD, warmup-stable-decay): the peak until the last decay_ratio
    of the steps, then linear decay (Hägele et al. 2024, arXiv:2405.18392).
    """
    warmup = round(warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "trapezoid":
        decay = max(1, round(decay_ratio * total_steps))
        share = min(1.0, (total_steps - step) / decay)
    else:
        raise UserError(f"--lr_schedule {schedule}: must be constant, cosine or trapezoid")
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * share)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value
