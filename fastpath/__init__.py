"""Faster ways to compute what model.py says, applied to a model from outside and checked against it.

`accelerate` replaces forwards of one model: `module.forward` becomes a function of training.py or decoding.py that
gives the same result from fewer operations. Each is used only after a small twin of the model, made of its own classes,
has shown that loss and all gradients agree. What does not agree stays plain, and a log line says so: an edit of
model.py costs speed and never changes what is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from Config import LLMConfig
from fastpath import decoding, kernels, training
from fastpath.decoder import NativeDecoder, native_trouble
from fastpath.replace import put, replace, restore
from fastpath.training import DTYPES
from fastpath.twin import Twins, reason_against
from model import Attention, RMSNorm, SwiGLU, WeakWater


@dataclass(frozen=True)
class Case:
    """What a replacement is to be used for."""

    config: LLMConfig
    device: torch.device
    dtype: torch.dtype  # of matmuls
    compile: bool

    @property
    def checked_for(self) -> tuple[str, torch.dtype]:
        """What a replaced forward asks for, each time, before it computes."""
        return self.device.type, self.dtype

    @property
    def c_applies(self) -> bool:
        """True if kernels.c can be used; it takes 16 numbers at a time."""
        return self.device.type == "cpu" and self.dtype == torch.bfloat16 and not self.compile and not kernels.trouble()


@dataclass(frozen=True)
class Replacement:
    """`function` takes the place of `attribute` of each module of class `owner`, where `accepts` says so."""

    name: str
    owner: type
    function: Callable
    accepts: Callable[[Case], bool]
    attribute: str = "forward"


def _widths(case: Case, *widths: int) -> bool:
    return all(width % 16 == 0 for width in widths)


REPLACEMENTS = {  # slot → the choices, best first
    "attention": [
        Replacement("a variable-length flash kernel", Attention, training.attention_varlen,
                    lambda case: training.use_varlen(case.device, case.dtype, case.config.head_dim)),
        Replacement("kernels.c", Attention, training.attention_c,
                    lambda case: case.c_applies and case.config.head_dim % 32 == 0),
        Replacement("documents of similar length together", Attention, training.attention_buckets, lambda case: True)],
    "norm": [
        Replacement("kernels.c", RMSNorm, training.norm_c, lambda case: case.c_applies and _widths(
            case, case.config.dim, *([case.config.head_dim] if case.config.qk_norm else []))),
        Replacement("CUDA's kernel", RMSNorm, training.norm_cuda,
                    lambda case: case.device.type == "cuda" and not case.compile),
        Replacement("fewer passes", RMSNorm, training.norm_torch, lambda case: not case.compile)],
    "mlp": [
        Replacement("kernels.c", SwiGLU, training.swiglu_c,
                    lambda case: case.c_applies and _widths(case, case.config.hidden_dim)),
        Replacement("fewer passes", SwiGLU, training.swiglu_torch, lambda case: not case.compile)],
    "loss": [
        Replacement("kernels.c", WeakWater, training.loss_c, lambda case: case.device.type == "cpu" and (
            case.dtype == torch.bfloat16) and not kernels.trouble(), "loss"),
        Replacement("in blocks", WeakWater, training.loss_blocks, lambda case: True, "loss")],
}


def patch(model: nn.Module, replacement: Replacement, case: Case) -> None:
    """Put the replacement's function into each module of its class."""
    function, beside = replacement.function, {}
    if function is training.attention_varlen:
        beside = {"varlen_kernel": training.varlen_kernel(), "longest": case.config.max_seq_len}
    elif case.compile and replacement.owner is Attention:
        function = torch.compiler.disable(function)  # each list of lengths would be a new graph
    for module in model.modules():
        if type(module) is replacement.owner:
            replace(module, replacement.attribute, function, case.checked_for, **beside)


def patch_for_decoding(model: nn.Module, case: Case) -> None:
    """Give each module its matrices as decoding reads them, and the forward that uses them."""
    for module in model.modules():
        if type(module) is Attention:
            replace(module, "forward", decoding.attention_cached, case.checked_for, without_cache=module.forward,
                    qkv=decoding.Matmul(case.dtype, module.q_proj, module.k_proj, module.v_proj),
                    output=decoding.Matmul(case.dtype, module.o_proj))
        elif type(module) is SwiGLU:
            replace(module, "forward", decoding.swiglu_packed, case.checked_for, with_gradient=module.forward,
                    gate_up=decoding.Matmul(case.dtype, module.gate_proj, module.up_proj),
                    down=decoding.Matmul(case.dtype, module.down_proj))
        elif module is getattr(model, "lm_head", None):
            replace(module, "forward", decoding.linear_packed, case.checked_for,
                    matmul=decoding.Matmul(case.dtype, module))


