"""Decoding: prompts in, ids and text out. Pure functions over a key/value cache, after gpt-fast's generate.py.

    FusedModel         a model's weights as decoding reads them, and the network over a KVCache
    prefill            all prompts into the cache at once    → logits (B, V) after the last token of each
    decode_one_token   one more token in each row            → logits (B, V)
    adjust, sample     logits (B, V) → scores (B, V) → ids (B,)
    stream, generate   the loop over these, as it goes or at its end
    StreamDecoder      ids → text, never a part of a character

A tensor's name ends in its shape where that helps: B rows, T tokens, S cache slots, C model width, H query heads,
K key/value heads, D head width, V vocabulary.
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.decoder import NativeDecoder, applies
from Config import UserError
from model import WeakWater, attend, normalise, product_dtype, rotate

GREEDY_BELOW = 1e-5  # a lower temperature would overflow, and is the argmax to within float32


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults draw nothing: temperature 0 is greedy. Raises UserError."""

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
        """Whether the highest score is taken, without chance."""
        return self.temperature < GREEDY_BELOW


# ---------------------------------------------------------------------------------------------
# the network


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of fixed size: (layers, B, K, S, D).

    Each row of the batch stands at its own position, so prompts of unequal length decode together:
    a row's slots beyond its position hold rubbish that the mask hides and later tokens overwrite.
    """

    def __init__(self, fused: "FusedModel", batch_size: int, length: int):
        c = fused.config
        shape = (c.n_layers, batch_size, c.n_kv_heads, length, c.head_dim)
        # on a CPU in full precision: attention over it is several times as fast there as in bf16 (docs/LOG.md)
        dtype = fused.exact if fused.device.type == "cpu" else fused.dtype
        self.keys = torch.zeros(shape, device=fused.device, dtype=dtype)
        self.values = torch.zeros(shape, device=fused.device, dtype=dtype)
        self.rows_B1 = torch.arange(batch_size, device=fused.device).unsqueeze(1)
        self.room = min(length, c.max_seq_len)

    def check_room(self, length: int) -> None:
        """Raises UserError where so many tokens are more than the cache or the model's context holds."""
        if length > self.room:
            raise UserError(f"position {length} is beyond the {self.room} that cache and context have room for")

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows go on."""
        self.rows_B1 = self.rows_B1[:len(rows)]
        self.keys = self.keys[:, rows]  # one after the other: the old ones are freed in between
        self.values = self.values[:, rows]


class Product:
    """x (..., C) → x @ weightᵀ (..., out) in `dtype`, the weight (out, C) laid out for that once."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        self.dtype, self.weight, self.packed = dtype, weight.detach().to(dtype), None
        if weight.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
            with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):  # a torch without oneDNN
                self.packed, self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight), None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        if self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class FusedModel:
    """model.WeakWater for decoding: the same function of the same weights, from as few operations as can be.

    Matrices that multiply the same vector are one. They are in the precision of the products, autocast's where it is on
    and else the weights', once and not for each token, and on a CPU laid out as its library wants them; all else is in
    the precision that it has under autocast, or a better one. Some weights are shared with the model and others are
    copies: make it anew after they change.
    """

    @torch.no_grad()
    def __init__(self, model: WeakWater):
        self.config = c = model.config
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm.weight
        self.device = self.embedding.device
        dtype = product_dtype(self.embedding)
        self.dtype, self.head = dtype, Product(model.lm_head.weight, dtype)
        self.layers = []
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            qkv = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            head_norm = torch.cat([attention.q_norm.weight.expand(c.n_heads, -1),
                                   attention.k_norm.weight.expand(c.n_kv_heads, -1)]) if c.qk_norm else None
            self.layers.append((
                block.input_layernorm.weight, Product(qkv, dtype), head_norm, Product(attention.o_proj.weight, dtype),
                block.post_attention_layernorm.weight, Product(gate_up, dtype), Product(mlp.down_proj.weight, dtype)))
        self.rotary, self.exact = model.model.rotary, torch.promote_types(self.embedding.dtype, torch.float32)
        self.model = model
        self.has_native, self.computed_by = applies(model, dtype)

    @functools.cached_property
    def native(self) -> NativeDecoder | None:
        """What computes a single row, where there is such a thing; made when it is first wanted."""
        return NativeDecoder(self.model, self.dtype) if self.has_native else None

    def normalise(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """model.RMSNorm."""
        return normalise(x, weight, self.config.norm_eps)[0]

    def hidden(self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor, cache: KVCache, length: int,
               aligned: bool) -> torch.Tensor:
        """Hidden states (B, T, C) of tokens at `positions_BT`, of which `length` is the largest + 1; their keys and
        values go into the cache. `aligned`: all rows stand at the same positions, length - T to length - 1.

        Raises UserError beyond the cache or the model's context.
        """
        cache.check_room(length)
        c, (B, T) = self.config, tokens_BT.shape
        H, turned = c.n_heads, c.n_heads + c.n_kv_heads
        cos_BT1D, sin_BT1D = self.rotary(positions_BT, self.exact)
        causal = aligned and T == length > 1
        mask = None
        if not aligned or 1 < T < length:  # (B, 1, T, S): a token sees the slots up to its own position
            mask = torch.arange(length, device=self.device) <= positions_BT[:, None, :, None]
        x_BTC = F.embedding(tokens_BT, self.embedding)
        for layer, (norm, qkv, head_norm, out, norm_2, gate_up, down) in enumerate(self.layers):
            keys, values = cache.keys[layer].transpose(1, 2), cache.values[layer].transpose(1, 2)  # (B, S, K, D)
            heads = qkv(self.normalise(x_BTC, norm)).view(B, T, -1, c.head_dim)
            q_and_k, v = heads[:, :, :turned], heads[:, :, turned:]
            if head_norm is not None:
                q_and_k = self.normalise(q_and_k, head_norm)
            q_and_k = rotate(q_and_k, cos_BT1D, sin_BT1D)
            q, k = q_and_k[:, :, :H], q_and_k[:, :, H:]
            if aligned:
                keys[:, length - T:length], values[:, length - T:length] = k, v
            else:
                keys[cache.rows_B1, positions_BT] = k.to(keys.dtype)
                values[cache.rows_B1, positions_BT] = v.to(values.dtype)
            if causal:
                attended = attend(q.to(self.dtype), k.to(self.dtype), v, causal=True)
            else:
                attended = attend(q.to(keys.dtype), keys[:, :length], values[:, :length], causal=False, mask=mask)
            x_BTC.add_(out(attended.reshape(B, T, H * c.head_dim)))
            gate, up = gate_up(self.normalise(x_BTC, norm_2)).chunk(2, -1)
            x_BTC.add_(down(F.silu(gate).mul_(up)))
        return self.normalise(x_BTC, self.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., C) → (..., V), at least float32."""
        logits = self.head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.inference_mode()
def prefill(fused: FusedModel, prompts: list[list[int]], cache: KVCache) -> torch.Tensor:
    """Put all prompts into an empty cache; logits (B, V) after the last token of each, at least float32.

    Shorter prompts are padded on the right. What the padding leaves in the cache is never seen: it stands
    beyond the row's position, and the row's own next tokens overwrite it.
    """
    longest = max(map(len, prompts))
    tokens_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=fused.device)
    positions_BT = torch.arange(longest, device=fused.device).expand(len(prompts), longest)
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=fused.device)
    hidden_BTC = fused.hidden(tokens_BT, positions_BT, cache, longest, aligned=True)
    return fused.logits(hidden_BTC[cache.rows_B1[:, 0], last_B])  # only these: (B, T, V) would fill a GPU


@torch.inference_mode()
def decode_one_token(fused: FusedModel, token_B: torch.Tensor, position_B: torch.Tensor, cache: KVCache, length: int,
                     aligned: bool = False) -> torch.Tensor:
    """Put one token of each row into the cache at its position; logits (B, V) after it, at least float32.

    `length` is the largest position + 1, which the device would have to be asked for, and `aligned` whether all
    positions are the same.
    """
    if len(token_B) == 1 and fused.native is not None:
        cache.check_room(length)
        return fused.native(int(token_B), length - 1, cache.keys, cache.values)
    return fused.logits(fused.hidden(token_B[:, None], position_B[:, None], cache, length, aligned)[:, 0])


# ---------------------------------------------------------------------------------------------
# the choice of a token


def adjust(logits_BV: torch.Tensor, sampling: Sampling, seen_BV: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (B, V) → scores (B, V), -inf where a token is ruled out. The steps, and their order, of transformers:

    repetition penalty  the logit of a token that stands in the prompt or the output so far (`seen`) is divided by
                        the penalty if positive, else multiplied (CTRL, Keskar et al. 2019, arXiv:1909.05858; the
                        multiplication is transformers' mend: dividing would favour tokens with negative logits)
    temperature         scores are divided by it (greedy: by 1)
    top-k               the k highest stay, and those equal to the k-th (Fan et al. 2018, arXiv:1805.04833)
    top-p               the fewest tokens stay whose probabilities sum to at least p (Holtzman et al. 2019,
                        arXiv:1904.09751): of the sorted tail, whatever sums to at most 1 - p goes
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
        ascending_BV, index_BV = scores.sort()
        dropped_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped_BV[:, -1] = False
        scores = scores.masked_fill(dropped_BV.scatter(1, index_BV, dropped_BV), -math.inf)
    return scores


def sample(scores_BV: torch.Tensor, greedy: bool, generator: torch.Generator | None = None) -> torch.Tensor:
    """Ids (B,): the highest score, or one drawn from softmax(scores). Never waits for the device.

    The draw: the first of V exponential clocks, clock v ticking at rate p(v), rings at v with probability p(v)
    (gpt-fast does so because torch.multinomial waits for the device).
    """
    if greedy:
        return scores_BV.argmax(-1)
    probability_BV = scores_BV.softmax(-1)
    clock_BV = torch.empty_like(probability_BV).exponential_(generator=generator)
    return (probability_BV / clock_BV).argmax(-1)


# ---------------------------------------------------------------------------------------------
# the loop


@dataclass
class Generation:
    """What one prompt was continued with, and why it ended there.

    ids are without the stop token; reason is "eos" (a stop token), "length" (max_new_tokens) or "context"
    (prompt and ids fill the model's max_seq_len).
    """

    ids: list[int]
    reason: str


@torch.inference_mode()
def stream(model: WeakWater | FusedModel, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
           stop_ids: Iterable[int], vocab_size: int | None = None, generator: torch.Generator | None = None,
           sync_every: int | None = 1) -> Iterator[tuple[int, list[int], str | None]]:
    """Continue a batch of prompts; yields (row, new ids, None or the reason the row ended), as in Generation.

    Tokens are brought to the host `sync_every` at a time, the loop's only wait for the device (None: 1 on a CPU and 16
    elsewhere, where waiting costs more than tokens past the end). Rows that have ended then leave the batch. Ids from
    `vocab_size` on (a model may have more rows than its tokenizer entries) are never sampled. `generator` stands on the
    model's device. A model is fused first, for which whoever asks again and again does better to give the FusedModel.

    Raises UserError when a prompt is empty or leaves no room in the context, or the weights give no finite logits.
    """
    fused = model if isinstance(model, FusedModel) else FusedModel(model)
    context, device = fused.config.max_seq_len, fused.device
    if sync_every is None:
        sync_every = 1 if device.type == "cpu" else 16
    stop_ids, vocab_size = set(stop_ids), vocab_size or fused.config.vocab_size
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"a prompt must have 1 to {context - 1} tokens, not {len(prompt)}")
    assert max_new_tokens > 0 and sync_every > 0
    filled = [len(prompt) for prompt in prompts]  # by prompt: tokens so far, and how many there may be
    limits = [min(len(prompt) + max_new_tokens, context) for prompt in prompts]
    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    cache = KVCache(fused, len(prompts), max(limits))
    seen_BV = _seen(prompts, vocab_size, device) if sampling.repetition_penalty != 1 else None
    token_B, position_B = None, torch.tensor(filled, device=device)
    logits_BV = prefill(fused, prompts, cache)
    while rows:
        total = torch.zeros((), device=device)  # of all logits: not finite as soon as one is not
        chosen, longest = [], max(filled[row] for row in rows)
        aligned = all(filled[row] == longest for row in rows)
        for step in range(min(sync_every, *(limits[row] - filled[row] for row in rows))):
            if token_B is not None:
                logits_BV = decode_one_token(fused, token_B, position_B, cache, longest + step, aligned)
                position_B = position_B + 1
            total = total + logits_BV.sum()
            token_B = sample(adjust(logits_BV[:, :vocab_size], sampling, seen_BV), sampling.greedy, generator)
            if seen_BV is not None:
                seen_BV.scatter_(1, token_B[:, None], True)
            chosen.append(token_B)
        if not math.isfinite(total):
            raise UserError("the model's logits are not finite: its weights are broken, or fp16 overflows "
                            "(--dtype fp32)")
        going_on = []
        for index, (row, ids) in enumerate(zip(rows, torch.stack(chosen, 1).tolist(), strict=True)):
            filled[row] += len(ids)
            stop = next((i for i, token in enumerate(ids) if token in stop_ids), None)
            if stop is not None:
                yield row, ids[:stop], "eos"
            elif filled[row] == limits[row]:
                yield row, ids, "length" if len(prompts[row]) + max_new_tokens <= context else "context"
            else:
                yield row, ids, None
                going_on.append(index)
        if len(going_on) < len(rows):
            rows = [rows[index] for index in going_on]
            keep = torch.tensor(going_on, dtype=torch.long, device=device)
            token_B, position_B = token_B[keep], position_B[keep]
            seen_BV = seen_BV[keep] if seen_BV is not None else None
            cache.keep(keep)


def generate(model: WeakWater | FusedModel, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
             stop_ids: Iterable[int], vocab_size: int | None = None, generator: torch.Generator | None = None,
             sync_every: int | None = None) -> list[Generation]:
    """Continue a batch of prompts to the end of each; arguments and errors are those of `stream`."""
    done = [Generation([], "") for _ in prompts]
    for row, ids, reason in stream(model, prompts, max_new_tokens, sampling, stop_ids, vocab_size, generator,
                                   sync_every):
        done[row].ids += ids
        done[row].reason = reason or ""
    return done


def _seen(prompts: list[list[int]], vocab_size: int, device) -> torch.Tensor:
    """(B, V), true where a token stands in the prompt."""
    seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen_BV[row, torch.tensor(prompt)] = True
    return seen_BV.to(device)


# ---------------------------------------------------------------------------------------------
# text


class StreamDecoder:
    """Ids, one at a time, → pieces of text that end at whole characters and join to the decoded whole.

    A byte-level token may end in the middle of a character; its text then decodes to U+FFFD at the end and is
    held back until the next tokens complete it. Joined, the pieces are tokenizer.decode(all ids,
    skip_special_tokens=True), exactly so for byte-level tokenizers.
    """

    LONGEST = 16  # ids held back at most: a character has 4 bytes, so what is longer is no character

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.before: list[int] = []  # the ids shown last: some decoders treat the very first token differently
        self.held: list[int] = []

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that has become certain with this token; often "" in the middle of a character."""
        self.held.append(token)
        text = self._decode(self.before + self.held)
        if not text.endswith("\ufffd"):
            return self._show(len(self.held))
        if len(self.held) < self.LONGEST:
            return ""
        # rubbish: show all but the shortest end that stands alone, whatever bytes may follow it
        for cut in range(len(self.held) - 1, 0, -1):
            if self._decode(self.before + self.held[:cut]) + self._decode(self.held[cut:]) == text:
                return self._show(cut)
        return self._show(len(self.held))

    def flush(self) -> str:
        """The rest, at the end; an incomplete character shows as U+FFFD."""
        return self._show(len(self.held))

    def _show(self, count: int) -> str:
        """The text of the first `count` ids held back."""
        shown = self._decode(self.before)
        text = self._decode(self.before + self.held[:count])
        self.before, self.held = self.held[:count] or self.before, self.held[count:]
        return text[len(shown):]
