"""Decoding speed beside transformers and llama.cpp: the same weights, the same prompts, in turns.

    python benchmarks/decode_throughput.py --preset weakwater-30m --repeats 5

ours            common/generation.py with its static key/value cache, as eval_model.py and evaluate.py call it
transformers    LlamaForCausalLM.generate (Qwen3 with qk_norm) on the same weights, as its documentation says
llama.cpp       on a GGUF of the same weights, F32, BF16 and Q8_0 (pip install -r requirements-extra.txt); left out, and
                said so, where the packages are not installed and on a GPU; one prompt only

A prompt of --prompt_tokens is continued by exactly --new_tokens, greedily and sampled (temperature 0.7, top_p 0.9), one
prompt and --batch of them. "first token" is the same call for a single token. Weights are random, but large enough
that replies do not repeat themselves. Before anything is timed the same calls are compared: in float32 the greedy
tokens of one prompt and of all of them with transformers', and of one with llama.cpp's (its cache, else float16, in
float32 for this); in bf16, where each rounds in its own way, how many of float32's tokens each finds when it goes on
from what float32 said before. "limit" is what memory bandwidth, measured in the same turns, leaves: the bytes of
weights and cache that each token has to read.
"""

import math
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.measure import (
    make_parser,
    print_result,
    print_table,
    ratio,
    take_turns,
    to_transformers,
    warn_of_load,
)
from common import runtime
from common.generation import FusedModel, Sampling, generate
from Config import LLMConfig, number
from model import WeakWater

SAMPLED = Sampling(temperature=0.7, top_p=0.9)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALIKE = 32  # so many first tokens of each reply in float32 must be the same: later a near tie may be decided otherwise
PREFIXES = 16  # of a greedy reply, from each of which every bf16 decoder goes on
SPREAD = 1.6  # of the layers' weights, over the root of their width; less, and a model repeats its last token


# ---------------------------------------------------------------------------------------------
# the three decoders: new tokens for a batch of prompts


class Ours:
    """`generate` over weights fused once; no token stops it."""

    def __init__(self, model: WeakWater, device: torch.device, dtype: str):
        with runtime.autocast(device, dtype):
            self.fused = FusedModel(model)

    def __call__(self, prompts: list[list[int]], new_tokens: int, sampled: bool) -> list[list[int]]:
        done = generate(self.fused, prompts, new_tokens, SAMPLED if sampled else Sampling(), ())
        return [generation.ids for generation in done]


class Transformers:
    """`generate` of a model whose weights have the dtype."""

    def __init__(self, model: WeakWater, device: torch.device, dtype: str):
        self.model = to_transformers(model).to(device, DTYPES[dtype]).eval()
        self.device = device

    def __call__(self, prompts: list[list[int]], new_tokens: int, sampled: bool) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.device)
        how = dict(temperature=0.7, top_p=0.9, top_k=0) if sampled else {}
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=sampled, pad_token_id=0,
                                      eos_token_id=None, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **how)
        return out[:, ids.shape[1]:].tolist()


class LlamaCpp:
    """llama-cpp-python on a GGUF file; its cache in float16, as it is by default, or `exact`, in float32."""

    def __init__(self, path: Path, context: int, exact: bool = False):
        from llama_cpp import GGML_TYPE_F32, Llama

        cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32} if exact else {}
        self.llama = Llama(str(path), n_ctx=context, n_threads=torch.get_num_threads(), logits_all=False, verbose=False,
                           n_threads_batch=torch.get_num_threads(), **cache)

    def __call__(self, prompts: list[list[int]], new_tokens: int, sampled: bool) -> list[list[int]]:
        (prompt,) = prompts
        self.llama.reset()
        how = dict(temp=0.7, top_p=0.9, top_k=0, min_p=0.0) if sampled else dict(temp=0.0)
        tokens = self.llama.generate(prompt, repeat_penalty=1.0, reset=True, **how)
        return [[next(tokens) for _ in range(new_tokens)]]