@torch.inference_mode(False)  # the check needs gradients
def accelerate(model: WeakWater, device: torch.device, dtype: str, compile: bool = False, inference: bool = False,
               plain: bool = False) -> list[str]:
    """Replace forwards of `model`, which is on `device` and whose weights are loaded, by faster ones; `dtype` is the
    run's ("bf16", "fp16", "fp32"). Returns log lines: what computes each part, and what stays plain and why.

    With `compile` the compiler fuses norm and SwiGLU itself. With `inference`, for weights that seldom change, the
    forward with a cache is faster too, and `model.native_reason` says why decode.c cannot compute single rows (None if
    it can). With `plain` nothing is replaced. Call this before torch.compile and DistributedDataParallel, after
    anything that changes modules.
    """
    restore(model)
    case = Case(model.config, device, DTYPES[dtype], compile)
    reason = "--plain" if plain else reason_against(model)
    if reason is not None:
        lines = [f"computed as model.py says, without replacements: {reason}"]
    else:
        twins = Twins(model, case.device, case.dtype)
        lines = choose(model, case, twins)
        if inference:
            reason = native_reason(model, case, twins)
            lines += choose_decoding(model, case, twins)
        if device.type == "cpu" and dtype == "bf16" and (trouble := kernels.trouble()):
            lines.append(f"kernels.c is not used: {trouble}")
    if inference:
        put(model, native_reason=reason)
    for module in model.modules() if compile else ():
        if isinstance(module, Attention) and "forward" not in vars(module):  # each list of lengths would be a new graph
            replace(module, "forward", torch.compiler.disable(type(module).forward), case.checked_for)
    return lines


def choose(model: WeakWater, case: Case, twins: Twins) -> list[str]:
    """Replace what agrees with model.py: all at once if all of it agrees together, as it does unless model.py was
    edited, else what agrees one by one. Returns log lines."""
    accepted = {slot: [each for each in choices if each.accepts(case)] for slot, choices in REPLACEMENTS.items()}
    chosen, lines = {slot: choices[0] for slot, choices in accepted.items() if choices}, []

    def patch_all(target: nn.Module) -> None:
        for each in chosen.values():
            patch(target, each, case)

    if twins.excess(patch_all) is not None:
        for slot, choices in accepted.items():
            for replacement in choices:
                if (excess := twins.excess(lambda copy, each=replacement: patch(copy, each, case))) is None:
                    chosen[slot] = replacement
                    break
                lines.append(f"{slot}: {replacement.name} differs from model.py {excess}: not used")
            else:
                chosen.pop(slot, None)
        if chosen and (excess := twins.excess(patch_all)) is not None:
            chosen.clear()
            lines.append(f"all replacements together differ from model.py {excess}: none is used")
    patch_all(model)
    if chosen:
        lines.insert(0, "faster than model.py, and equal to it: " + ", ".join(
            f"{slot} ({replacement.name})" for slot, replacement in chosen.items()))
    return lines + [f"{slot}: computed as model.py says" for slot in accepted if accepted[slot] and slot not in chosen]


def choose_decoding(model: WeakWater, case: Case, twins: Twins) -> list[str]:
    """Replace what decoding computes, if it agrees. Returns log lines."""
    if (excess := twins.excess_in_decoding(lambda target: patch_for_decoding(target, case))) is not None:
        return [f"decoding: fewer matmuls differ from model.py {excess}: not used"]
    patch_for_decoding(model, case)
    return []


def native_reason(model: WeakWater, case: Case, twins: Twins) -> str | None:
    """Why decode.c cannot compute the next token of a single row; None if it can and agrees with model.py."""
    if case.device.type != "cpu":
        return f"on {case.device.type}"
    if (trouble := native_trouble(model, case.dtype)) is not None:
        return trouble
    excess = twins.excess_of_native(lambda twin: NativeDecoder(twin, case.dtype))
    return None if excess is None else f"decode.c differs from model.py {excess}"
