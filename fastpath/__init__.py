"""Faster ways to compute what model.py says, applied to a model from outside and checked against it.

`accelerate` replaces forwards of one model: `module.forward` becomes a function of training.py or decoding.py that
gives the same result from fewer operations. Each is used only after a small twin of the model, made of its own classes,
has shown that loss and all gradients agree. What does not agree stays plain, and a log line says so: an edit of
model.py costs speed and never changes what is computed.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from Config import LLMConfig
from fastpath import decoding, kernels, training
from fastpath.decoder import NativeDecoder, native_trouble
from fastpath.twin import Twin, reason_against
from model import Attention, RMSNorm, SwiGLU, WeakWater

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


PLAIN = "computed as model.py says, without replacements (--plain)"


@dataclass(frozen=True)
class Case:
    """What a replacement is to be used for."""

    config: LLMConfig
    device: torch.device
    dtype: torch.dtype  # of matmuls
    compile: bool

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


def replace(module: nn.Module, attribute: str, function: Callable, case: Case, **beside) -> None:
    """Put `function` in the place of a method of this module alone, and what it needs beside it."""
    before = vars(module).get("replaced", {})
    beside |= {"checked_for": (case.device.type, case.dtype), attribute: types.MethodType(function, module)}
    for name, value in beside.items():
        setattr(module, name, value)
    module.replaced = before | dict.fromkeys(beside)


def restore(model: nn.Module) -> None:
    """Undo all replacements: from here on model.py computes."""
    for module in model.modules():
        for name in vars(module).pop("replaced", {}):
            vars(module).pop(name, None)


def patch(model: nn.Module, replacement: Replacement, case: Case) -> None:
    """Put the replacement's function into each module of its class."""
    function, beside = replacement.function, {}
    if function is training.attention_varlen:
        beside = {"varlen_kernel": training.varlen_kernel(), "longest": case.config.max_seq_len}
    elif case.compile and replacement.owner is Attention:
        function = torch.compiler.disable(function)  # each list of lengths would be a new graph
    for module in model.modules():
        if type(module) is replacement.owner:
            replace(module, replacement.attribute, function, case, **beside)


def patch_for_decoding(model: nn.Module, case: Case) -> None:
    """Give each module its matrices as decoding reads them, and the forward that uses them. Weights that change later
    are not seen."""
    for module in model.modules():
        if type(module) is Attention:
            replace(module, "forward", decoding.attention_cached, case, without_cache=module.forward,
                    qkv=decoding.Matmul(case.dtype, module.q_proj, module.k_proj, module.v_proj),
                    output=decoding.Matmul(case.dtype, module.o_proj))
        elif type(module) is SwiGLU:
            replace(module, "forward", decoding.swiglu_packed, case, with_gradient=module.forward,
                    gate_up=decoding.Matmul(case.dtype, module.gate_proj, module.up_proj),
                    down=decoding.Matmul(case.dtype, module.down_proj))
        elif module is getattr(model, "lm_head", None):
            replace(module, "forward", decoding.linear_packed, case, matmul=decoding.Matmul(case.dtype, module))


@torch.inference_mode(False)  # the check needs gradients
def accelerate(model: WeakWater, device: torch.device, dtype: str, compile: bool = False, inference: bool = False,
               plain: bool = False) -> list[str]:
    """Replace forwards of `model`, which is on `device` and whose weights are loaded, by faster ones; `dtype` is the
    run's ("bf16", "fp16", "fp32"). Returns log lines: what computes each part, and what stays plain and why.

    With `compile` the compiler fuses norm and SwiGLU itself; with `inference` weights do not change any more, and the
    forward with a cache is faster too; with `plain` nothing is replaced. Call this before torch.compile and
    DistributedDataParallel, after anything that changes modules.
    """
    restore(model)
    case = Case(model.config, device, DTYPES[dtype], compile)
    lines = [PLAIN] if plain else choose(model, case, dtype, inference)
    for module in model.modules() if compile else ():
        if isinstance(module, Attention) and "forward" not in vars(module):  # each list of lengths would be a new graph
            replace(module, "forward", torch.compiler.disable(type(module).forward), case)
    return lines


def choose(model: WeakWater, case: Case, dtype: str, inference: bool) -> list[str]:
    """Replace what agrees with model.py, one slot after another, if all of it agrees together. Returns log lines."""
    if (reason := reason_against(model)) is not None:
        return [f"computed as model.py says, without replacements: {reason}"]
    twin = Twin(model, case.device, dtype)
    chosen, lines = {}, []
    for slot, choices in REPLACEMENTS.items():
        for replacement in choices:
            if not replacement.accepts(case):
                continue
            error = twin.error(lambda copy, each=replacement: patch(copy, each, case))
            if error <= twin.limit:
                chosen[slot] = replacement
                break
            lines.append(f"{slot}: {replacement.name} differs from model.py by {error:.2g}, more than "
                         f"{twin.limit:.2g}: not used")
        else:
            if choices[-1].accepts(case):
                lines.append(f"{slot}: computed as model.py says")

    def patch_all(target: nn.Module) -> None:
        for each in chosen.values():
            patch(target, each, case)

    if chosen and (error := twin.error(patch_all)) > twin.limit:
        return [*lines, f"computed as model.py says: all replacements together differ by {error:.2g}, more than "
                f"{twin.limit:.2g}"]
    patch_all(model)
    if chosen:
        lines.insert(0, "faster than model.py, and equal to it: " + ", ".join(
            f"{slot} ({replacement.name})" for slot, replacement in chosen.items()))
    if inference:
        error, limit = twin.decoding_errors(lambda target: patch_for_decoding(target, case))
        if error <= limit:
            patch_for_decoding(model, case)
        else:
            lines.append(f"decoding: fewer matmuls differ from model.py by {error:.2g}, more than {limit:.2g}: not "
                         "used")
    if case.device.type == "cpu" and case.dtype == torch.bfloat16 and (trouble := kernels.trouble()):
        lines.append(f"kernels.c is not used: {trouble}")
    return lines


@torch.inference_mode(False)
def native_reason(model: WeakWater, device: torch.device, dtype: str) -> str | None:
    """Why decode.c cannot compute the next token of a single row; None if it can and agrees with model.py. Ask before
    `accelerate`, which changes modules."""
    if device.type != "cpu":
        return f"on {device.type}"
    restore(model)
    reason = native_trouble(model, DTYPES[dtype]) or reason_against(model)
    if reason is None:
        error, limit = Twin(model, device, dtype).native_errors(lambda twin: NativeDecoder(twin, DTYPES[dtype]))
        if error > limit:
            return f"decode.c differs from model.py by {error:.2g}, more than {limit:.2g}"
    return reason
