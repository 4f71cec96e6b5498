"""Invariant 2: cached decoding gives the logits of the full forward at every position; prompts of unequal length in a
batch give the same results as each alone."""

import shutil

import pytest
import torch

import fastpath
from common.generation import Decoder, Sampling, decode_one_token, generate, prefill
from Config import LLMConfig, UserError
from model import KVCache, WeakWater

pytestmark = pytest.mark.usefixtures("without_check")

VARIANTS = {
    "tied": dict(),
    "untied": dict(tie_embeddings=False),
    "gqa": dict(n_heads=4, n_kv_heads=2),
    "gqa and qk_norm": dict(n_heads=4, n_kv_heads=1, qk_norm=True),
}
# RMSNorm computes in float32 whatever the model's dtype (as in transformers), which limits the accuracy of float64
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


def nano(dtype=torch.float32, **changes) -> WeakWater:
    """A nano model with weights large enough that its logits differ from token to token."""
    torch.manual_seed(7)
    model = WeakWater(LLMConfig.preset("nano", **{"vocab_size": 331, "max_seq_len": 48} | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1)
    return model.to(dtype).eval()


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 331, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "replaced"])
@pytest.mark.parametrize("prompt_lengths", [[1, 17, 30], [17]], ids=["batch", "one row, compiled C in float32"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_cached_logits_equal_the_full_forward_at_every_position(variant, dtype, prompt_lengths, plain):
    model, B = nano(dtype, **VARIANTS[variant]), len(prompt_lengths)
    sequences = prompts_of(40, 40, 40)[:B]
    full_BTV = model(torch.tensor(sequences))
    tolerance = TOLERANCE[dtype] * full_BTV.abs().max()
    decoder = Decoder(model, plain=plain)
    assert (decoder.native is not None) == (dtype == torch.float32 and not plain) or not shutil.which("cc")
    cache = decoder.new_cache(B, 48)
    logits_BV = prefill(decoder, [s[:n] for s, n in zip(sequences, prompt_lengths, strict=True)], cache)
    position_B = torch.tensor(prompt_lengths)
    for _ in range(10):
        expected_BV = full_BTV[torch.arange(B), position_B - 1]
        assert (logits_BV - expected_BV).abs().max() <= tolerance
        token_B = torch.tensor([s[p] for s, p in zip(sequences, position_B.tolist(), strict=True)])
        logits_BV = decode_one_token(decoder, token_B, cache)
        position_B = position_B + 1


@pytest.mark.parametrize("replaced", [False, True], ids=["plain", "replaced"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_several_new_tokens_at_once_against_a_cache(variant, dtype, replaced):
    """Rows at equal and at unequal positions; after a rewind, the padding's entries are overwritten."""
    model = nano(dtype, **VARIANTS[variant])
    tokens_BT = torch.tensor(prompts_of(24, 24))
    full_BTV = model(tokens_BT)
    if replaced:
        fastpath.patch_for_decoding(model, fastpath.Case(model.config, torch.device("cpu"), dtype, False))
    cache = KVCache(model.config, 2, 48, dtype=dtype)
    tolerance = TOLERANCE[dtype] * full_BTV.abs().max()
    parts = [model(tokens_BT[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 14), (14, 24))]
    assert (torch.cat(parts, 1) - full_BTV).abs().max() <= tolerance
    cache.rewind([7, 11])
    for _ in range(2):  # 4 tokens of each row
        index_BT = cache.positions(4)
        logits_BTV = model(tokens_BT.gather(1, index_BT), cache=cache)
        expected_BTV = full_BTV.gather(1, index_BT[..., None].expand(-1, -1, full_BTV.shape[-1]))
        assert (logits_BTV - expected_BTV).abs().max() <= tolerance


@pytest.mark.parametrize("prompt_lengths", [[9, 30], [20, 20], [20]], ids=["ragged", "aligned", "one row, compiled C"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_bf16_cached_logits_are_as_accurate_as_the_full_forward(variant, prompt_lengths):
    model = nano(**VARIANTS[variant])
    sequences = prompts_of(40, 40)[:len(prompt_lengths)]
    exact_BTV = model(torch.tensor(sequences))
    with torch.autocast("cpu", torch.bfloat16):
        full_BTV = model(torch.tensor(sequences))
    decoder = Decoder(model, "bf16")
    assert decoder.native is not None or not shutil.which("cc")
    allowed = 1.5 * (full_BTV - exact_BTV).abs().max()  # the rounding error of the full forward
    cache, rows = decoder.new_cache(len(sequences), 48), torch.arange(len(sequences))
    logits_BV = prefill(decoder, [s[:n] for s, n in zip(sequences, prompt_lengths, strict=True)], cache)
    for position_B in torch.tensor(prompt_lengths) + torch.arange(10)[:, None]:
        assert (logits_BV - exact_BTV[rows, position_B - 1]).abs().max() <= allowed
        token_B = torch.tensor([s[p] for s, p in zip(sequences, position_B.tolist(), strict=True)])
        logits_BV = decode_one_token(decoder, token_B, cache)


@pytest.mark.parametrize("plain", [True, False])
def test_a_full_cache_raises(plain):
    decoder = Decoder(nano(), plain=plain)
    cache = decoder.new_cache(1, 4)
    prefill(decoder, [[5, 6, 7, 8]], cache)
    with pytest.raises(UserError, match="position 5 is beyond the 4"):
        decode_one_token(decoder, torch.tensor([9]), cache)


@pytest.mark.parametrize("penalty, sync_every", [(1.0, 5), (1.3, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_unequal_prompts_equals_each_prompt_alone(variant, penalty, sync_every):
    model = nano(torch.float64, **VARIANTS[variant])
    prompts = prompts_of(1, 40, 7, 19, 33)
    sampling = Sampling(repetition_penalty=penalty)
    # stop tokens that some rows reach early, so that rows leave the batch at different times
    free = generate(model, prompts, 20, sampling, stop_ids=())
    stop_ids = {free[0].ids[3], free[3].ids[9]}
    together = generate(model, prompts, 20, sampling, stop_ids, sync_every=sync_every)
    alone = [generate(model, [prompt], 20, sampling, stop_ids, sync_every=1)[0] for prompt in prompts]
    assert together == alone
    assert {g.reason for g in together} >= {"eos", "context"}


@torch.inference_mode()
def test_greedy_decoding_is_the_argmax_of_the_full_forward():
    model = nano(torch.float64)
    (prompt,) = prompts_of(9)
    generation = generate(model, [prompt], 25, Sampling(), stop_ids=())[0]
    logits_TV = model(torch.tensor([prompt + generation.ids]))[0]
    assert generation.ids == logits_TV[len(prompt) - 1:-1].argmax(-1).tolist()
    assert generation.reason == "length"
