"""A small twin of a model, on which replacements are compared with what model.py says.

It is made of the model's own classes, with its head width, its groups and its options, but two layers, few entries and
random weights, biases and norm scales: a fresh model hides faults, since its output projections are zero. Some inputs
are so small that a norm's eps matters.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from Config import LLMConfig
from fastpath.decoding import cache_dtype
from fastpath.replace import restore
from model import KVCache, WeakWater

LENGTHS = [3, 1, 134, 21, 2, 21]  # documents; the longest takes more than one block of queries
VOCAB = 61


@contextlib.contextmanager
def one_thread():
    """The twin is small: several threads would wait for each other, for seconds where something else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def twin_config(config: LLMConfig) -> LLMConfig:
    """A small architecture for which the same replacements apply."""
    group = config.n_heads // config.n_kv_heads

    def alike(n_kv_heads: int) -> bool:
        """True if the width is a multiple of what C takes at a time where the model's is."""
        dim = group * n_kv_heads * config.head_dim
        return all((dim % n == 0) == (config.dim % n == 0) for n in (16, 64))

    n_kv_heads = next((n for n in range(min(2, config.n_kv_heads), config.n_kv_heads) if alike(n)), config.n_kv_heads)
    n_heads = group * n_kv_heads
    return replace(config, vocab_size=VOCAB, n_layers=2, n_heads=n_heads, n_kv_heads=n_kv_heads,
                   dim=n_heads * config.head_dim, hidden_dim=64 + config.hidden_dim % 64, max_seq_len=max(LENGTHS),
                   dropout=0.0)


def small_copy(model: WeakWater) -> WeakWater:
    """The twin's network, on the CPU in float32, in training mode. The caller's random numbers do not move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        twin = type(model)(twin_config(model.config)).train()
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.ndim < 2:  # biases around 0, the scales of norms around 1
                    parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) * 1.2 / parameter.shape[1]**0.5)
            twin.model.embed_tokens.weight[::3] *= 0.003  # eps counts
    return twin


def make_buffer(device: torch.device) -> dict:
    """A packed buffer for the twin; half of its positions predict."""
    generator, total = torch.Generator().manual_seed(2), sum(LENGTHS)
    index = torch.randperm(total, generator=generator)[:total // 2].sort().values
    tensors = dict(tokens=torch.randint(0, VOCAB, (1, total), generator=generator), target_index=index,
                   targets=torch.randint(0, VOCAB, (len(index),), generator=generator),
                   weights=torch.rand(len(index), generator=generator) + 0.1)
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"lengths": LENGTHS}


def losses_and_gradients(model: nn.Module, buffer: dict, context=contextlib.nullcontext) -> list[torch.Tensor]:
    """The loss in evaluation and in training, and the gradient of every parameter, in float64 on the CPU."""
    model.zero_grad()
    with torch.no_grad(), context():
        scored = model.eval()(**buffer)
    with torch.enable_grad():
        with context():
            loss = model.train()(**buffer)
        loss.backward()
    gradients = (torch.zeros(()) if p.grad is None else p.grad for p in model.parameters())
    return [x.detach().cpu().double() for x in (scored, loss, *gradients)]


def shape_of(module: nn.Module) -> list[tuple]:
    """Names, types, parameters, hooks and constants of a module and all in it: what an adapter or a wrapper changes."""
    return [(name, type(part), sorted(part._parameters), bool(part._forward_hooks or part._forward_pre_hooks
                                                              or part._backward_hooks), "forward" in vars(part),
             [] if isinstance(part, nn.Dropout) else [x for x in vars(part).items() if isinstance(x[1], (float, str))])
            for name, part in module.named_modules()]


Change = Callable[[nn.Module], None]  # of a twin, by `replace`


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The error of a tensor; infinite if it is not finite."""
    error = float((found - expected).norm() / expected.norm())
    return error if error == error else math.inf


def cached_logits(model: nn.Module, rows: int, cache_dtype: torch.dtype, step: Callable | None = None) -> torch.Tensor:
    """Logits (N, V) after a prompt and after each of 8 more tokens, after each of the first 8 without a prompt, and of
    two rows also at positions of their own. `step` computes single tokens otherwise: (token, position, keys, values) →
    logits (1, V)."""
    weight, n = next(model.parameters()), 40
    tokens = (torch.arange(2 * n, device=weight.device).view(2, n) * 7 % VOCAB)[:rows]
    found = []
    for prompt in (n - 8, 0):
        cache = KVCache(model.config, rows, n, weight.device, torch.promote_types(cache_dtype, weight.dtype))
        if prompt:
            found += model(tokens[:, :prompt], cache=cache)[:, -1:].unbind(1)
        for position in range(prompt, prompt + 8):
            if step is not None:
                found.append(step(int(tokens[0, position]), position, cache.keys, cache.values))
            else:
                found += model(tokens[:, position:position + 1], cache=cache).unbind(1)
        if prompt and rows == 2:
            cache.rewind([9, 13])
            for begin, end in ((13, 14), (14, 17)):
                found += model(tokens[:, begin:end], cache=cache).unbind(1)
    return torch.cat(found)


