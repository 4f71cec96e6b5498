"""Decoding speed compared with transformers and llama.cpp: same weights, same prompts, measured in turns.

    python benchmarks/decode_throughput.py --preset weakwater-30m --repeats 5

ours            common/generation.py with its static key/value cache, as in eval_model.py and evaluate.py
ours int8       the same with weights as export.py --format int8 writes them
transformers    LlamaForCausalLM.generate (Qwen3 with qk_norm) on the same weights, used as in its documentation
llama.cpp       a GGUF file of the same weights in F32, BF16, F16 and Q8_0 (pip install -r requirements-extra.txt);
                several prompts in its parallel slots; skipped with a message on a GPU or if the packages are missing

Each decoder runs in a separate process. If a decoder crashes, its table cell says so.

Each prompt of --prompt_tokens is continued by exactly --new_tokens, greedily and sampled (temperature 0.7, top_p 0.9),
for one prompt and for batches of --batch. "first token" and "32 tokens" are the times of the same call for as many new
tokens; "peak MiB" is the memory of the decoder's process, with Python and all libraries. The weights are random, but
large enough that replies do not repeat themselves. "of the limit" is relative to the rate that memory bandwidth allows
if each token reads all weights and the cache; the bandwidth is measured in the same turns.

First the decoders are compared. In float32 the greedy tokens must equal those of transformers, for one prompt and for
the batches, and those of llama.cpp for one prompt (with a float32 cache here; the default is float16). In bf16 the
decoders round differently, so each continues prefixes of the float32 reply, and the share of equal tokens counts.
--quick times only greedy decoding in the best precision of the machine.
"""

import importlib.util
import itertools
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.measure import (
    Worker,
    WorkerFailed,
    close_all,
    end,
    failures,
    make_parser,
    peak_mebibytes,
    print_head,
    print_row,
    ratio,
    take_turns,
    warn_of_load,
)
from common import exits, runtime
from common.generation import Decoder, Sampling, generate
from Config import LLMConfig, number
from fastpath.int8 import round_weights
from formats import gguf, llama_cpp
from formats.hf import to_transformers
from model import WeakWater

SAMPLED = Sampling(temperature=0.7, top_p=0.9)
MIN_EQUAL = 32  # first tokens of a float32 reply that must be equal; later, rounding may decide a near tie differently
PREFIXES = 16  # number of prefixes of a float32 reply that each bf16 decoder continues
END_ID = 2  # id of `</s>`
INIT_SCALE = 1.6  # std of the layers' weights times the root of their width; below it a model repeats its last token


# ---------------------------------------------------------------------------------------------
# the three decoders: a batch of prompts → new tokens


class Measured:
    """A decoder that knows the memory of its process."""

    def memory(self) -> float:
        """Peak MiB."""
        return peak_mebibytes()


class Ours(Measured):
    """common.generation.generate with one Decoder and no stop tokens."""

    def __init__(self, model: WeakWater, device: torch.device, dtype: str, plain: bool = False, int8: bool = False):
        if int8:
            round_weights(model)
        self.decoder = Decoder(model, dtype, plain, int8)

    def __call__(self, prompts: list[list[int]], new_tokens: int, sampled: bool) -> list[list[int]]:
        done = generate(self.decoder, prompts, new_tokens, SAMPLED if sampled else Sampling(), ())
        return [generation.ids for generation in done]


class Transformers(Measured):
    """transformers' `generate` with weights in `dtype`."""

    def __init__(self, model: WeakWater, device: torch.device, dtype: str):
        self.model = to_transformers(model).to(device, runtime.DTYPES[dtype]).eval()
        self.device = device

    def __call__(self, prompts: list[list[int]], new_tokens: int, sampled: bool) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.device)
        how = dict(temperature=0.7, top_p=0.9, top_k=0) if sampled else {}
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=sampled, pad_token_id=0,
                                      eos_token_id=None, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **how)
        return out[:, ids.shape[1]:].tolist()


class LlamaCpp(Measured):
    """llama.cpp's server in this process. Its cache is float16, the default, or float32 if `exact`."""

    def __init__(self, path: Path, context: int, exact: bool, slots: int):
        self.server = llama_cpp.open_server(path, context, torch.get_num_threads(), exact, slots)
        self.pool = ThreadPoolExecutor(slots)

    def __call__(self, prompts: list[list[int]], new_tokens: int, sampled: bool) -> list[list[int]]:
        return [*self.pool.map(lambda prompt: self.complete(prompt, new_tokens, sampled), prompts)]

    def complete(self, prompt: list[int], new_tokens: int, sampled: bool) -> list[int]:
        """The new tokens of one prompt."""
        how = dict(temperature=0.7, top_p=0.9, top_k=0, min_p=0.0) if sampled else dict(temperature=0.0)
        reply = self.server.handle_completions(dict(
            prompt=prompt, max_tokens=new_tokens, ignore_eos=True, cache_prompt=False, repeat_penalty=1.0, **how))
        ids = [int(token) for token in re.findall(r"<(\d+)>", reply["choices"][0]["text"])]
        if len(ids) != new_tokens:
            raise RuntimeError(f"{len(ids)} new tokens instead of {new_tokens}")
        return ids


