"""A small twin of a model, on which replacements are compared with model.py's own code.

The twin has the model's classes, head width, grouping and options, but two layers and a small vocabulary. All weights,
biases and norm scales are random: a fresh model would hide faults, since its output projections may be zero. Some
embeddings are so small that the eps of a norm matters.
"""

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from Config import LLMConfig
from fastpath.decoding import cache_dtype
from fastpath.int8 import round_weights
from fastpath.replace import restore
from model import KVCache, WeakWater

LENGTHS = [3, 1, 134, 21, 2, 21]  # of documents; the longest has more than one block of queries
VOCAB = 61
INT8_LIMIT = 1e-3  # with weights in int8, decode.c rounds vectors to int16: an error of 1e-4


@contextlib.contextmanager
def one_thread():
    """Run on one thread: for a model this small, threads mostly wait for each other, on a busy machine for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def twin_config(config: LLMConfig) -> LLMConfig:
    """A small architecture that the same replacements support. `down` has more columns than a block of decode.c."""
    group, width = config.n_heads // config.n_kv_heads, config.n_heads * config.head_dim

    def same_multiples(n_kv_heads: int) -> bool:
        """True if the heads together are a multiple of the C code's vector widths exactly where the model's are."""
        return all((group * n_kv_heads * config.head_dim % n == 0) == (width % n == 0) for n in (16, 64))

    n_kv_heads = next((n for n in range(min(2, config.n_kv_heads), config.n_kv_heads) if same_multiples(n)),
                      config.n_kv_heads)
    n_heads = group * n_kv_heads
    dim = n_heads * config.head_dim if config.dim == width else 64 + config.dim % 64
    return replace(config, vocab_size=VOCAB, n_layers=2, n_heads=n_heads, n_kv_heads=n_kv_heads,
                   dim=dim, hidden_dim=576 + config.hidden_dim % 64, max_seq_len=max(LENGTHS), dropout=0.0)


def small_copy(model: WeakWater) -> WeakWater:
    """The twin's network, on the CPU in float32, in training mode. Leaves the caller's random state unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        twin = type(model)(twin_config(model.config)).train()
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.ndim < 2:  # biases around 0, norm scales around 1
                    parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) * 1.2 / parameter.shape[1]**0.5)
            twin.model.embed_tokens.weight[::3] *= 0.003  # here eps matters
    return twin


def make_buffer(device: torch.device) -> dict:
    """A packed buffer for the twin; half of its positions have a loss."""
    generator, total = torch.Generator().manual_seed(2), sum(LENGTHS)
    index = torch.randperm(total, generator=generator)[:total // 2].sort().values
    tensors = dict(tokens=torch.randint(0, VOCAB, (1, total), generator=generator), target_index=index,
                   targets=torch.randint(0, VOCAB, (len(index),), generator=generator),
                   weights=torch.rand(len(index), generator=generator) + 0.1)
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"lengths": LENGTHS}


def losses_and_gradients(model: nn.Module, buffer: dict, context=contextlib.nullcontext) -> list[torch.Tensor]:
    """[loss in evaluation mode, loss in training mode, gradient of each parameter], as float64 on the CPU."""
    model.zero_grad()
    with torch.no_grad(), context():
        scored = model.eval()(**buffer)
    with torch.enable_grad():
        with context():
            loss = model.train()(**buffer)
        loss.backward()
    gradients = (torch.zeros(()) if p.grad is None else p.grad for p in model.parameters())
    return [x.detach().cpu().double() for x in (scored, loss, *gradients)]


def structure_of(module: nn.Module) -> list[tuple]:
    """Names, types, parameters, hooks and constants of a module and its submodules. An adapter or a wrapper
    changes these."""
    return [(name, type(part), sorted(part._parameters), bool(part._forward_hooks or part._forward_pre_hooks
                                                              or part._backward_hooks), "forward" in vars(part),
             [] if isinstance(part, nn.Dropout) else [x for x in vars(part).items() if isinstance(x[1], (float, str))])
            for name, part in module.named_modules()]


