"""llama.cpp in this process (xllamacpp of requirements-extra.txt), to check an exported file with."""

import importlib.util
from pathlib import Path

import torch

from Config import UserError
from formats.hf import short
from model import WeakWater

PROMPT_TOKENS, COMPARED = 32, 20  # the likeliest next tokens are compared
PROMPTS = 20  # at most
# largest difference of a log-probability: the last three round the weights
TOLERANCE = {"f32": 0.01, "f16": 0.05, "bf16": 0.3, "q8_0": 1.0}


def why_unavailable() -> str | None:
    """The reason why llama.cpp cannot run here, or None."""
    missing = importlib.util.find_spec("xllamacpp") is None
    return "xllamacpp is not installed (pip install -r requirements-extra.txt)" if missing else None


def open_server(path: Path, context: int, threads: int = 1, exact: bool = True, slots: int = 1):
    """llama.cpp's server for a GGUF file; `slots` requests at once, each with `context` tokens. Its cache is float16,
    its default, or float32 without flash attention if `exact`."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), context * slots, slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.fit_params, params.warmup, params.verbosity = False, False, 0
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


@torch.no_grad()
def check(path: Path, model: WeakWater, quant: str) -> float | None:
    """The largest difference of the log-probabilities that llama.cpp and the model give to the likeliest tokens behind
    random ones; None if llama.cpp says nothing of them. Raises UserError if it is above TOLERANCE[quant]."""
    length, generator, found = min(PROMPT_TOKENS, model.config.max_seq_len - 2), torch.Generator().manual_seed(0), None
    try:
        server = open_server(path, length + 8)
        for _ in range(PROMPTS):  # the server says nothing of a token that ends inside a character
            prompt = torch.randint(3, model.config.vocab_size, (1, length), generator=generator)
            ours = model(prompt)[0, -1].log_softmax(-1)
            reply = server.handle_completions(dict(prompt=prompt[0].tolist(), max_tokens=1, temperature=0.0,
                                                   logprobs=COMPARED, ignore_eos=True))
            if (found := reply["choices"][0]["logprobs"]) is not None:
                break
        else:
            return None
    except Exception as error:  # the package raises its own types
        raise UserError(f"{path}: llama.cpp cannot use it: {short(error)}") from None
    worst = max(abs(token["logprob"] - float(ours[token["id"]])) for token in found["content"][0]["top_logprobs"])
    if not worst <= TOLERANCE[quant]:  # NaN is not
        raise UserError(f"{path}: llama.cpp computes other probabilities: a log-probability differs by {worst:.3g}, "
                        f"more than {TOLERANCE[quant]:g}")
    return worst
