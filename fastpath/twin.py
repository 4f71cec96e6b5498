"""Small twins of a model, on which replacements are compared with what model.py says.

A twin is made of the model's own classes, with its head width and its options, but few entries and random weights,
biases and norm scales: a fresh model hides edits, since its output projections are zero. Some inputs are so small that
a norm's eps matters. There are two:

    small   two layers, the model's groups of heads: the loss and the gradient of every parameter
    deep    all layers, one or two heads, a document as long as the context allows: logits, for what model.py may do in
            some layers, beyond some distance or outside training only
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from Config import LLMConfig
from fastpath.decoding import cache_dtype
from fastpath.replace import restore
from model import KVCache, WeakWater

LENGTHS = [3, 1, 134, 21, 2, 21]  # the small twin's documents; the longest takes more than one block of queries
DEEP_LENGTH = 640  # the deep twin's tokens, if the context holds so many
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


def twin_config(config: LLMConfig, deep: bool = False) -> LLMConfig:
    """A small architecture for which the same replacements apply."""
    group = 1 if deep else config.n_heads // config.n_kv_heads
    most = config.n_heads // group

    def alike(n_kv_heads: int) -> bool:
        """True if the width is a multiple of what C takes at a time where the model's is."""
        dim = group * n_kv_heads * config.head_dim
        return all((dim % n == 0) == (config.dim % n == 0) for n in (16, 64))

    n_kv_heads = next((n for n in range(1 if deep else min(2, most), most) if alike(n)), most)
    n_heads = group * n_kv_heads
    return replace(config, vocab_size=VOCAB, n_layers=config.n_layers if deep else 2, n_heads=n_heads,
                   n_kv_heads=n_kv_heads, dim=n_heads * config.head_dim, hidden_dim=64 + config.hidden_dim % 64,
                   max_seq_len=max(64, min(DEEP_LENGTH, config.max_seq_len)) if deep else max(LENGTHS))


def make_twin(model: WeakWater, deep: bool = False) -> WeakWater:
    """A twin on the CPU in float32, in training mode, without the dropout between a block's parts (no replacement
    computes that). The caller's random numbers do not move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        twin = type(model)(twin_config(model.config, deep)).train()
        for module in (twin.model, *twin.model.layers):
            for child in module.children():
                if isinstance(child, nn.Dropout):
                    child.p = 0.0
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.ndim < 2:  # biases around 0, the scales of norms around 1
                    parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) * 1.2 / parameter.shape[1]**0.5)
            twin.model.embed_tokens.weight[::3] *= 0.003  # eps counts
    return twin


def make_buffer(device: torch.device) -> dict:
    """A packed buffer for the small twin; half of its positions predict."""
    generator, total = torch.Generator().manual_seed(2), sum(LENGTHS)
    index = torch.randperm(total, generator=generator)[:total // 2].sort().values
    tensors = dict(tokens=torch.randint(0, VOCAB, (1, total), generator=generator), target_index=index,
                   targets=torch.randint(0, VOCAB, (len(index),), generator=generator),
                   weights=torch.rand(len(index), generator=generator) + 0.1)
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"lengths": LENGTHS}


def loss_and_gradients(model: nn.Module, buffer: dict, context=contextlib.nullcontext) -> list[torch.Tensor]:
    """The loss and the gradient of every parameter, in float64 on the CPU."""
    model.zero_grad()
    with torch.enable_grad():
        with context():
            loss = model(**buffer)
        loss.backward()
    gradients = (torch.zeros(()) if p.grad is None else p.grad for p in model.parameters())
    return [x.detach().cpu().double() for x in (loss, *gradients)]


def shape_of(module: nn.Module) -> list[tuple]:
    """Names, types, parameters, hooks and constants of a module and all in it: what an adapter or a wrapper changes."""
    return [(name, type(part), sorted(part._parameters), bool(part._forward_hooks or part._forward_pre_hooks
                                                              or part._backward_hooks), "forward" in vars(part),
             [] if isinstance(part, nn.Dropout) else [x for x in vars(part).items() if isinstance(x[1], (float, str))])
            for name, part in module.named_modules()]


@one_thread()
def reason_against(model: WeakWater) -> str | None:
    """Why twins cannot stand for this model; None if they can."""
    try:
        twin = make_twin(model)
        if not isinstance(model.model.layers[0], type(twin.model.layers[0])):
            return "its layers are of another class than model.py's"
        expected = shape_of(twin.model.layers[0])
        others = [[part for part in shape_of(m) if ".layers." not in part[0]] for m in (model, twin)]
        if others[0] != others[1] or any(shape_of(layer) != expected for layer in model.model.layers):
            return "its modules are not those that model.py makes"
        buffer = make_buffer(torch.device("cpu"))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            losses = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                losses.append(float(twin(**buffer)))
        if losses[0] != losses[1]:
            return "it answers differently with another random seed"
    except Exception as error:  # an edited model may fail in any way
        return f"no small model of the same kind can be made and run ({type(error).__name__}: {str(error)[:100]})"
    return None


Change = Callable[[nn.Module], None]  # of a twin, by `replace`
Logits = Callable[[nn.Module], torch.Tensor]


def unchanged(model: nn.Module) -> None:
    """The change that is none."""


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The error of a tensor; infinite if it is not finite."""
    error = float((found - expected).norm() / expected.norm())
    return error if error == error else math.inf