# ---------------------------------------------------------------------------------------------
# measuring


def make_model(config: LLMConfig, device: torch.device) -> WeakWater:
    """A model whose greedy replies do not repeat themselves and never contain `</s>`."""
    model = WeakWater(config)
    for parameter in model.model.layers.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=INIT_SCALE / math.sqrt(parameter.shape[1]))
    with torch.no_grad():
        model.lm_head.weight[END_ID] = 0  # llama.cpp bans `</s>` with ignore_eos, so no decoder may choose it
    return model.to(device).eval()


def make_decoder(name: str, config: LLMConfig, device: torch.device, dtype: str, context: int, threads: int, slots: int,
                 exact: bool = False, plain: bool = False):
    """Build a decoder in its worker process. The fixed seed gives all decoders the same weights."""
    if name.startswith("ours"):
        runtime.prepare(device, 0, False)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = make_model(config, device)
    if not name.startswith("llama.cpp"):
        if name == "transformers":
            return Transformers(model, device, dtype)
        return Ours(model, device, dtype, plain, int8=name == "ours int8")
    kind = name.removeprefix("llama.cpp ")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kind}.gguf"
        gguf.write(path, model, kind.lower())
        return LlamaCpp(path, context, exact, slots)


def bytes_per_token(model: WeakWater, n_bytes: float, positions: float) -> float:
    """Bytes that one decoded token reads: every weight matrix once, with the output matrix, and the keys and values of
    the earlier positions (two bytes each if a weight has at most two bytes, else four)."""
    config, parts = model.config, model.num_parameters()
    weights = parts["attention"] + parts["mlp"] + config.vocab_size * config.dim
    cached = 2 * config.n_layers * config.n_kv_heads * config.head_dim * positions
    return weights * n_bytes + cached * max(2, n_bytes)


def why_no_llama_cpp(device: torch.device) -> str | None:
    """The reason why llama.cpp cannot be measured here, or None."""
    if device.type != "cpu":
        return "its prebuilt wheels are for the CPU"
    missing = [name for name in ("gguf", "xllamacpp") if importlib.util.find_spec(name) is None]
    return f"no {' and '.join(missing)} (pip install -r requirements-extra.txt)" if missing else None