def write_gguf(model: WeakWater, path: Path, kind: str) -> None:
    """The weights as a GGUF file for llama.cpp, kind "F32", "BF16" or "Q8_0"; the vocabulary is made of numbers.

    Its Llama turns neighbouring dimensions (2i, 2i+1) by RoPE, we and transformers turn i and i + D/2: rows of q and k
    are put in its order. Its Qwen3 turns ours.
    """
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "qwen3" if config.qk_norm else "llama")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    quantization = getattr(gguf.GGMLQuantizationType, kind)

    def add(name: str, tensor: torch.Tensor, heads: int = 0) -> None:
        data = tensor.detach().float().cpu().numpy()
        if heads and not config.qk_norm:
            data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        if data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, quantization), raw_dtype=quantization)

    add("token_embd.weight", state["model.embed_tokens.weight"])
    add("output_norm.weight", state["model.norm.weight"])
    add("output.weight", state["lm_head.weight"])
    for i in range(config.n_layers):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        for name, target, heads in (
                ("input_layernorm", "attn_norm", 0), ("post_attention_layernorm", "ffn_norm", 0),
                ("self_attn.q_proj", "attn_q", config.n_heads), ("self_attn.k_proj", "attn_k", config.n_kv_heads),
                ("self_attn.v_proj", "attn_v", 0), ("self_attn.o_proj", "attn_output", 0),
                ("mlp.gate_proj", "ffn_gate", 0), ("mlp.up_proj", "ffn_up", 0), ("mlp.down_proj", "ffn_down", 0)):
            add(theirs + target + ".weight", state[ours + name + ".weight"], heads)
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                add(f"{theirs}attn_{name}.weight", state[f"{ours}self_attn.{name}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------------------------------
# measuring


def make_model(config: LLMConfig, device: torch.device) -> WeakWater:
    """A model whose greedy reply goes on and on without repeating itself."""
    model = WeakWater(config)
    for parameter in model.model.layers.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=SPREAD / math.sqrt(parameter.shape[1]))
    return model.to(device).eval()


def bytes_per_token(model: WeakWater, n_bytes: float, positions: float) -> float:
    """What one decoded token has to read: every matrix once, the output matrix too, and the keys and values of the
    positions before it (two bytes each where weights have at most two, else four)."""
    config, parts = model.config, model.num_parameters()
    weights = parts["attention"] + parts["mlp"] + config.vocab_size * config.dim
    cached = 2 * config.n_layers * config.n_kv_heads * config.head_dim * positions
    return weights * n_bytes + cached * max(2, n_bytes)


def decoders_of(model: WeakWater, device: torch.device, dtype: str, folder: Path, context: int) -> dict:
    """All decoders of one dtype that can be had here, by name."""
    decoders = {"ours": Ours(model, device, dtype), "transformers": Transformers(model, device, dtype)}
    if device.type != "cpu":
        print("llama.cpp is left out: pip builds it for the CPU only")
        return decoders
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        print(f"llama.cpp is left out: {error} (pip install -r requirements-extra.txt)")
        return decoders
    for kind in ("F32",) if dtype == "fp32" else ("BF16", "Q8_0"):
        path = folder / f"{kind}.gguf"
        write_gguf(model, path, kind)
        decoders[f"llama.cpp {kind}"] = LlamaCpp(path, context)
    return decoders


def check_equal(decoders: dict, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The greedy reply to each prompt in float32. Raises RuntimeError where the decoders' replies differ early, or say
    so little that equality would prove nothing."""
    calls = [prompts[:1], prompts]
    replies = [decoders["ours"](call, new_tokens, False) for call in calls]
    if len(set(replies[0][0])) < new_tokens / 2:
        raise RuntimeError(f"the reply has only {len(set(replies[0][0]))} different tokens: nothing to compare")
    for name, decoder in decoders.items():
        if name == "ours":
            continue
        compared = equal = 0
        for call, ours in list(zip(calls, replies, strict=True))[:1 if name.startswith("llama.cpp") else 2]:
            for mine, other in zip(ours, decoder(call, new_tokens, False), strict=True):
                alike = next((i for i, pair in enumerate(zip(mine, other, strict=True)) if len(set(pair)) > 1),
                             new_tokens)
                if alike < min(ALIKE, new_tokens):
                    raise RuntimeError(f"{name}, {len(call)} prompts in float32: the {alike + 1}th token is not ours")
                compared, equal = compared + new_tokens, equal + alike
        print(f"greedy tokens in float32, ours and those of {name}: {equal:,} of {compared:,} the same")
    return replies[1]


def check_found(decoders: dict, prompts: list[list[int]], replies: list[list[int]]) -> dict[str, float]:
    """Of each decoder in half precision: the share of float32's replies that it finds, two tokens at a time, from
    prefixes of the first one alone, and from the same place in all of them at once. Raises RuntimeError where ours
    finds clearly fewer than another one of the same precision."""
    places = sorted({len(replies[0]) * i // PREFIXES // 2 * 2 for i in range(PREFIXES)})
    shares = {}
    for name, decoder in decoders.items():
        for rows, starts in ((1, places), (len(prompts), places[::4])):
            if rows > 1 and name.startswith("llama.cpp"):
                continue
            right = []
            for start in starts:
                found = decoder([p + r[:start] for p, r in zip(prompts[:rows], replies, strict=False)], 2, False)
                for two, reply in zip(found, replies, strict=False):
                    right += [two[0] == reply[start], two == reply[start:start + 2]]
            shares[f"{name}, {rows} at once"] = sum(right) / len(right)
    print("of float32's tokens found: " + "; ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    for rows in (1, len(prompts)):
        best = max(share for name, share in shares.items() if name.endswith(f", {rows} at once") and "Q8_0" not in name)
        if (share := shares[f"ours, {rows} at once"]) < best - 0.2:
            raise RuntimeError(f"ours, {rows} at once, finds {share:.0%} of float32's tokens, another {best:.0%}")
    return shares


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--prompt_tokens", type=number(int, 1), default=128, help="(default: %(default)s)")
    parser.add_argument("--new_tokens", type=number(int, 2), default=256, help="(default: %(default)s)")
    parser.add_argument("--batch", type=number(int, 2), default=16, help="prompts of the large batch (default: 16)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")
    args = parser.parse_args()
    warn_of_load()
    device, _ = runtime.pick_device(args.device)
    own = runtime.pick_dtype("auto", device)[0]
    runtime.prepare(device, own, 0, False)
    model = make_model(LLMConfig.preset(args.preset).for_run(args.prompt_tokens + args.new_tokens, 0.0), device)
    config, rng = model.config, np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (args.batch, args.prompt_tokens)).tolist()
    block = torch.ones(2**27, device=device)  # 512 MiB, which no cache holds
    print(f"{runtime.describe_machine(device)}; {args.preset}; {args.prompt_tokens} tokens continued by "
          f"{args.new_tokens}, {args.repeats} turns")
    result, ratios, rows, shares, context = {}, {}, [], {}, args.prompt_tokens + args.new_tokens + 8
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dict.fromkeys(("fp32", own)):
            decoders = decoders_of(model, device, dtype, Path(folder), context)
            if dtype == "fp32":
                comparing = dict(decoders)
                if "llama.cpp F32" in decoders:
                    comparing["llama.cpp F32"] = LlamaCpp(Path(folder) / "F32.gguf", context, exact=True)
                replies = check_equal(comparing, prompts, args.new_tokens)
            else:
                shares = check_found(decoders, prompts, replies)
            for batch, sampled in ((1, False), (1, True), (args.batch, False), (args.batch, True)):
                taking = {n: d for n, d in decoders.items() if batch == 1 or not n.startswith("llama.cpp")}
                asked = prompts[:batch]
                first = take_turns({n: partial(d, asked, 1, sampled) for n, d in taking.items()}, args.repeats)
                whole = take_turns({n: partial(d, asked, args.new_tokens, sampled) for n, d in taking.items()}
                                   | {"memory": block.sum}, args.repeats)
                bandwidth = 2**29 / statistics.median(whole["memory"])
                case = f"{dtype}, {batch} row{'s' * (batch > 1)}, {'sampled' if sampled else 'greedy'}"
                for name in taking:
                    n_bytes = 34 / 32 if name.endswith("Q8_0") else DTYPES[dtype].itemsize
                    limit = batch * bandwidth / bytes_per_token(
                        model, n_bytes, batch * (args.prompt_tokens + args.new_tokens / 2))
                    rates = [batch * args.new_tokens / seconds for seconds in whole[name]]
                    result[f"{case}, {name}"] = dict(tokens_per_second=rates, limit=limit, bytes_per_second=bandwidth,
                                                     first_token=first[name])
                    rows.append([case, name, f"{1000 * statistics.median(first[name]):.0f}",
                                 f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}",
                                 f"{statistics.median(rates) / limit:.0%}"])
                if batch == 1 and not sampled:
                    for name in taking:
                        if name != "ours":
                            kind = name.removeprefix("llama.cpp ").lower()
                            key = "transformers_" + dtype if name == "transformers" else "llama_cpp_" + kind
                            ratios[f"batch1_vs_{key}"] = ratio(whole[name], whole["ours"])
                    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s")
    print_table(["", "", "first token, ms", "tokens/s", "range", "of the limit"], rows)
    ratios["batch1_vs_transformers"] = ratios[f"batch1_vs_transformers_{own}"]  # in the machine's best precision
    same = "batch1_vs_llama_cpp_" + {"bf16": "bf16", "fp32": "f32"}.get(own, "")
    if same in ratios:
        ratios["batch1_vs_llama_cpp"] = ratios[same]
    print_result({"ratios": ratios, "machine": runtime.describe_machine(device), "preset": args.preset,
                  "found_of_float32": shares, "cases": result})


if __name__ == "__main__":
    sys.exit(runtime.run(main))
