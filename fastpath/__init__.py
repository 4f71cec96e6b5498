"""Faster ways to compute what model.py says, applied to a model from outside and checked against it.

`accelerate` replaces forwards of one model: `module.forward` becomes a function of training.py or decoding.py that
gives the same result from fewer operations. Each is used only while the part of model.py that it stands for is as it
was when the function was written (known.py), and after a comparison on a small twin of the model (twin.py). What is
edited or does not agree is computed as model.py says, and a log line says so: an edit of model.py costs speed and
never changes what is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import model as network
from Config import LLMConfig
from fastpath import decoding, kernels, known, training
from fastpath.decoder import NativeDecoder, native_trouble
from fastpath.replace import put, replace, restore
from fastpath.training import DTYPES
from fastpath.twin import Twin, make_twin
from model import WeakWater


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
    """`function` takes the place of `attribute` of each module of the class `owner` of model.py, where `accepts` says
    so. What it computes is written in the parts of model.py that `stands_for` names."""

    name: str
    owner: str
    function: Callable
    accepts: Callable[[Case], bool]
    stands_for: tuple[str, ...]
    attribute: str = "forward"


ATTENTION = ("Attention", "apply_rotary", "attention", "Packing")
C_ATTENTION = (*ATTENTION, "RotaryEmbedding", "Transformer", "Block")  # cosines and sines as these make them
C_NORM = ("RMSNorm", "Attention", "SwiGLU", "Block", "Transformer", "WeakWater.forward")  # only matmuls read its bf16
LOSS = ("WeakWater.loss", "WeakWater.__init__")  # which makes the head
REPLACEMENTS = {  # slot → the choices, best first
    "attention": [
        Replacement("a variable-length flash kernel", "Attention", training.attention_varlen,
                    lambda case: training.use_varlen(case.device, case.dtype, case.config.head_dim), ATTENTION),
        Replacement("kernels.c", "Attention", training.attention_c,
                    lambda case: case.c_applies and case.config.head_dim % 32 == 0, C_ATTENTION),
        Replacement("documents of similar length together", "Attention", training.attention_buckets,
                    lambda case: True, ATTENTION)],
    "norm": [
        Replacement("kernels.c", "RMSNorm", training.norm_c,
                    lambda case: case.c_applies and case.config.dim % 16 == 0, C_NORM),
        Replacement("CUDA's kernel", "RMSNorm", training.norm_cuda,
                    lambda case: case.device.type == "cuda" and not case.compile, ("RMSNorm",)),
        Replacement("fewer passes", "RMSNorm", training.norm_torch, lambda case: not case.compile, ("RMSNorm",))],
    "mlp": [
        Replacement("kernels.c", "SwiGLU", training.swiglu_c,
                    lambda case: case.c_applies and case.config.hidden_dim % 16 == 0, ("SwiGLU",)),
        Replacement("fewer passes", "SwiGLU", training.swiglu_torch, lambda case: not case.compile, ("SwiGLU",))],
    "loss": [
        Replacement("kernels.c", "WeakWater", training.loss_c, lambda case: case.device.type == "cpu" and (
            case.dtype == torch.bfloat16) and not kernels.trouble(), LOSS, "loss"),
        Replacement("in blocks", "WeakWater", training.loss_blocks, lambda case: True, LOSS, "loss")],
}


def patch(model: nn.Module, replacement: Replacement, case: Case) -> int:
    """Put the replacement's function into each module of its class. Returns into how many."""
    function, beside = replacement.function, {}
    if function is training.attention_varlen:
        beside = {"varlen_kernel": training.varlen_kernel(), "longest": case.config.max_seq_len}
    elif case.compile and replacement.owner == "Attention":
        function = torch.compiler.disable(function)  # each list of lengths would be a new graph
    modules = [module for module in model.modules() if type(module) is getattr(network, replacement.owner, None)]
    for module in modules:
        replace(module, replacement.attribute, function, case.checked_for, **beside)
    return len(modules)


