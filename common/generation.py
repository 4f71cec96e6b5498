"""Text generation: from prompts to ids and text. Pure functions over a key/value cache, after gpt-fast's generate.py.

    Decoder            a model with its faster forwards for decoding
    prefill            store all prompts in the cache     → logits (B, V) of each prompt's last token
    decode_one_token   store one more token in each row   → logits (B, V)
    decode_rows        the same for some rows of a cache, each at a position of its own
    adjust, sample     logits (B, V) → scores (B, V) → ids (B,)
    stream, generate   the generation loop: yield tokens as they come, or return all at the end
    StreamDecoder      ids → text, in whole characters

A tensor's name may end in its shape: B rows, T tokens, V vocabulary.
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from Config import UserError
from fastpath import DTYPES, accelerate
from fastpath import sampling as sampling_c
from fastpath.decoding import cache_dtype, versions
from fastpath.native import library
from fastpath.native_decoder import NativeDecoder, native_cache_dtype
from model import KVCache, WeakWater

PROMPT_STEP = 16  # tokens
GREEDY_BELOW = 1e-5  # a lower temperature could overflow; in float32 it equals the argmax


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy (temperature 0). Raises UserError on an invalid value."""

    temperature: float = 0.0
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    repetition_penalty: float = 1.0  # 1: off

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature}: must be at least 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must be greater than 0 and at most 1 (1 turns it off)")
        if self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: must be at least 0 (0 turns it off)")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"--repetition_penalty {self.repetition_penalty}: must be greater than 0 (1 turns it off)")

    @property
    def greedy(self) -> bool:
        """True if the token with the highest score is taken."""
        return self.temperature < GREEDY_BELOW


# ---------------------------------------------------------------------------------------------
# the network


class Decoder:
    """A model that generates in `dtype` ("bf16", "fp16", "fp32"), with faster forwards where they agree with model.py
    (none with `plain`). With `int8` decode.c computes in int8: for weights that int8 keeps exactly. `lines` are the log
    lines of fastpath.accelerate."""

    def __init__(self, model: WeakWater, dtype: str = "fp32", plain: bool = False, int8: bool = False):
        self.model, self.config, self.dtype, self.int8 = model, model.config, dtype, int8
        weight = next(model.parameters())
        self.weight_dtype, self.device = weight.dtype, weight.device
        self.lines = accelerate(model, self.device, dtype, inference=True, plain=plain, int8=int8)
        self.native_reason: str | None = model.native_reason
        self.versions = versions(*model.parameters())

    @functools.cached_property
    def native(self) -> NativeDecoder | None:
        """The C decoder, created on first use; None if it cannot be used."""
        dtype = torch.int8 if self.int8 else DTYPES[self.dtype]
        return None if self.native_reason else NativeDecoder(self.model, dtype)

    def refresh_weights(self) -> None:
        """Drop the C decoder's copies of the weights if the weights have changed."""
        if self.versions != (now := versions(*self.model.parameters())):
            self.versions = now
            vars(self).pop("native", None)

    @property
    def computed_by(self) -> str:
        """A message that says what computes the tokens of a reply."""
        if self.native_reason:
            restored = f", with the int8 weights restored to {self.dtype}" if self.int8 else ""
            return f"tokens are computed by torch's operations{restored}: {self.native_reason}"
        return f"tokens are computed by decode.c{' in int8' if self.int8 else ''}, {library()[1]}"

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache of the dtype that suits the device, or decode.c."""
        dtype = cache_dtype(self.device, DTYPES[self.dtype])
        if self.native_reason is None:
            dtype = native_cache_dtype(DTYPES[self.dtype])
        elif self.dtype == "fp32":
            dtype = torch.promote_types(self.weight_dtype, dtype)
        return KVCache(self.config, batch_size, length, self.device, dtype)

    def logits(self, tokens_BT: torch.Tensor, cache: KVCache, target_index: torch.Tensor) -> torch.Tensor:
        """Store tokens in the cache. Returns logits (N, V), at least float32, at N of the flattened positions."""
        half = self.dtype != "fp32"
        with torch.autocast(self.device.type, DTYPES[self.dtype]) if half else contextlib.nullcontext():
            logits = self.model(tokens_BT, cache=cache, target_index=target_index)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.inference_mode()
def prefill(decoder: Decoder, prompts: list[list[int]], cache: KVCache) -> torch.Tensor:
    """Store all prompts in an empty cache. Returns the logits (B, V), at least float32, of each prompt's last token.

    Shorter prompts are padded on the right. The padding's cache entries are beyond the row's position, so the mask
    hides them until the row's next tokens overwrite them. On a CPU the longest prompt is padded, too, to a multiple of
    PROMPT_STEP where the cache has room: for each new size oneDNN compiles its matmuls, and keeps about 1 MiB.
    """
    decoder.refresh_weights()
    longest, lengths = max(map(len, prompts)), [len(prompt) for prompt in prompts]
    if decoder.device.type == "cpu":
        longest = max(longest, min(math.ceil(longest / PROMPT_STEP) * PROMPT_STEP, cache.room))
    tokens_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=decoder.device)
    last = torch.tensor([row * longest + length - 1 for row, length in enumerate(lengths)], device=decoder.device)
    logits_BV = decoder.logits(tokens_BT, cache, last)  # only the last positions: (B, T, V) could fill a GPU
    cache.rewind(lengths)
    return logits_BV


@torch.inference_mode()
def decode_one_token(decoder: Decoder, token_B: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Store the next token of each row in the cache. Returns the logits (B, V) that follow, at least float32."""
    if decoder.native is not None:
        cache.positions(1)  # raises if the cache is full
        logits_BV = decoder.native(token_B.tolist(), [*range(len(token_B))], cache.filled_B.tolist(), cache.keys,
                                   cache.values)
        cache.advance(1)
        return logits_BV
    return decoder.logits(token_B[:, None], cache, torch.arange(len(token_B), device=decoder.device))


