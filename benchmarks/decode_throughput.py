"""Decoding speed beside transformers and llama.cpp: the same weights, the same prompt, in turns.

    python benchmarks/decode_throughput.py --preset weakwater-30m --repeats 5

ours            common/generation.py with its static key/value cache, as eval_model.py and evaluate.py call it
transformers    LlamaForCausalLM.generate on the same weights, as its documentation says
llama.cpp       on a GGUF of the same weights, F32, BF16 and Q8_0 (pip install -r requirements-extra.txt); left out, and
                said so, where the packages are not installed and on a GPU; batch 1 only

A prompt of --prompt_tokens is continued by exactly --new_tokens, greedily and sampled (temperature 0.7, top_p 0.9), one
prompt and --batch of them. "time to first token" is the same call for a single token. Before anything is timed, the
greedy tokens in float32 are compared: ours and transformers' must all be equal, and the first 32 of llama.cpp's.
"limit" is what memory bandwidth, measured in the same run, leaves: the bytes of weights and cache that each token has
to read.
"""

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.measure import make_parser, print_result, print_table, ratio, take_turns, to_transformers
from common import runtime
from common.generation import FusedModel, Sampling, generate
from Config import LLMConfig, number
from model import WeakWater

SAMPLED = Sampling(temperature=0.7, top_p=0.9)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALIKE = 32  # so many first tokens of llama.cpp, whose products round otherwise, must be ours


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
    """llama-cpp-python on a GGUF file."""

    def __init__(self, path: Path, context: int):
        from llama_cpp import Llama

        self.llama = Llama(str(path), n_ctx=context, n_threads=torch.get_num_threads(), logits_all=False, verbose=False,
                           n_threads_batch=torch.get_num_threads())

    def __call__(self, prompts: list[list[int]], new_tokens: int, sampled: bool) -> list[list[int]]:
        (prompt,) = prompts
        self.llama.reset()
        how = dict(temp=0.7, top_p=0.9, top_k=0) if sampled else dict(temp=0.0)
        tokens = self.llama.generate(prompt, repeat_penalty=1.0, reset=True, **how)
        return [[next(tokens) for _ in range(new_tokens)]]


def write_gguf(model: WeakWater, path: Path, kind: str) -> None:
    """The weights as a GGUF file for llama.cpp, kind "F32", "BF16" or "Q8_0"; the vocabulary is made of numbers.

    llama.cpp turns neighbouring dimensions (2i, 2i+1) by RoPE, we and transformers turn i and i + D/2: rows of q and k
    are put in its order.
    """
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.dim // config.n_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    quantization = getattr(gguf.GGMLQuantizationType, kind)

    def add(name: str, tensor: torch.Tensor, heads: int = 0) -> None:
        data = tensor.detach().float().cpu().numpy()
        if heads:
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------------------------------
# measuring


def read_rate(device: torch.device) -> float:
    """Bytes per second at which all threads read memory that no cache holds: the sum of 512 MiB of float32."""
    block = torch.ones(2**27, device=device)
    return 2**29 / statistics.median(take_turns({"sum": block.sum}, 5)["sum"])


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


def check_equal(decoders: dict, prompts: list[list[int]], new_tokens: int) -> None:
    """Raises RuntimeError where greedy tokens in float32 differ."""
    asked = {"ours": prompts[:2], "transformers": prompts[:2], "llama.cpp F32": prompts[:1]}
    found = {name: decoders[name](asked[name], new_tokens, False) for name in asked if name in decoders}
    if found["ours"] != found["transformers"]:
        raise RuntimeError("ours and transformers do not decode the same tokens in float32")
    print(f"greedy tokens in fp32: equal to transformers' ({2 * new_tokens} compared)")
    if "llama.cpp F32" in found:
        (ours, *_), (theirs,) = found["ours"], found["llama.cpp F32"]
        alike = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1), new_tokens)
        if alike < min(ALIKE, new_tokens):
            raise RuntimeError(f"llama.cpp's tokens in float32 are ours only up to the {alike + 1}th")
        print(f"and to llama.cpp's: the first {alike} of {new_tokens}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--prompt_tokens", type=number(int, 1), default=128, help="(default: %(default)s)")
    parser.add_argument("--new_tokens", type=number(int, 2), default=256, help="(default: %(default)s)")
    parser.add_argument("--batch", type=number(int, 2), default=16, help="prompts of the large batch (default: 16)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")
    args = parser.parse_args()
    device, _ = runtime.pick_device(args.device)
    runtime.prepare(device, runtime.pick_dtype("auto", device)[0], 0, False)
    model = WeakWater(LLMConfig.preset(args.preset)).to(device).eval()
    config, rng = model.config, np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (args.batch, args.prompt_tokens)).tolist()
    bandwidth = read_rate(device)
    print(f"{runtime.describe_machine(device)}; {args.preset}; memory is read at {bandwidth / 1e9:.1f} GB/s; "
          f"{args.prompt_tokens} tokens continued by {args.new_tokens}, {args.repeats} turns")
    result, ratios, rows = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dict.fromkeys(("fp32", runtime.pick_dtype("auto", device)[0])):
            decoders = decoders_of(model, device, dtype, Path(folder), args.prompt_tokens + args.new_tokens + 8)
            if dtype == "fp32":
                check_equal(decoders, prompts, args.new_tokens)
            for batch, sampled in ((1, False), (1, True), (args.batch, False)):
                taking = {n: d for n, d in decoders.items() if batch == 1 or not n.startswith("llama.cpp")}
                asked = prompts[:batch]
                first = take_turns({n: partial(d, asked, 1, sampled) for n, d in taking.items()}, args.repeats)
                whole = take_turns({n: partial(d, asked, args.new_tokens, sampled) for n, d in taking.items()},
                                   args.repeats)
                case = f"{dtype}, batch {batch}, {'sampled' if sampled else 'greedy'}"
                for name in taking:
                    n_bytes = 34 / 32 if name.endswith("Q8_0") else DTYPES[dtype].itemsize
                    limit = batch * bandwidth / bytes_per_token(
                        model, n_bytes, batch * (args.prompt_tokens + args.new_tokens / 2))
                    rates = [batch * args.new_tokens / seconds for seconds in whole[name]]
                    result[f"{case}, {name}"] = dict(tokens_per_second=rates, limit=limit, first_token=first[name])
                    rows.append([case, name, f"{1000 * statistics.median(first[name]):.0f}",
                                 f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}",
                                 f"{statistics.median(rates) / limit:.0%}"])
                if batch == 1 and not sampled:
                    ratios[f"batch1_vs_transformers_{dtype}"] = ratio(whole["transformers"], whole["ours"])
                    for name in taking:
                        if name.startswith("llama.cpp"):
                            kind = name.split()[1].lower()
                            ratios[f"batch1_vs_llama_cpp_{kind}"] = ratio(whole[name], whole["ours"])
    print_table(["", "", "first token, ms", "tokens/s", "range", "of the limit"], rows)
    ratios["batch1_vs_transformers"] = ratios[f"batch1_vs_transformers_{dtype}"]  # of the last, the machine's best
    same = "batch1_vs_llama_cpp_" + {"bf16": "bf16", "fp32": "f32"}.get(dtype, "")
    if same in ratios:
        ratios["batch1_vs_llama_cpp"] = ratios[same]
    print_result({"ratios": ratios, "machine": runtime.describe_machine(device), "preset": args.preset,
                  "bytes_per_second": bandwidth, "cases": result})


if __name__ == "__main__":
    sys.exit(runtime.run(main))