def after(change: Change, function: Logits) -> Logits:
    """The function of a model after `change`."""
    def changed(model):
        change(model)
        return function(model)

    return changed


def tokens_of(model: nn.Module) -> torch.Tensor:
    """Tokens (1, max_seq_len) for a twin."""
    return (torch.arange(model.config.max_seq_len, device=model.lm_head.weight.device)[None] * 7) % VOCAB


def rows_and_documents(model: nn.Module) -> torch.Tensor:
    """Logits of two short rows, and at the end of the longest document."""
    tokens = tokens_of(model)
    n = tokens.shape[1]
    last = torch.arange(n - 32, n, device=tokens.device)
    return torch.cat([model(tokens[:, :32].view(2, 16)).flatten(0, 1),
                      model(tokens, lengths=[5, n - 5], target_index=last)])


def cached_logits(model: nn.Module, dtype: torch.dtype, rows: int = 1, step: Callable | None = None) -> torch.Tensor:
    """Logits (N, V) after a prompt and after each of the 4 tokens up to the end of the context; of two rows also at
    positions of their own. `step` computes them otherwise: (token, position, keys, values) → logits (1, V)."""
    tokens = tokens_of(model)
    n = tokens.shape[1]
    tokens = torch.cat([tokens, tokens.flip(1)])[:rows]
    cache = KVCache(model.config, rows, n, tokens.device, dtype)
    last = torch.arange(rows, device=tokens.device) * (n - 4) + n - 5
    found = [model(tokens[:, :n - 4], cache=cache, target_index=last)]
    for position in range(n - 4, n):
        if step is not None:
            found.append(step(int(tokens[0, position]), position, cache.keys, cache.values))
        else:
            found += model(tokens[:, position:position + 1], cache=cache).unbind(1)
    if rows == 2:
        cache.rewind([9, 13])
        for begin, end in ((13, 14), (14, 17)):
            found += model(tokens[:, begin:end], cache=cache).unbind(1)
    return torch.cat(found)


