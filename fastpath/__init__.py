"""Faster implementations of model.py's forwards, applied to a model instance from outside and checked against it.

`accelerate` replaces forwards of one model: `module.forward` becomes a function of training.py or decoding.py that
computes the same result with fewer operations. A replacement is used only if two checks pass: the parts of model.py
that it depends on are unedited (known.py), and its losses and gradients agree on a small twin of the model (twin.py).
Otherwise model.py's own code runs, and a log line says so. An edit of model.py therefore costs speed, never
correctness.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import model as network
from Config import LLMConfig
from fastpath import decoding, kernels, known, training
from fastpath.native_decoder import NativeDecoder, native_cache_dtype, why_unsupported
from fastpath.replace import attach, replace, restore
from fastpath.training import DTYPES
from fastpath.twin import Twin, make_twin
from model import WeakWater


@dataclass(frozen=True)
class Case:
    """The run that replacements are chosen for."""

    config: LLMConfig
    device: torch.device
    dtype: torch.dtype  # of matmuls
    compile: bool

    @property
    def checked_for(self) -> tuple[str, torch.dtype]:
        """The (device type, dtype) that a replacement requires of each input; any other input gets model.py's code."""
        return self.device.type, self.dtype

    @property
    def c_applies(self) -> bool:
        """True if kernels.c can be used. Each replacement also checks its own widths."""
        return (self.device.type == "cpu" and self.dtype == torch.bfloat16 and not self.compile
                and not kernels.why_unavailable())


@dataclass(frozen=True)
class Replacement:
    """`function` replaces the method `attribute` of every module of model.py's class `owner`, in the cases that are
    `supported`. It is correct only while the parts of model.py in `depends_on` are unedited."""

    name: str
    owner: str
    function: Callable
    supported: Callable[[Case], bool]
    depends_on: tuple[str, ...]
    attribute: str = "forward"


ATTENTION = ("Attention", "apply_rotary", "attention", "Packing")
C_ATTENTION = (*ATTENTION, "RotaryEmbedding", "Transformer", "Block")  # they make the cosines and sines
# norm_c returns bf16, which is correct only where matmuls alone read it: these parts are the readers
C_NORM = ("RMSNorm", "Attention", "SwiGLU", "Block", "Transformer", "WeakWater.forward")
LOSS = ("WeakWater.loss", "WeakWater.__init__")  # __init__ makes the head
REPLACEMENTS = {  # slot → candidates, fastest first
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
            case.dtype == torch.bfloat16) and not kernels.why_unavailable(), LOSS, "loss"),
        Replacement("in blocks", "WeakWater", training.loss_blocks, lambda case: True, LOSS, "loss")],
}

DECODED_ROWS = (1, 8, 9)  # decode.c computes a single row, up to 8 and up to 16 in three ways


def patch(model: nn.Module, replacement: Replacement, case: Case) -> int:
    """Apply the replacement to every module of its class. Returns the number of modules."""
    function, attributes = replacement.function, {}
    if function is training.attention_varlen:
        attributes = {"varlen_kernel": training.varlen_kernel(), "longest": case.config.max_seq_len}
    elif case.compile and replacement.owner == "Attention":
        function = torch.compiler.disable(function)  # the compiler would make a graph for each list of lengths
    modules = [module for module in model.modules() if type(module) is getattr(network, replacement.owner, None)]
    for module in modules:
        replace(module, replacement.attribute, function, case.checked_for, **attributes)
    return len(modules)


def patch_for_decoding(model: nn.Module, case: Case, edited: set[str] = frozenset()) -> None:
    """Apply the replacements of decoding.py, which hold their weights in a layout made for reading, except where
    model.py was edited."""
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