class Twin:
    """The twin, what it should give, and by how much a change of it may be off: the plain model rounds too, and a
    replacement may round at other places. The methods return None if what they try agrees, else what is wrong."""

    def __init__(self, twin: WeakWater, device: torch.device, dtype: torch.dtype):
        half = dtype != torch.float32
        self.context = (lambda: torch.autocast(device.type, dtype)) if half else contextlib.nullcontext
        self.device, self.cache_dtype = device, cache_dtype(device, dtype)
        self.twin = twin
        self.buffer, precise = make_buffer(device), make_buffer(torch.device("cpu"))
        precise["weights"] = precise["weights"].double()
        self.expected = losses_and_gradients(self.twin.double(), precise)
        self.typical = float(torch.stack([gradient.norm() for gradient in self.expected[2:]]).median())
        self.twin.to(device, torch.float32)
        self.limit = 1.5 * self.error(losses_and_gradients(self.twin, self.buffer, self.context)) + 1e-5

    def error(self, found: list[torch.Tensor]) -> float:
        """The largest relative error of a loss or a gradient."""
        errors = [relative(*losses) for losses in zip(found[:2], self.expected[:2], strict=True)]
        for gradient, expected in zip(found[2:], self.expected[2:], strict=True):
            # a gradient that is nearly zero, that of a key's bias say, is not compared by its own size
            error = float((gradient - expected).norm() / (expected.norm() + 1e-3 * self.typical))
            errors.append(error if error == error else math.inf)
        return max(errors)

    def objection(self, change: Change) -> str | None:
        """To a change of what is computed in training and evaluation."""
        def compute() -> tuple[float, float]:
            change(self.twin)
            return self.error(losses_and_gradients(self.twin, self.buffer, self.context)), self.limit

        return self.try_out(compute)

    def objection_in_decoding(self, change: Change) -> str | None:
        """To a change of the forward with a cache."""
        return self.try_out(lambda: self.compare_cached(2, change))

    def objection_to_decoder(self, make: Callable[[nn.Module], Callable]) -> str | None:
        """To a decoder of single rows, which `make` makes for a model."""
        return self.try_out(lambda: self.compare_cached(1, lambda twin: None, make))

    @one_thread()
    def try_out(self, compute: Callable[[], tuple[float, float]]) -> str | None:
        """What is wrong with the (error, limit) that `compute` returns."""
        try:
            error, limit = compute()
        except Exception as trouble:  # whatever a replacement cannot do, it is not to be used for
            return f"fails ({type(trouble).__name__}: {str(trouble)[:80]})"
        finally:
            restore(self.twin)
        return None if error <= limit else f"differs from model.py by {error:.2g}, more than {limit:.2g}"

    def compare_cached(self, rows: int, change: Change, make: Callable | None = None) -> tuple[float, float]:
        """(error, limit) of cached_logits after `change`, or of what `make` makes."""
        def logits(step=None) -> torch.Tensor:
            with torch.no_grad(), self.context():
                return cached_logits(self.twin, rows, self.cache_dtype, step).double().cpu()

        with torch.no_grad():
            expected = cached_logits(self.twin.eval().to("cpu", torch.float64), rows, self.cache_dtype)
        self.twin.to(self.device, torch.float32)
        limit = 1.5 * relative(logits(), expected) + 1e-5
        change(self.twin)
        return relative(logits(make and make(self.twin)), expected), limit


@one_thread()
def make_twin(model: WeakWater, device: torch.device, dtype: torch.dtype) -> tuple[Twin | None, str | None]:
    """(twin, None), or (None, why no twin can stand for this model)."""
    try:
        copy = small_copy(model)
        expected = shape_of(copy.model.layers[0])
        others = [[part for part in shape_of(m) if ".layers." not in part[0]] for m in (model, copy)]
        if others[0] != others[1] or any(shape_of(layer) != expected for layer in model.model.layers):
            return None, "its modules are not those that model.py makes"
        buffer, losses = make_buffer(torch.device("cpu")), []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for seed in (1, 2):
                torch.manual_seed(seed)
                losses.append(float(copy(**buffer)))
        if losses[0] != losses[1]:
            return None, "it answers differently with another random seed"
        return Twin(copy, device, dtype), None
    except Exception as error:  # an edited model may fail in any way
        return None, f"no small model of the same kind can be made and run ({type(error).__name__}: {str(error)[:100]})"