class Twins:
    """Both twins, what they should give, and by how much a change of them may be off: the plain model rounds too, and a
    replacement may round at other places.

    The excess_… methods return None if what they try agrees, else by how much it differs, in words.
    """

    @one_thread()
    def __init__(self, model: WeakWater, device: torch.device, dtype: torch.dtype):
        half = dtype != torch.float32
        self.context = (lambda: torch.autocast(device.type, dtype)) if half else contextlib.nullcontext
        self.device, self.cache_dtype = device, cache_dtype(device, dtype)
        self.small, self.deep = make_twin(model), make_twin(model, deep=True)
        self.buffer, precise = make_buffer(device), make_buffer(torch.device("cpu"))
        precise["weights"] = precise["weights"].double()
        self.truth = loss_and_gradients(self.small.double(), precise)
        self.small.to(device, torch.float32), self.deep.to(device)
        self.typical = float(torch.stack([gradient.norm() for gradient in self.truth[1:]]).median())
        self.limit = 1.5 * self.error(unchanged) + 1e-5

    @one_thread()
    def error(self, change: Change) -> float:
        """The largest relative error of the small twin's loss and of a gradient, after `change`; infinite if it
        fails."""
        try:
            change(self.small.train())
            loss, *gradients = loss_and_gradients(self.small, self.buffer, self.context)
        except Exception:  # whatever a replacement cannot do, it is not to be used for
            return math.inf
        finally:
            restore(self.small)
        errors = [relative(loss, self.truth[0])]
        for gradient, expected in zip(gradients, self.truth[1:], strict=True):
            # a gradient that is nearly zero, that of a key's bias say, is not compared by its own size
            error = float((gradient - expected).norm() / (expected.norm() + 1e-3 * self.typical))
            errors.append(error if error == error else math.inf)
        return max(errors)

    @one_thread()
    def logits(self, twin: nn.Module, function: Logits, exact: torch.dtype | None = None) -> torch.Tensor:
        """A function's logits for a twin in evaluation mode, as in the run or in `exact` on the CPU."""
        twin.eval().to(*(("cpu", exact) if exact else (self.device, torch.float32)))
        try:
            with torch.no_grad(), contextlib.nullcontext() if exact else self.context():
                return function(twin).double().cpu()
        finally:
            restore(twin)

    def judge(self, twin: nn.Module, function: Logits, exact: torch.dtype, floor: float) -> Callable:
        """Returns what compares logits: found → (error, limit from the error that `function` makes of the twin in the
        run's precision). The truth is what it makes in the precision `exact`."""
        truth = self.logits(twin, function, exact)
        limit = 1.5 * relative(self.logits(twin, function), truth) + floor

        def compare(found: Logits) -> tuple[float, float]:
            try:
                return relative(self.logits(twin, found), truth), limit
            except Exception:  # whatever it cannot do, it is not to be used for
                return math.inf, limit

        return compare

    @functools.cached_property
    def judge_deep(self) -> Callable:
        return self.judge(self.deep, rows_and_documents, torch.float32, 1e-4)

    @functools.cached_property
    def judge_deep_cached(self) -> Callable:
        return self.judge(self.deep, self.with_cache, torch.float32, 1e-4)

    def with_cache(self, model: nn.Module, rows: int = 1) -> torch.Tensor:
        """cached_logits, the cache in the precision that decoding has."""
        return cached_logits(model, torch.promote_types(self.cache_dtype, model.lm_head.weight.dtype), rows)

    def excess(self, change: Change) -> str | None:
        """Of losses, gradients and logits after `change`."""
        return (too_much(self.error(change), self.limit)
                or too_much(*self.judge_deep(after(change, rows_and_documents)), DEEP))

    def excess_in_decoding(self, change: Change) -> str | None:
        """Of logits with a cache after `change`."""
        rows = functools.partial(self.with_cache, rows=2)
        return (too_much(*self.judge(self.small, rows, torch.float64, 1e-5)(after(change, rows)))
                or too_much(*self.judge_deep_cached(after(change, self.with_cache)), DEEP))

    def excess_of_native(self, make: Callable[[nn.Module], Callable]) -> str | None:
        """The same of a decoder of one row, which `make` makes for a copy."""
        def found(model):
            return cached_logits(model, torch.float32, step=make(model))

        return (too_much(*self.judge(self.small, self.with_cache, torch.float64, 1e-5)(found))
                or too_much(*self.judge_deep_cached(found), DEEP))


DEEP = " in some layers or far back in long documents"


def too_much(error: float, limit: float, where: str = "") -> str | None:
    """By how much an error is beyond its limit, in words; None if it is not."""
    return None if error <= limit else f"by {error:.2g}{where}, more than {limit:.2g}"