@torch.inference_mode(False)  # the comparison needs gradients
def accelerate(model: WeakWater, device: torch.device, dtype: str, compile: bool = False, inference: bool = False,
               plain: bool = False, int8: bool = False) -> list[str]:
    """Replace forwards of `model` by faster ones. Returns log lines: what computes each part, and what is not replaced
    and why.

    The model is on `device` with its weights loaded; `dtype` is the run's ("bf16", "fp16", "fp32"). With `compile`,
    norm and SwiGLU are left to the compiler, which fuses them itself. With `inference`, the forward with a cache is
    replaced too, which suits weights that seldom change; `model.native_reason` is then the reason why decode.c cannot
    decode (with `int8` in int8), or None if it can. With `plain` nothing is replaced. Call this after
    everything that changes modules, and before torch.compile and DistributedDataParallel.
    """
    restore(model)
    case = Case(model.config, device, DTYPES[dtype], compile)
    with torch.autocast(device.type, enabled=False):  # the caller may have it on
        twin, reason = (None, "--plain") if plain else make_twin(model, case.device, case.dtype)
        if reason is None:
            edited = known.edited()
            lines = choose(model, case, twin, edited)
            if inference:
                native_reason = why_not_native(model, case, twin, edited, int8)
                lines += choose_decoding(model, case, twin, edited)
        else:
            lines, native_reason = [f"computed as model.py says, without replacements: {reason}"], reason
    if inference:
        attach(model, native_reason=native_reason)
    for module in model.modules() if compile else ():
        if isinstance(module, getattr(network, "Attention", ())) and "forward" not in vars(module):
            # the compiler would make a graph for each list of lengths
            replace(module, "forward", torch.compiler.disable(type(module).forward), case.checked_for)
    return lines


def choose(model: WeakWater, case: Case, twin: Twin, edited: set[str]) -> list[str]:
    """Replace what is unedited and agrees with model.py. Returns log lines.

    All replacements are compared together, which is one comparison if all is well; if they disagree, each is compared
    alone.
    """
    chosen, refused, lines = {}, {}, []
    accepted = {slot: [each for each in choices if each.supported(case)] for slot, choices in REPLACEMENTS.items()}
    usable = {slot: [each for each in choices if not edited.intersection(each.depends_on)]
              for slot, choices in accepted.items()}
    for slot, choices in accepted.items():
        if usable[slot]:
            chosen[slot] = usable[slot][0]
        if usable[slot][:1] != choices[:1]:
            refused[slot] = f"{', '.join(sorted(edited.intersection(choices[0].depends_on)))} edited in model.py"

    def patch_all(target: nn.Module) -> None:
        for each in chosen.values():
            patch(target, each, case)

    if twin.mismatch(patch_all) is not None:
        for slot in list(chosen):
            for replacement in usable[slot]:
                mismatch = twin.mismatch(lambda target, each=replacement: patch(target, each, case))
                if mismatch is None:
                    chosen[slot] = replacement
                    break
                lines.append(f"{slot}: {replacement.name} {mismatch}: not used")
            else:
                del chosen[slot]
        if (mismatch := twin.mismatch(patch_all)) is not None:
            chosen.clear()
            lines.append(f"all replacements together: {mismatch}: none is used")
    used = {slot: each.name for slot, each in chosen.items() if patch(model, each, case)}
    if used:
        lines.insert(0, "faster than model.py, and checked against it: " + ", ".join(
            f"{slot} ({name})" for slot, name in used.items()))
    for slot, choices in accepted.items():
        if choices and (slot not in used or slot in refused):
            how = "computed as model.py says" if slot not in used else f"{used[slot]} only"
            lines.append(f"{slot}: {how}" + (f", since {refused[slot]}" if slot in refused else ""))
    if case.device.type == "cpu" and case.dtype == torch.bfloat16 and (reason := kernels.why_unavailable()):
        lines.append(f"kernels.c is not used: {reason}")
    return lines


def choose_decoding(model: WeakWater, case: Case, twin: Twin, edited: set[str]) -> list[str]:
    """Replace the forwards that decoding uses, if they agree with model.py. Returns log lines."""
    mismatch = twin.mismatch_with_cache(lambda target: patch_for_decoding(target, case, edited))
    if mismatch is not None:
        return [f"decoding: fewer matmuls: {mismatch}: not used"]
    patch_for_decoding(model, case, edited)
    return []


def why_not_native(model: WeakWater, case: Case, twin: Twin, edited: set[str], int8: bool = False) -> str | None:
    """The reason why decode.c cannot decode (with `int8` in int8); None if it can and agrees with model.py."""
    dtype = torch.int8 if int8 else case.dtype
    if case.device.type != "cpu":
        return f"on {case.device.type}"
    if parts := edited - {"WeakWater.loss", "Packing"}:
        return f"{', '.join(sorted(parts))} edited in model.py"
    if type(model) is not WeakWater:
        return f"{type(model).__name__} is not model.py's WeakWater"
    if (reason := why_unsupported(model, dtype)) is not None:
        return reason
    mismatch = twin.mismatch_of_decoder(lambda target: NativeDecoder(target, dtype), DECODED_ROWS,
                                        native_cache_dtype(case.dtype), int8)
    return None if mismatch is None else f"decode.c {mismatch}"
