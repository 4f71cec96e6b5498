"""common/generation.py: sampling, the generation loop, and streaming of text in whole characters."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common import generation as decoding
from common.generation import Decoder, Sampling, StreamDecoder, adjust, generate, sample, stream
from Config import LLMConfig, UserError
from fastpath import sampling
from model import WeakWater

pytestmark = pytest.mark.usefixtures("without_check")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return WeakWater(LLMConfig.preset("nano", vocab_size=300, max_seq_len=40)).eval()


# ---- sampling -------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 0.8, 1.3])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-9])
def test_scores_equal_those_of_transformers(penalty, temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 50, generator=generator) * 3
    logits[0, 10:20] = logits[0].max()  # ties
    prompt = torch.randint(0, 50, (4, 12), generator=generator)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, prompt, True)
    ours = adjust(logits, Sampling(temperature, top_p, top_k, penalty), seen)
    theirs = processors(prompt, logits)
    assert torch.equal(ours[1:], theirs[1:])
    # which of equal scores are kept is arbitrary, and rounding decides whether another one of them is
    kept = [int((scores[0] > -math.inf).sum()) for scores in (ours, theirs)]
    assert abs(kept[0] - kept[1]) <= 1
    assert ours[0][ours[0] > -math.inf].min() >= theirs[0][theirs[0] > -math.inf].min()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("width", [3000, 3001, 5])
@pytest.mark.parametrize("top_p", [0.9, 0.3, 0.999999, 1e-9])
def test_top_p_keeps_the_fewest_scores(monkeypatch, compiled, width, top_p):
    """Peaked and flat rows, very distant scores, and excluded ones; with and without sampling.c."""
    if not compiled:
        monkeypatch.setattr(sampling, "compiled", lambda: None)
    spread = torch.tensor([[5.0], [1], [0.1], [1e-4], [300]])
    logits = torch.randn(5, width, generator=torch.Generator().manual_seed(6)) * spread
    logits[0, 3:width // 2] = -math.inf
    kept = adjust(logits, Sampling(1.0, top_p))
    exact = TopPLogitsWarper(top_p)(None, logits.double())
    differ = (kept.double() != exact).sum(1)
    assert differ.max() <= 1  # where a sum is at top_p, rounding decides
    for row, scores in zip(logits, kept, strict=True):
        assert torch.equal(scores[scores > -math.inf], row[scores > -math.inf])
        dropped = row[scores == -math.inf]
        assert not len(dropped) or dropped.max() <= scores[scores > -math.inf].min()


def test_top_p_with_equal_scores_keeps_as_many_as_it_needs():
    kept = adjust(torch.zeros(2, 100), Sampling(1.0, 0.295))
    assert ((kept > -math.inf).sum(1) == 30).all()


def test_scores_that_are_not_finite_give_an_id_and_harm_no_other_row():
    logits = torch.zeros(3, 40)
    logits[1, 5], logits[2, 7] = math.nan, math.inf
    logits[0, 9] = 50
    for sampled in (Sampling(1.0, 0.9), Sampling(1.0), Sampling()):
        ids = sample(adjust(logits, sampled), sampled.greedy)
        assert ids[0] == 9 and 0 <= ids.min() and ids.max() < 40


def test_a_row_with_a_generator_of_its_own_draws_the_same_in_any_company():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(7))

    def draw(rows: list[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return torch.stack([sample(logits[rows], False, generators) for _ in range(20)], 1).tolist()

    together = draw([0, 1, 2, 3, 4])
    assert draw([3]) + draw([1, 0]) == [together[3], together[1], together[0]]
    assert together[0] != together[1]


def test_tokens_without_probability_are_never_drawn():
    scores = torch.full((1, 9), -math.inf).index_fill_(1, torch.tensor([2, 6]), 0.0)
    generator = torch.Generator().manual_seed(8)
    assert {int(sample(scores, False, generator)) for _ in range(200)} == {2, 6}


def test_greedy_is_the_argmax_after_the_repetition_penalty():
    logits, seen = torch.tensor([[3.0, 2.9, -1.0]]), torch.tensor([[True, False, False]])
    assert sample(adjust(logits, Sampling()), greedy=True).tolist() == [0]
    assert sample(adjust(logits, Sampling(repetition_penalty=1.1), seen), greedy=True).tolist() == [1]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).log()
    drawn = sample(logits.expand(40_000, 5), False, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=5) / 40_000
    assert torch.allclose(shares, logits.exp(), atol=0.01)
    assert shares[4] == 0


@pytest.mark.parametrize("values", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_p=0),
                                    dict(top_p=1.1), dict(top_k=-1), dict(repetition_penalty=0)])
def test_invalid_sampling_settings_are_rejected(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values)


@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1e-4, 1e30])
def test_extreme_temperatures_give_tokens(model, temperature):
    ids = generate(model, [[1, 5]], 5, Sampling(temperature), ())[0].ids
    assert len(ids) == 5
    if temperature < 1e-3:
        assert ids == generate(model, [[1, 5]], 5, Sampling(0), ())[0].ids


# ---- the loop -------------------------------------------------------------------------------


def test_a_seed_repeats_a_generation_and_another_does_not(model):
    def draw(seed):
        return generate(model, [[1, 5, 9], [4]], 30, Sampling(1.0), (), generator=torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1) != draw(2)


def test_ids_outside_the_tokenizer_are_never_sampled(model):
    hot = Sampling(temperature=100.0)
    free = generate(model, [[1, 5]] * 8, 30, hot, (), generator=torch.Generator().manual_seed(0))
    held = generate(model, [[1, 5]] * 8, 30, hot, (), vocab_size=200, generator=torch.Generator().manual_seed(0))
    assert max(max(g.ids) for g in free) >= 200 > max(max(g.ids) for g in held)


def test_reasons_to_stop(model):
    prompts = [[1] * 30, [1] * 39, [1, 2]]
    first = generate(model, prompts, 12, Sampling(), ())
    assert [(len(g.ids), g.reason) for g in first] == [(10, "context"), (1, "context"), (12, "length")]
    stopped = generate(model, prompts[2:], 12, Sampling(), {first[2].ids[0]})[0]
    assert (stopped.ids, stopped.reason) == ([], "eos")


def test_prompts_that_fill_the_context_are_rejected(model):
    for prompts in ([[]], [[1] * 40], [[1], [1] * 41]):
        with pytest.raises(UserError, match="1 to 39 tokens"):
            generate(model, prompts, 5, Sampling(), ())


def test_weights_that_are_not_finite_raise(model):
    broken = WeakWater(model.config).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    for how in (Sampling(), Sampling(1.0, 0.9, repetition_penalty=1.2)):
        for sync_every in (1, 16):
            with pytest.raises(UserError, match="not finite"):
                generate(broken, [[1]], 5, how, (), sync_every=sync_every)


def test_stream_yields_token_by_token_and_joins_to_generate(model):
    steps = list(stream(model, [[1, 2], [3]], 6, Sampling(), ()))
    assert [(row, len(ids)) for row, ids, _ in steps] == [(0, 1), (1, 1)] * 6
    joined = [sum((ids for r, ids, _ in steps if r == row), []) for row in (0, 1)]
    assert joined == [g.ids for g in generate(model, [[1, 2], [3]], 6, Sampling(), (), sync_every=4)]


def test_the_dtypes_of_matmuls_and_cache(model):
    decoder = Decoder(model, "bf16")
    assert decoder.new_cache(1, 2).keys.dtype == (torch.float32 if decoder.native_reason else torch.bfloat16)
    assert Decoder(copy.deepcopy(model), "bf16", plain=True).new_cache(1, 2).keys.dtype == torch.float32  # on a CPU
    assert model.lm_head.matmul.dtype == model.model.layers[0].self_attn.qkv.dtype == torch.bfloat16
    assert len(generate(decoder, [[1, 2, 3]], 8, Sampling(), ())[0].ids) == 8


def test_a_new_decoder_uses_changed_weights(model):
    """The forwards of an earlier Decoder hold copies of the weights. A new Decoder makes new copies."""
    torch.manual_seed(2)
    changed = WeakWater(replace(model.config, tie_embeddings=False)).eval()
    before = generate(changed, [[1, 2], [3, 4]], 8, Sampling(), ())
    with torch.no_grad():
        for weight in changed.parameters():
            weight.copy_(weight.flip(0))
    after = generate(changed, [[1, 2], [3, 4]], 8, Sampling(), ())
    assert after == generate(Decoder(changed, plain=True), [[1, 2], [3, 4]], 8, Sampling(), ()) != before


def test_logits_that_overflow_during_generation_raise(model, monkeypatch):
    unchanged, calls = decoding.decode_one_token, []

    def overflowing(*args):
        calls.append(args)
        return unchanged(*args) * (math.inf if len(calls) == 2 else 1)

    monkeypatch.setattr(decoding, "decode_one_token", overflowing)
    with pytest.raises(UserError, match="not finite"):
        generate(model, [[1, 2, 3]], 8, Sampling(), (), sync_every=4)


# ---- text -----------------------------------------------------------------------------------


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(token) for token in ids] + [decoder.flush()]


def test_characters_and_emoji_arrive_whole(tokenizer):
    text = "鳄鱼🐊 and 👩‍👩‍👧 naïve ✨\n<think>嗯</think> 𠮷野家"
    pieces = pieces_of(tokenizer, tokenizer.backend_tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_shows_at_the_end(tokenizer):
    ids = tokenizer.backend_tokenizer.encode("鳄").ids
    assert len(ids) > 1
    assert pieces_of(tokenizer, ids[:-1])[:-1] == [""] * (len(ids) - 1)
    assert pieces_of(tokenizer, ids[:-1])[-1] == "\ufffd"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_decoded_whole(tokenizer, data):
    """Any ids: special tokens, parts of characters, long runs of bytes that are not text."""
    vocabulary = tokenizer.get_vocab()
    lone_bytes = [i for token, i in vocabulary.items() if len(token) == 1 and not token.isascii()]
    any_id = st.sampled_from(lone_bytes) | st.integers(0, len(tokenizer) - 1) | st.integers(0, 9)
    ids = data.draw(st.lists(any_id, max_size=80))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_streamed_text_equals_the_input(tokenizer, text):
    ids = tokenizer.backend_tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_invalid_bytes_are_shown_at_bounded_cost(tokenizer):
    class Counting:
        longest = 0

        def decode(self, ids, **options):
            self.longest = max(self.longest, len(ids))
            return tokenizer.decode(ids, **options)

    counting = Counting()
    decoder = StreamDecoder(counting)
    continuation = tokenizer.get_vocab()["Ģ"]  # byte 0x80, which starts no character
    shown = sum(len(decoder.push(continuation)) for _ in range(800))
    assert shown >= 800 - StreamDecoder.LONGEST
    assert shown + len(decoder.flush()) == 800
    assert counting.longest <= 2 * StreamDecoder.LONGEST


def test_decoders_that_treat_the_first_token_differently(tmp_path):
    """As in SentencePiece (Llama 2): "▁" is a space except at the start, and bytes are separate tokens."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁the", "▁cat", "s", "▁", *(f"<0x{byte:02X}>" for byte in "鳄".encode())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    ids = [1, 2, 3, 5, 6, 7, 1, 2]
    pieces = pieces_of(fast, ids)
    assert "".join(pieces) == fast.decode(ids, skip_special_tokens=True) == "the cats鳄 the cat"
    assert not any("\ufffd" in piece for piece in pieces)