Change = Callable[[nn.Module], None]  # replaces forwards of a twin


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of a tensor; infinite if it is NaN."""
    error = float((found - expected).norm() / expected.norm())
    return error if error == error else math.inf


def cached_logits(model: nn.Module, rows: int, cache_dtype: torch.dtype, step: Callable | None = None) -> torch.Tensor:
    """Logits (N, V) from a cache: after a prompt and each of 8 more tokens; after each of 8 tokens without a prompt;
    with several rows, also at unequal positions. `step` replaces the model for single tokens: (tokens, rows, positions,
    keys, values) → logits (B, V), where each is a list of B."""
    weight, n = next(model.parameters()), 40
    tokens = torch.arange(rows * n, device=weight.device).view(rows, n) * 7 % VOCAB
    found = []

    def add(cache: KVCache, begin: int, end: int) -> None:
        if step is None:
            found.extend(model(tokens[:, begin:end], cache=cache).unbind(1))
            return
        for column in tokens[:, begin:end].unbind(1):
            found.append(step(column.tolist(), [*range(rows)], cache.filled_B.tolist(), cache.keys, cache.values))
            cache.advance(1)

    for prompt in (n - 8, 0):
        cache = KVCache(model.config, rows, n, weight.device, cache_dtype)
        if prompt:
            found += model(tokens[:, :prompt], cache=cache)[:, -1:].unbind(1)
        for position in range(prompt, prompt + 8):
            add(cache, position, position + 1)
        if prompt and rows > 1:
            cache.rewind([9 + 4 * (row % 2) for row in range(rows)])
            add(cache, 13, 14)
            add(cache, 14, 17)
    return torch.cat(found)


class Twin:
    """The twin, its expected losses and gradients, and the error that a replacement may have.

    The limit comes from the rounding error of model.py's code in the run's dtype, since a replacement may round
    elsewhere. The `mismatch` methods return None if a replacement agrees, else what is wrong.
    """

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
            # the error of a gradient near zero, such as that of a key bias, is not relative to its own size
            error = float((gradient - expected).norm() / (expected.norm() + 1e-3 * self.typical))
            errors.append(error if error == error else math.inf)
        return max(errors)

    def mismatch(self, change: Change) -> str | None:
        """Compare losses and gradients after a change."""
        def compute() -> tuple[float, float]:
            change(self.twin)
            return self.error(losses_and_gradients(self.twin, self.buffer, self.context)), self.limit

        return self.compare(compute)

    def mismatch_with_cache(self, change: Change) -> str | None:
        """Compare the forward with a cache after a change."""
        return self.compare(lambda: self.compare_cached(2, change))

    def mismatch_of_decoder(self, make: Callable[[nn.Module], Callable], rows: tuple[int, ...],
                            cache_dtype: torch.dtype, int8: bool = False) -> str | None:
        """Compare a decoder, which `make` creates for a model, with each of these numbers of rows; with `int8` for
        weights that int8 keeps."""
        weights = copy.deepcopy(self.twin.state_dict())
        if int8:
            round_weights(self.twin)
        try:
            least = INT8_LIMIT if int8 else 0
            for n in rows:
                wrong = self.compare(lambda n=n: self.compare_cached(n, lambda twin: None, make, least, cache_dtype))
                if wrong is not None:
                    return f"{wrong}, with {n} row{'s' * (n > 1)}"
            return None
        finally:
            self.twin.load_state_dict(weights)

    @one_thread()
    def compare(self, compute: Callable[[], tuple[float, float]]) -> str | None:
        """None if `compute` returns an error within the limit, else what is wrong. Restores the twin."""
        try:
            error, limit = compute()
        except Exception as failure:  # a replacement that fails in any way is not used
            return f"fails ({type(failure).__name__}: {str(failure)[:80]})"
        finally:
            restore(self.twin)
        return None if error <= limit else f"differs from model.py by {error:.2g}, more than {limit:.2g}"

    def compare_cached(self, rows: int, change: Change, make: Callable | None = None, least: float = 0,
                       cache_dtype: torch.dtype | None = None) -> tuple[float, float]:
        """(error, limit) of cached_logits after `change`, or with the decoder that `make` creates and a cache in
        `cache_dtype`. The limit is not below `least`."""
        own_dtype = torch.promote_types(self.cache_dtype, torch.float32)

        def logits(dtype: torch.dtype, step=None) -> torch.Tensor:
            with torch.no_grad(), self.context():
                return cached_logits(self.twin, rows, dtype, step).double().cpu()

        with torch.no_grad():
            expected = cached_logits(self.twin.eval().to("cpu", torch.float64), rows, torch.float64)
        self.twin.to(self.device, torch.float32)
        limit = max(1.5 * relative(logits(own_dtype), expected) + 1e-5, least)
        change(self.twin)
        found = logits(cache_dtype, make(self.twin)) if make else logits(own_dtype)
        return relative(found, expected), limit


@one_thread()
def make_twin(model: WeakWater, device: torch.device, dtype: torch.dtype) -> tuple[Twin | None, str | None]:
    """(twin, None), or (None, the reason why no twin can represent this model)."""
    try:
        copy = small_copy(model)
        expected = structure_of(copy.model.layers[0])
        others = [[part for part in structure_of(m) if ".layers." not in part[0]] for m in (model, copy)]
        if others[0] != others[1] or any(structure_of(layer) != expected for layer in model.model.layers):
            return None, "its modules differ from those that model.py makes"
        buffer, losses = make_buffer(torch.device("cpu")), []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for seed in (1, 2):
                torch.manual_seed(seed)
                losses.append(float(copy(**buffer)))
        if losses[0] != losses[1]:
            return None, "its output depends on the random seed"
        return Twin(copy, device, dtype), None
    except Exception as error:  # an edited model may fail in any way
        return None, f"a small copy of the model cannot be made and run ({type(error).__name__}: {str(error)[:100]})"