def patch_for_decoding(model: nn.Module, case: Case, edited: set[str] = frozenset()) -> None:
    """Give each module its matrices as decoding reads them, and the forward that uses them, but where what it stands
    for was edited."""
    for module in model.modules():
        if module is model.lm_head:
            if type(module) is nn.Linear and module.bias is None:
                replace(module, "forward", decoding.linear_packed, case.checked_for,
                        matmul=decoding.Matmul(case.dtype, module))
        elif type(module) is getattr(network, "Attention", None) and not edited & {*ATTENTION, "KVCache"}:
            replace(module, "forward", decoding.attention_cached, case.checked_for, without_cache=module.forward,
                    qkv=decoding.Matmul(case.dtype, module.q_proj, module.k_proj, module.v_proj),
                    output=decoding.Matmul(case.dtype, module.o_proj))
        elif type(module) is getattr(network, "SwiGLU", None) and "SwiGLU" not in edited:
            replace(module, "forward", decoding.swiglu_packed, case.checked_for, with_gradient=module.forward,
                    gate_up=decoding.Matmul(case.dtype, module.gate_proj, module.up_proj),
                    down=decoding.Matmul(case.dtype, module.down_proj))


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
    with torch.autocast(device.type, enabled=False):  # the caller's
        twin, reason = (None, "--plain") if plain else make_twin(model, case.device, case.dtype)
        if reason is None:
            edited = known.edited()
            lines = choose(model, case, twin, edited)
            if inference:
                native_reason = why_not_native(model, case, twin, edited)
                lines += choose_decoding(model, case, twin, edited)
        else:
            lines, native_reason = [f"computed as model.py says, without replacements: {reason}"], reason
    if inference:
        put(model, native_reason=native_reason)
    for module in model.modules() if compile else ():
        if isinstance(module, getattr(network, "Attention", ())) and "forward" not in vars(module):
            # each list of lengths would be a new graph
            replace(module, "forward", torch.compiler.disable(type(module).forward), case.checked_for)
    return lines


def choose(model: WeakWater, case: Case, twin: Twin, edited: set[str]) -> list[str]:
    """Replace what is not edited and agrees: all at once if all of it agrees together, as it should, else what agrees
    one by one. Returns log lines."""
    chosen, refused, lines = {}, {}, []
    accepted = {slot: [each for each in choices if each.accepts(case)] for slot, choices in REPLACEMENTS.items()}
    usable = {slot: [each for each in choices if not edited.intersection(each.stands_for)]
              for slot, choices in accepted.items()}
    for slot, choices in accepted.items():
        if usable[slot]:
            chosen[slot] = usable[slot][0]
        if usable[slot][:1] != choices[:1]:
            refused[slot] = f"{', '.join(sorted(edited.intersection(choices[0].stands_for)))} edited in model.py"

    def patch_all(target: nn.Module) -> None:
        for each in chosen.values():
            patch(target, each, case)

    if twin.objection(patch_all) is not None:
        for slot in list(chosen):
            for replacement in usable[slot]:
                objection = twin.objection(lambda target, each=replacement: patch(target, each, case))
                if objection is None:
                    chosen[slot] = replacement
                    break
                lines.append(f"{slot}: {replacement.name} {objection}: not used")
            else:
                del chosen[slot]
        if (objection := twin.objection(patch_all)) is not None:
            chosen.clear()
            lines.append(f"all replacements together: {objection}: none is used")
    used = {slot: each.name for slot, each in chosen.items() if patch(model, each, case)}
    if used:
        lines.insert(0, "faster than model.py, and checked against it: " + ", ".join(
            f"{slot} ({name})" for slot, name in used.items()))
    for slot, choices in accepted.items():
        if choices and (slot not in used or slot in refused):
            how = "computed as model.py says" if slot not in used else f"{used[slot]} only"
            lines.append(f"{slot}: {how}" + (f", since {refused[slot]}" if slot in refused else ""))
    if case.device.type == "cpu" and case.dtype == torch.bfloat16 and (trouble := kernels.trouble()):
        lines.append(f"kernels.c is not used: {trouble}")
    return lines


def choose_decoding(model: WeakWater, case: Case, twin: Twin, edited: set[str]) -> list[str]:
    """Replace what decoding computes, if it agrees. Returns log lines."""
    objection = twin.objection_in_decoding(lambda target: patch_for_decoding(target, case, edited))
    if objection is not None:
        return [f"decoding: fewer matmuls: {objection}: not used"]
    patch_for_decoding(model, case, edited)
    return []


def why_not_native(model: WeakWater, case: Case, twin: Twin, edited: set[str]) -> str | None:
    """Why decode.c cannot compute the next token of a single row; None if it can and agrees with model.py."""
    if case.device.type != "cpu":
        return f"on {case.device.type}"
    if parts := edited - {"WeakWater.loss", "Packing"}:
        return f"{', '.join(sorted(parts))} edited in model.py"
    if type(model) is not WeakWater:
        return f"{type(model).__name__} is not model.py's WeakWater"
    if (trouble := native_trouble(model, case.dtype)) is not None:
        return trouble
    objection = twin.objection_to_decoder(lambda target: NativeDecoder(target, case.dtype))
    return None if objection is None else f"decode.c {objection}"
