"""A small twin of a model, on which replacements are compared with what model.py says.

It is made of the model's own classes, with its head width, its groups and its options, but two layers, few entries and
random weights, biases and norm scales: a fresh model hides edits, since its output projections are zero. Some inputs
are so small that a norm's eps matters.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from Config import LLMConfig
from model import KVCache, WeakWater

LENGTHS = [3, 1, 140, 37, 2, 37, 64]  # documents; the longest takes more than one block of queries
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


def make_twin(model: WeakWater, seed: int = 1) -> WeakWater:
    """A twin on the CPU in float32, in training mode. The caller's random numbers do not move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = type(model)(twin_config(model.config)).train()
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.ndim < 2:  # biases around 0, the scales of norms around 1
                    parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) * 1.2 / parameter.shape[1]**0.5)
            twin.model.embed_tokens.weight[::3] *= 0.003  # eps counts
    return twin


def make_buffer(seed: int = 2) -> dict:
    """A packed buffer for the twin; half of its positions predict."""
    generator, total = torch.Generator().manual_seed(seed), sum(LENGTHS)
    index = torch.randperm(total, generator=generator)[:total // 2].sort().values
    return dict(tokens=torch.randint(0, VOCAB, (1, total), generator=generator), lengths=LENGTHS, target_index=index,
                targets=torch.randint(0, VOCAB, (len(index),), generator=generator),
                weights=torch.rand(len(index), generator=generator) + 0.1)


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
    """Names, types, parameters and hooks of a module and all in it: what an adapter or a wrapper would change."""
    return [(name, type(part), sorted(part._parameters), bool(part._forward_hooks or part._forward_pre_hooks
                                                              or part._backward_hooks), "forward" in vars(part))
            for name, part in module.named_modules()]


@one_thread()
def reason_against(model: WeakWater) -> str | None:
    """Why a twin cannot stand for this model; None if it can."""
    try:
        twin = make_twin(model)
        if not isinstance(model.model.layers[0], type(twin.model.layers[0])):
            return "its layers are of another class than model.py's"
        expected = shape_of(twin.model.layers[0])
        others = [[part for part in shape_of(m) if ".layers." not in part[0]] for m in (model, twin)]
        if others[0] != others[1] or any(shape_of(layer) != expected for layer in model.model.layers):
            return "its modules are not those that model.py makes"
        buffer = make_buffer()
        with torch.random.fork_rng(devices=[]):
            losses = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                losses.append(float(twin(**buffer).detach()))
        if losses[0] != losses[1]:
            return "it answers differently with another random seed"
    except Exception as error:  # an edited model may fail in any way
        return f"no small model of the same kind can be made and run ({type(error).__name__}: {str(error)[:100]})"
    return None


class Twin:
    """The twin, what it should give, and by how much a replacement may be off."""

    @one_thread()
    def __init__(self, model: WeakWater, device: torch.device, dtype: str):
        twin, buffer = make_twin(model), make_buffer()
        precise = {name: value.double() if name == "weights" else value for name, value in buffer.items()}
        self.truth = loss_and_gradients(copy.deepcopy(twin).double(), precise)
        self.twin = twin.to(device)
        self.buffer = {name: value.to(device) if isinstance(value, torch.Tensor) else value
                       for name, value in buffer.items()}
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype)
        self.context = contextlib.nullcontext if half is None else lambda: torch.autocast(device.type, half)
        self.typical = float(torch.stack([gradient.norm() for gradient in self.truth[1:]]).median())
        # the plain model rounds too; a replacement may round at other places
        self.limit = 1.5 * self.error(lambda copy: None) + 1e-5

    @one_thread()
    def error(self, change: Callable[[nn.Module], None]) -> float:
        """The largest relative error of the loss and of a gradient after `change` of a copy; infinite if it fails."""
        changed = copy.deepcopy(self.twin)
        try:
            change(changed)
            found = loss_and_gradients(changed, self.buffer, self.context)
        except Exception:  # whatever a replacement cannot do, it is not to be used for
            return float("inf")
        loss, *gradients = found
        errors = [abs(float(loss / self.truth[0]) - 1)]
        for gradient, expected in zip(gradients, self.truth[1:], strict=True):
            # a gradient that is nearly zero, that of a key's bias say, is not compared by its own size
            errors.append(float((gradient - expected).norm() / (expected.norm() + 1e-3 * self.typical)))
        worst = max(errors)
        return worst if worst == worst else float("inf")  # NaN

    def cached_logits(self, model: nn.Module, dtype: torch.dtype, step: Callable | None = None) -> torch.Tensor:
        """Logits of a prompt's tokens and of the next ones, one at a time, against a cache. `step` computes the next
        ones otherwise: (token, position, keys, values) → logits (1, V)."""
        device = next(model.parameters()).device
        tokens = torch.arange(2 * 24, device=device).view(2, 24)[:1 if step else 2] % VOCAB
        cache = KVCache(model.config, len(tokens), 24, device, dtype)
        with torch.no_grad():
            found = [model(tokens[:, :16], cache=cache)]
            if step is None:  # rows at positions of their own, the next token and then three at once
                found.append(model(tokens[:, 16:17], cache=cache))
                cache.rewind([9, 13])
                for begin, end in ((13, 14), (14, 17)):
                    found.append(model(tokens[:, begin:end], cache=cache))
            else:
                found += [step(int(tokens[0, position]), position, cache.keys, cache.values)[None]
                          for position in range(16, 24)]
        return torch.cat(found, dim=1).double().cpu()

    @one_thread()
    def errors_of_logits(self, found: Callable[[nn.Module], torch.Tensor], plain: Callable) -> tuple[float, float]:
        """(error of `found`, limit from that of `plain`), both against the twin in float64."""
        truth = plain(copy.deepcopy(self.twin).double().cpu())
        with self.context():
            limit = 1.5 * float((plain(copy.deepcopy(self.twin)) - truth).norm() / truth.norm()) + 1e-5
            try:
                error = float((found(copy.deepcopy(self.twin)) - truth).norm() / truth.norm())
            except Exception:  # whatever it cannot do, it is not to be used for
                return float("inf"), limit
        return error if error == error else float("inf"), limit

    def decoding_errors(self, change: Callable[[nn.Module], None]) -> tuple[float, float]:
        """(error, limit) of logits with a cache, after `change` of a copy."""
        def plain(model):
            return self.cached_logits(model, next(model.parameters()).dtype)

        def changed(model):
            change(model)
            return plain(model)

        return self.errors_of_logits(changed, plain)

    def native_errors(self, make: Callable[[nn.Module], Callable]) -> tuple[float, float]:
        """The same of a decoder of one row, which `make` makes for a copy."""
        def plain(model):
            tokens = torch.arange(24, device=next(model.parameters()).device)[None] % VOCAB
            with torch.no_grad():
                return model(tokens).double().cpu()

        return self.errors_of_logits(lambda model: self.cached_logits(model, torch.float32, make(model)), plain)
