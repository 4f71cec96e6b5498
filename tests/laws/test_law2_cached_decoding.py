"""Law 2: cached decoding gives the full forward's logits at every position; prompts of unequal length in a batch
give what each gives alone."""

import shutil

import pytest
import torch

from common.generation import FusedModel, KVCache, Sampling, decode_one_token, generate, prefill
from Config import LLMConfig, UserError
from model import WeakWater

VARIANTS = {
    "tied": dict(),
    "untied": dict(tie_embeddings=False),
    "gqa": dict(n_heads=4, n_kv_heads=2),
    "gqa and qk_norm": dict(n_heads=4, n_kv_heads=1, qk_norm=True),
}
# RMSNorm is in float32 whatever the model is in (as in transformers), so float64 is no exacter than this
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


def nano(dtype=torch.float32, **changes) -> WeakWater:
    """A nano model whose weights are large enough for its logits to differ from token to token."""
    torch.manual_seed(7)
    model = WeakWater(LLMConfig.preset("nano", **{"vocab_size": 331, "max_seq_len": 48} | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1)
    return model.to(dtype).eval()


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 331, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("prompt_lengths", [[1, 17, 30], [17]], ids=["batch", "one row, compiled C in float32"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_cached_logits_are_those_of_the_full_forward_at_every_position(variant, dtype, prompt_lengths):
    model, B = nano(dtype, **VARIANTS[variant]), len(prompt_lengths)
    sequences = prompts_of(40, 40, 40)[:B]
    full_BTV = model(torch.tensor(sequences))
    tolerance = TOLERANCE[dtype] * full_BTV.abs().max()
    fused = FusedModel(model)
    assert (fused.native is not None) == (dtype == torch.float32) or not shutil.which("cc")
    cache = KVCache(fused, B, 48)
    logits_BV = prefill(fused, [s[:n] for s, n in zip(sequences, prompt_lengths, strict=True)], cache)
    position_B = torch.tensor(prompt_lengths)
    for _ in range(10):
        expected_BV = full_BTV[torch.arange(B), position_B - 1]
        assert (logits_BV - expected_BV).abs().max() <= tolerance
        token_B = torch.tensor([s[p] for s, p in zip(sequences, position_B.tolist(), strict=True)])
        logits_BV = decode_one_token(fused, token_B, position_B, cache, int(position_B.max()) + 1)
        position_B = position_B + 1


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_several_new_tokens_at_once_against_a_cache(variant, dtype):
    model = nano(dtype, **VARIANTS[variant])
    tokens_BT = torch.tensor(prompts_of(24, 24))
    positions_BT = torch.arange(24).expand(2, 24)
    full_BTV = model(tokens_BT)
    fused = FusedModel(model)
    cache = KVCache(fused, 2, 48)
    parts = [fused.hidden(tokens_BT[:, a:b], positions_BT[:, a:b], cache, b, aligned)
             for a, b, aligned in ((0, 5, True), (5, 6, False), (6, 14, True), (14, 24, False))]
    assert (fused.logits(torch.cat(parts, 1)) - full_BTV).abs().max() <= TOLERANCE[dtype] * full_BTV.abs().max()


@pytest.mark.parametrize("prompt_lengths", [[9, 30], [20, 20], [20]], ids=["ragged", "aligned", "one row, compiled C"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_in_half_precision_cached_logits_are_as_exact_as_the_full_forward(variant, prompt_lengths):
    model = nano(**VARIANTS[variant])
    sequences, aligned = prompts_of(40, 40)[:len(prompt_lengths)], len(set(prompt_lengths)) == 1
    exact_BTV = model(torch.tensor(sequences))
    with torch.autocast("cpu", torch.bfloat16):
        full_BTV, fused = model(torch.tensor(sequences)), FusedModel(model)
    assert fused.dtype == torch.bfloat16 and (fused.native is not None or not shutil.which("cc"))
    allowed = 1.5 * (full_BTV - exact_BTV).abs().max()  # what rounding costs the full forward
    cache, rows = KVCache(fused, len(sequences), 48), torch.arange(len(sequences))
    logits_BV = prefill(fused, [s[:n] for s, n in zip(sequences, prompt_lengths, strict=True)], cache)
    for position_B in torch.tensor(prompt_lengths) + torch.arange(10)[:, None]:
        assert (logits_BV - exact_BTV[rows, position_B - 1]).abs().max() <= allowed
        token_B = torch.tensor([s[p] for s, p in zip(sequences, position_B.tolist(), strict=True)])
        logits_BV = decode_one_token(fused, token_B, position_B, cache, int(position_B.max()) + 1, aligned)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_full_cache_is_refused(aligned):
    fused = FusedModel(nano())
    cache = KVCache(fused, 1, 4)
    prefill(fused, [[5, 6, 7, 8]], cache)
    with pytest.raises(UserError, match="position 5 is beyond the 4"):
        decode_one_token(fused, torch.tensor([9]), torch.tensor([4]), cache, 5, aligned)


@pytest.mark.parametrize("penalty, sync_every", [(1.0, 5), (1.3, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(variant, penalty, sync_every):
    model = nano(torch.float64, **VARIANTS[variant])
    prompts = prompts_of(1, 40, 7, 19, 33)
    sampling = Sampling(repetition_penalty=penalty)
    # stop tokens that some rows meet early, so that rows leave the batch at different times
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
