"""Optimizers and learning-rate schedules."""

import functools
import math

import torch

from common.runtime import DTYPES, pick_dtype
from Config import UserError
from model import WeakWater


def make_optimizers(model: WeakWater, name: str, learning_rate: float, weight_decay: float, beta2: float = 0.95,
                    decayed: str = "matrices") -> list[torch.optim.Optimizer]:
    """[AdamW], or [Muon, AdamW] with Muon on the matrices inside the layers. `decayed`: "matrices", or "all" weights.

    AdamW: Loshchilov & Hutter 2019 (arXiv:1711.05101), betas 0.9 and `beta2`.
    Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), its update scaled to AdamW's size
    (Moonlight, arXiv:2502.16982), so that one learning rate serves both.
    """
    named = dict(model.named_parameters())  # tied weights appear once
    hidden = [p for n, p in named.items() if p.ndim == 2 and n.startswith("model.layers.")] if name == "muon" else []
    taken = {id(p) for p in hidden}
    rest = [p for p in named.values() if id(p) not in taken]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": weight_decay if decayed == "all" else 0.0}]
    adamw = AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=True)
    if name != "muon":
        return [adamw]
    muon = Muon(hidden, lr=learning_rate, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def unwrapped(method):
    """An optimizer's method without what torch wraps it in to keep its compiler out: that imports the compiler first,
    a second and a half before the first step, and no optimizer is compiled here."""
    return getattr(method, "__wrapped__", method)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, its methods `unwrapped`."""

    step = torch.no_grad()(unwrapped(torch.optim.AdamW.step))
    add_param_group = unwrapped(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrapped(torch.optim.Optimizer.zero_grad)
    state_dict = unwrapped(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrapped(torch.optim.Optimizer.load_state_dict)


class Muon(torch.optim.Muon):
    """torch.optim.Muon, which takes one matrix after another, with all matrices of a shape in one product.

    The numbers are the same but for bfloat16 rounding. A small model's matrices are too small to fill two cores alone.
    Only what `make_optimizers` asks for: Nesterov momentum and adjust_lr_fn "match_rms_adamw".
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
            by_shape = {}  # (short side, long side): the matrices that lie and that stand
            for p, direction in zip(params, directions, strict=True):
                by_shape.setdefault((min(p.shape), max(p.shape)), []).append((p, direction))
            for (short, long), pairs in by_shape.items():
                lying = torch.stack([d if len(d) == short else d.T for _, d in pairs])
                updates = orthogonalised(lying, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update if len(p) == short else update.T, alpha=-0.2 * math.sqrt(long) * group["lr"])


@functools.cache
def matmul_dtype(device: torch.device) -> torch.dtype:
    """The precision in which the device multiplies fastest: bfloat16, float16 on GPUs without it, else float32."""
    return DTYPES[pick_dtype("auto", device)[0]]


def orthogonalised(matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int,
                   eps: float) -> torch.Tensor:
    """(N, short, long) → about U V' of each matrix U S V', by Newton–Schulz iteration in the device's fastest
    precision.

    Singular values that are not tiny beside the largest become 0.7 to 1.2; tiny ones grow, but stay below.
    """
    a, b, c = coefficients
    dtype = matmul_dtype(matrices.device)
    x = matrices if dtype == torch.float16 else matrices.to(dtype)  # small gradients are less than float16 can hold
    x = (x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def learning_rate(step: int, total_steps: int, peak: float, schedule: str, warmup_ratio: float,
                  decay_ratio: float, min_lr_ratio: float) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    After a linear warm-up over warmup_ratio of the steps: constant; cosine from the peak to
    peak · min_lr_ratio (arXiv:1608.03983); or trapezoid, the peak until the last decay_ratio of the steps and
    then a straight line down (Hägele et al. 2024, arXiv:2405.18392).
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
        raise UserError(f"--lr_schedule {schedule}: not one of constant, cosine, trapezoid")
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * share)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    """Give every parameter group the rate of this step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value