def check_equal(decoders: dict, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The greedy float32 reply to each prompt. Raises RuntimeError if the decoders' replies differ early, or if they
    have so few different tokens that equality proves nothing."""
    calls = [prompts[:1], prompts]  # llama.cpp's parallel slots round in other ways
    replies = [decoders["ours"](call, new_tokens, False) for call in calls]
    if len(set(replies[0][0])) < new_tokens / 2:
        raise RuntimeError(f"the reply has only {len(set(replies[0][0]))} different tokens: too few to compare")
    for name, decoder in decoders.items():
        if name.startswith("ours"):  # int8 rounds
            continue
        compared = equal = 0
        for call, ours in list(zip(calls, replies, strict=True))[:1 if name.startswith("llama.cpp") else 2]:
            try:
                theirs = decoder(call, new_tokens, False)
            except WorkerFailed as failure:
                print(f"{name} in float32 {failure}", flush=True)
                break
            for mine, other in zip(ours, theirs, strict=True):
                n_equal = next((i for i, pair in enumerate(zip(mine, other, strict=True)) if len(set(pair)) > 1),
                               new_tokens)
                if n_equal < min(MIN_EQUAL, new_tokens):
                    raise RuntimeError(f"{name}, {len(call)} prompts in float32: token {n_equal + 1} is not ours")
                compared, equal = compared + new_tokens, equal + n_equal
        if compared:
            print(f"greedy tokens in float32, ours and {name}: {equal:,} of {compared:,} are equal", flush=True)
    return replies[1]


def check_found(decoders: dict, prompts: list[list[int]], replies: list[list[int]]) -> dict[str, float]:
    """The share of float32 tokens that each half-precision decoder reproduces.

    Each decoder generates two tokens after prefixes of the float32 replies: of the first reply alone, and of all
    replies in one batch, cut at the same position. Raises RuntimeError if our share is more than 0.2 below that of
    another decoder in the same precision.
    """
    places = sorted({len(replies[0]) * i // PREFIXES // 2 * 2 for i in range(PREFIXES)})
    shares = {}
    for name, decoder in decoders.items():
        for rows, starts in ((1, places), (len(prompts), places[::4])):
            right = []
            try:
                for start in starts:
                    found = decoder([p + r[:start] for p, r in zip(prompts[:rows], replies, strict=False)], 2, False)
                    for two, reply in zip(found, replies, strict=False):
                        right += [two[0] == reply[start], two == reply[start:start + 2]]
            except WorkerFailed as failure:
                if name == "ours":
                    raise
                print(f"{name} {failure}", flush=True)
                break
            shares[f"{name}, {rows} at once"] = sum(right) / len(right)
    print("of float32's tokens found: " + "; ".join(f"{name} {share:.0%}" for name, share in shares.items()),
          flush=True)
    for rows in (1, len(prompts)):
        best = max(share for name, share in shares.items()
                   if name.endswith(f", {rows} at once") and "Q8_0" not in name and "int8" not in name)
        if (share := shares[f"ours, {rows} at once"]) < best - 0.2:
            raise RuntimeError(f"ours, {rows} at once, finds {share:.0%} of float32's tokens, another {best:.0%}")
    return shares


def time_case(decoders: dict[str, Worker], prompts: list[list[int]], new_tokens: int, sampled: bool, repeats: int,
              block: torch.Tensor) -> tuple[dict, dict, dict, float]:
    """(seconds to the first token, to 32 tokens, of whole replies, memory bandwidth), the first three by decoder.

    Decoders that failed are absent. The bandwidth, in bytes per second, is measured by reading `block` in the same
    turns.
    """
    def timed(names: Iterable[str], n: int) -> dict[str, Callable[[], float]]:
        return {name: partial(decoders[name].time, "__call__", prompts, n, sampled) for name in names}

    first = take_turns(timed(decoders, 1), repeats)
    some = take_turns(timed(first, min(32, new_tokens)), repeats)
    whole = take_turns(timed(some, new_tokens) | {"memory": block.sum}, repeats)
    return first, some, whole, block.nbytes / statistics.median(whole.pop("memory"))


def compare(args, config: LLMConfig, device: torch.device, own: str, result: dict) -> None:
    """Check and time all decoders in float32 and in the best precision. Fills `result` and prints the tables."""
    rng, context, most = np.random.default_rng(0), args.prompt_tokens + args.new_tokens + 8, max(args.batch)
    prompts = rng.integers(0, config.vocab_size, (most, args.prompt_tokens)).tolist()
    block = torch.ones(2**27, device=device)  # 512 MiB, larger than any cache
    with torch.device("meta"):
        model = WeakWater(config)  # only its sizes are needed
    if trouble := why_no_llama_cpp(device):
        print(f"llama.cpp is skipped: {trouble}", flush=True)
    head = ["", "", "first token, ms", "32 tokens, ms", "tokens/s", "range", "of the limit", "peak MiB"]
    widths = [len(f"fp32, {most} rows, sampled"), len("llama.cpp BF16"), 16, 13, 8, 16, 12, 8]
    for dtype in dict.fromkeys(("fp32", own)):
        timed = not args.quick or dtype == own
        kinds = [] if trouble or not timed else ["F32"] if dtype == "fp32" else ["BF16", "F16", "Q8_0"]
        int8 = ["ours int8"] if dtype == own and timed and device.type == "cpu" and not args.plain else []
        decoders = {name: Worker(make_decoder, name, config, device, dtype, context, args.threads, most, False,
                                 args.plain)
                    for name in ["ours", *int8, "transformers", *(f"llama.cpp {kind}" for kind in kinds)]}
        exact = {name: Worker(make_decoder, name, config, device, dtype, context, args.threads, 1, True)
                 for name in ("llama.cpp F32",) if dtype == "fp32" and not trouble}
        try:
            if dtype == "fp32":
                replies = check_equal(decoders | exact, prompts, args.new_tokens)
                close_all(exact)
            else:
                result["found_of_float32"] = check_found(decoders, prompts, replies)
            if timed:
                print(flush=True)
                print_head(head, widths)
            for batch, sampled in itertools.product((1, *args.batch), (False, True)):
                if not timed or (args.quick and sampled):
                    continue
                case = f"{dtype}, {batch} row{'s' * (batch > 1)}, {'sampled' if sampled else 'greedy'}"
                first, some, whole, bandwidth = time_case(decoders, prompts[:batch], args.new_tokens, sampled,
                                                          args.repeats, block)
                for name, decoder in decoders.items():
                    if name not in whole:
                        result["cases"][f"{case}, {name}"] = {"failed": decoder.failure}
                        print_row([case, name, decoder.failure, *[""] * 5], widths)
                        continue
                    n_bytes = 34 / 32 if name.endswith("Q8_0") else 1 if name == "ours int8" else (
                        runtime.DTYPES[dtype].itemsize)
                    limit = batch * bandwidth / bytes_per_token(
                        model, n_bytes, batch * (args.prompt_tokens + args.new_tokens / 2))
                    rates = [batch * args.new_tokens / seconds for seconds in whole[name]]
                    result["cases"][f"{case}, {name}"] = dict(
                        tokens_per_second=rates, limit=limit, bytes_per_second=bandwidth, first_token=first[name],
                        some_tokens=some[name], peak_mebibytes=decoder.call("memory"))
                    print_row([case, name, f"{1000 * statistics.median(first[name]):.1f}",
                               f"{1000 * statistics.median(some[name]):.1f}", f"{statistics.median(rates):,.0f}",
                               f"{min(rates):,.0f} to {max(rates):,.0f}", f"{statistics.median(rates) / limit:.0%}",
                               f"{decoder.call('memory'):,.0f}"], widths)
                if batch == 1 and not sampled:
                    add_ratios(result["ratios"], whole, dtype, own)
                    alone = whole
                elif not sampled and dtype == own:
                    add_ratios_of_rows(result["ratios"], alone, whole, batch)
        finally:
            result["failures"] |= {f"{name}, {dtype}": why for name, why in failures(decoders | exact).items()}
            close_all(decoders | exact)
        if timed:
            print(f"memory bandwidth, reading: {bandwidth / 1e9:.1f} GB/s", flush=True)


def add_ratios(ratios: dict, whole: dict[str, list[float]], dtype: str, own: str) -> None:
    """Add the ratio of ours to each other decoder, for one prompt and greedy decoding. Keys without a precision are for
    the best precision of the machine."""
    if "ours" not in whole:
        return
    for name in whole:
        kind = name.removeprefix("llama.cpp ").lower()
        if name == "transformers":
            ratios[f"batch1_vs_transformers_{dtype}"] = ratio(whole[name], whole["ours"])
            if dtype == own:
                ratios["batch1_vs_transformers"] = ratios[f"batch1_vs_transformers_{dtype}"]
        elif name == "ours int8":
            ratios["int8_vs_bf16" if own == "bf16" else f"int8_vs_{own}"] = ratio(whole["ours"], whole[name])
            if "llama.cpp Q8_0" in whole:
                ratios["int8_vs_llama_cpp_q8_0"] = ratio(whole["llama.cpp Q8_0"], whole[name])
        elif name != "ours":
            ratios[f"batch1_vs_llama_cpp_{kind}"] = ratio(whole[name], whole["ours"])
            if kind == {"bf16": "bf16", "fp32": "f32"}.get(own):
                ratios["batch1_vs_llama_cpp"] = ratios[f"batch1_vs_llama_cpp_{kind}"]


def add_ratios_of_rows(ratios: dict, alone: dict[str, list[float]], whole: dict[str, list[float]], rows: int) -> None:
    """Add what `rows` prompts at once gain: the ratio of each decoder's tokens/s to its own with one prompt, and ours
    to the others'; greedy, in the best precision of the machine."""
    for name in whole:
        short = name.replace(".", "_").replace(" ", "_").lower()
        if name in alone:
            times = [seconds / rows for seconds in whole[name]]
            ratios[f"batch{rows}_vs_batch1_{short}"] = ratio(alone[name], times)
        if name != "ours" and "ours" in whole:
            ratios[f"batch{rows}_vs_{short}"] = ratio(whole[name], whole["ours"])


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--prompt_tokens", type=number(int, 1), default=128, help="length (default: %(default)s)")
    parser.add_argument("--new_tokens", type=number(int, 2), default=256, help="length (default: %(default)s)")
    parser.add_argument("--batch", type=number(int, 2), nargs="+", default=[8, 16], metavar="N",
                        help="prompts per batch (default: 8 16)")
    parser.add_argument("--threads", type=number(int, 1), default=torch.get_num_threads(),
                        help="of each decoder (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help="ours computes as in model.py, without fastpath/")
    parser.add_argument("--quick", action="store_true", help="time only greedy decoding in the best precision")
    args = parser.parse_args()
    warn_of_load()
    device, _ = runtime.pick_device(args.device)
    own = runtime.pick_dtype("auto", device)[0]
    config = LLMConfig.preset(args.preset).for_run(args.prompt_tokens + args.new_tokens, 0.0)
    result = {"ratios": {}, "machine": runtime.describe_machine(device), "preset": args.preset, "found_of_float32": {},
              "failures": {}, "cases": {}}
    print(f"{result['machine']}; {args.preset}; {args.prompt_tokens} tokens continued by {args.new_tokens}, "
          f"{args.threads} threads, {args.repeats} turns", flush=True)
    return end(result, partial(compare, args, config, device, own))


if __name__ == "__main__":
    sys.exit(exits.run(main))