@torch.inference_mode()
def decode_rows(decoder: Decoder, tokens: list[int], rows: list[int], cache: KVCache,
                lengths: list[int]) -> torch.Tensor:
    """Store tokens[i] in row rows[i] of the cache. Returns the logits (N, V) that follow, at least float32.

    `lengths` are the tokens of all B rows of the cache; the caller counts the new ones. Without decode.c the other rows
    are computed too, and what they store behind their tokens is overwritten by their own next token.
    """
    if decoder.native is not None:
        return decoder.native(tokens, rows, [lengths[row] for row in rows], cache.keys, cache.values)
    index_N = torch.tensor(rows, device=decoder.device)
    token_B = torch.zeros(len(lengths), dtype=torch.long, device=decoder.device)
    token_B[index_N] = torch.tensor(tokens, device=decoder.device)
    cache.rewind(lengths)
    return decoder.logits(token_B[:, None], cache, index_N)


# ---------------------------------------------------------------------------------------------
# sampling


def adjust(logits_BV: torch.Tensor, sampling: Sampling, seen_BV: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (B, V) → scores (B, V), -inf where a token is excluded. Same steps, in the same order, as transformers:

    repetition penalty  the logit of a token in the prompt or the output so far (`seen`) is divided by the penalty if
                        positive, else multiplied by it (CTRL, Keskar et al. 2019, arXiv:1909.05858; CTRL always
                        divides, which favors seen tokens with negative logits, so transformers multiplies these)
    temperature         scores are divided by it (greedy: by 1)
    top-k               keep the k highest scores, and those equal to the k-th (Fan et al. 2018, arXiv:1805.04833)
    top-p               keep the fewest tokens whose probabilities sum to at least p (Holtzman et al. 2019,
                        arXiv:1904.09751): of the sorted tail, tokens that sum to at most 1 - p are dropped
    """
    scores = logits_BV
    if seen_BV is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen_BV, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if sampling.greedy:
        return scores
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        kth_B1 = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < kth_B1, -math.inf)
    if sampling.top_p < 1:
        if (kept := sampling_c.keep_top_p(scores, sampling.top_p)) is not None:
            return kept
        ascending_BV, index_BV = scores.sort()
        dropped_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped_BV[:, -1] = False
        scores = scores.masked_fill(dropped_BV.scatter(1, index_BV, dropped_BV), -math.inf)
    return scores


def sample(scores_BV: torch.Tensor, greedy: bool,
           generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
    """Ids (B,): the highest score, or a sample from softmax(scores). Never waits for the device, unlike
    torch.multinomial.

    One uniform number a row is looked up in the cumulative distribution. Of scores that are NaN some id is drawn.
    `generator` may be a list, one a row: then
    what a row draws does not depend on the others.
    """
    if greedy:
        return scores_BV.argmax(-1)
    cumulative_BV = scores_BV.softmax(-1).cumsum(-1)
    if isinstance(generator, list):
        uniform_B1 = torch.stack([torch.rand(1, device=scores_BV.device, generator=each) for each in generator])
    else:
        uniform_B1 = torch.rand(len(scores_BV), 1, device=scores_BV.device, generator=generator)
    total_B1 = cumulative_BV[:, -1:]
    below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))  # which rounding of the product may reach
    index_B1 = torch.searchsorted(cumulative_BV, (uniform_B1 * total_B1).minimum(below_B1), right=True)
    return index_B1.clamp(max=scores_BV.shape[-1] - 1).squeeze(1)


# ---------------------------------------------------------------------------------------------
# the loop


@dataclass
class Generation:
    """The continuation of one prompt, and why it ended.

    `ids` excludes the stop token. `reason` is "eos" (a stop token), "length" (max_new_tokens) or "context" (prompt and
    ids fill the model's max_seq_len).
    """

    ids: list[int]
    reason: str


@torch.inference_mode()
def stream(model: WeakWater | Decoder, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
           stop_ids: Iterable[int], vocab_size: int | None = None, generator: torch.Generator | None = None,
           sync_every: int | None = 1) -> Iterator[tuple[int, list[int], str | None]]:
    """Continue a batch of prompts. Yields (row, new ids, reason as in Generation or None if the row goes on).

    Tokens are copied to the host `sync_every` at a time, the loop's only wait for the device. None means 1 on a CPU and
    16 elsewhere, where a wait costs more than tokens computed past the end. After each wait, ended rows leave
    the batch. Ids from `vocab_size` on are never sampled: a model may have more rows than its tokenizer has entries.
    `generator` is on the model's device. A Decoder is created for a model: pass a Decoder to generate more than once.

    Raises UserError if a prompt is empty or fills the context, or if the logits are not finite.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    context, device = decoder.config.max_seq_len, decoder.device
    if sync_every is None:
        sync_every = 1 if device.type == "cpu" else 16
    stop_ids, vocab_size = set(stop_ids), vocab_size or decoder.config.vocab_size
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"a prompt must have 1 to {context - 1} tokens, not {len(prompt)}")
    assert max_new_tokens > 0 and sync_every > 0
    n_tokens = [len(prompt) for prompt in prompts]  # per prompt: tokens so far, and their limit
    limits = [min(len(prompt) + max_new_tokens, context) for prompt in prompts]
    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    cache = decoder.new_cache(len(prompts), max(limits))
    seen_BV = _seen(prompts, vocab_size, device) if sampling.repetition_penalty != 1 else None
    token_B = None
    logits_BV = prefill(decoder, prompts, cache)
    while rows:
        total = torch.zeros((), device=device)  # the sum of all logits: finite only if every logit is
        chosen = []
        for _ in range(min(sync_every, *(limits[row] - n_tokens[row] for row in rows))):
            if token_B is not None:
                logits_BV = decode_one_token(decoder, token_B, cache)
            total = total + logits_BV.sum()
            token_B = sample(adjust(logits_BV[:, :vocab_size], sampling, seen_BV), sampling.greedy, generator)
            if seen_BV is not None:
                seen_BV.scatter_(1, token_B[:, None], True)
            chosen.append(token_B)
        if not math.isfinite(total):
            raise UserError("the model's logits are not finite: its weights are broken, or fp16 overflows "
                            "(--dtype fp32)")
        remaining = []
        for index, (row, ids) in enumerate(zip(rows, torch.stack(chosen, 1).tolist(), strict=True)):
            n_tokens[row] += len(ids)
            stop = next((i for i, token in enumerate(ids) if token in stop_ids), None)
            if stop is not None:
                yield row, ids[:stop], "eos"
            elif n_tokens[row] == limits[row]:
                yield row, ids, "length" if len(prompts[row]) + max_new_tokens <= context else "context"
            else:
                yield row, ids, None
                remaining.append(index)
        if len(remaining) < len(rows):
            rows = [rows[index] for index in remaining]
            if not rows:
                return
            keep = torch.tensor(remaining, dtype=torch.long, device=device)
            token_B = token_B[keep]
            seen_BV = seen_BV[keep] if seen_BV is not None else None
            cache.rewind([n_tokens[row] - 1 for row in rows], keep)  # the newest token is not in the cache yet


def generate(model: WeakWater | Decoder, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
             stop_ids: Iterable[int], vocab_size: int | None = None, generator: torch.Generator | None = None,
             sync_every: int | None = None) -> list[Generation]:
    """Continue every prompt of a batch to its end. Arguments and errors are those of `stream`."""
    done = [Generation([], "") for _ in prompts]
    for row, ids, reason in stream(model, prompts, max_new_tokens, sampling, stop_ids, vocab_size, generator,
                                   sync_every):
        done[row].ids += ids
        done[row].reason = reason or ""
    return done


def _seen(prompts: list[list[int]], vocab_size: int, device) -> torch.Tensor:
    """(B, V), true for the tokens of each prompt."""
    seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen_BV[row, torch.tensor(prompt)] = True
    return seen_BV.to(device)


# ---------------------------------------------------------------------------------------------
# text


class StreamDecoder:
    """Decodes ids one at a time into pieces of text that end at character boundaries.

    A byte-level token may end inside a character. Its text then ends in U+FFFD and is held back until the next tokens
    complete the character. For byte-level tokenizers the joined pieces equal tokenizer.decode(all ids,
    skip_special_tokens=True).
    """

    LONGEST = 16  # the most ids held back: a character has at most 4 bytes, so a longer run is not text

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.before: list[int] = []  # the ids shown last, as context: some decoders treat the first token differently
        self.held: list[int] = []

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Returns the text that this token completes; "" inside a character."""
        self.held.append(token)
        text = self._decode(self.before + self.held)
        if not text.endswith("\ufffd"):
            return self._show(len(self.held))
        if len(self.held) < self.LONGEST:
            return ""
        # not valid text: show all but the shortest tail that decodes the same alone
        for cut in range(len(self.held) - 1, 0, -1):
            if self._decode(self.before + self.held[:cut]) + self._decode(self.held[cut:]) == text:
                return self._show(cut)
        return self._show(len(self.held))

    def flush(self) -> str:
        """Returns the rest at the end. An incomplete character shows as U+FFFD."""
        return self._show(len(self.held))

    def _show(self, count: int) -> str:
        """Returns the text of the first `count` ids held back, and releases them."""
        shown = self._decode(self.before)
        text = self._decode(self.before + self.held[:count])
        self.before, self.held = self.held[:count] or self.before, self.held[count:]
        return text[len(shown):]
