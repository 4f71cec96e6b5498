"""One check of what a GPU computes, for tests/gpu/test_on_gpu.py, which runs each in a process of its own: after an
illegal memory access a process cannot use the GPU any more.

    python tests/gpu/checks.py FOLDER NAME [ARGUMENT ...]      FOLDER holds what `make_data` made

Prints one JSON line with everything that was measured; exit code 1 if an assertion fails.
WEAKWATER_GPU_TEST_DEVICE=cpu tries the checks on a CPU, with smaller models.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from Config import LLMConfig  # noqa: E402
from dataset import MicroBatch  # noqa: E402
from fastpath import accelerate  # noqa: E402
from model import WeakWater  # noqa: E402

DEVICE = torch.device(os.environ.get("WEAKWATER_GPU_TEST_DEVICE", "cuda"))
ON_CPU = DEVICE.type == "cpu"
VOCAB = 997  # of the random tokens; on a CPU also of the model

# Relative errors of all gradients together, against float32 on the CPU. float32: the same sums in another order (TF32,
# with 10 bits, would give 1e-3). On a CPU the 30m presets, with all layers, give 0.010 and 0.011 in bf16 and 0.0012 and
# 0.0014 in fp16; a GPU may round at other places, hence twice that and more. A wrong mask or scale gives 0.1 and more.
GRADIENT_TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 4e-3}


def make_model(preset: str, **changes) -> WeakWater:
    """A model from a seed, on the CPU."""
    torch.manual_seed(0)
    smaller = dict(vocab_size=VOCAB, n_layers=2) if ON_CPU else {}
    return WeakWater(LLMConfig.preset(preset, **smaller | changes))


def make_batch(rng: np.random.Generator, n_tokens: int, longest: int) -> MicroBatch:
    """A packed buffer of random documents; two thirds of the positions have a target, each with its own weight."""
    lengths = []
    while sum(lengths) < n_tokens:
        lengths.append(int(min(rng.integers(1, longest + 1), n_tokens - sum(lengths))))
    tokens = rng.integers(0, VOCAB, n_tokens)
    inside = np.setdiff1d(np.arange(n_tokens), np.cumsum(lengths) - 1)  # the last token of a document predicts nothing
    index = inside[rng.random(len(inside)) < 2 / 3]
    return MicroBatch(tokens, lengths, index, tokens[index + 1], rng.random(len(index)).astype(np.float32))


def loss_and_gradient(model, inputs: dict, dtype: str) -> tuple[float, torch.Tensor]:
    """The loss, and all gradients as one float64 vector on the CPU."""
    from common.runtime import autocast

    model.zero_grad()
    with autocast(inputs["tokens"].device, dtype):
        loss = model(**inputs)
    loss.backward()
    return loss.item(), gradient_of(model)


def gradient_of(model) -> torch.Tensor:
    """All gradients as one float64 vector on the CPU."""
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])


def error(a, b) -> float:
    """Relative error of a against b, in the Euclidean norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def profiled(function) -> list:
    """The profiler's events (name and count) of a call: operations and, on CUDA, kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not ON_CPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        if not ON_CPU:
            torch.cuda.synchronize()
    return profiler.key_averages()


def count(events: list, part: str) -> int:
    """How often an event was seen whose name contains `part`."""
    return sum(event.count for event in events if part in event.key)


# ---------------------------------------------------------------------------------------------
# the network


def losses(measured: dict, folder: Path, preset: str) -> None:
    """Loss and gradients in each precision are the CPU's in float32."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    model = make_model(preset).train()
    batch = make_batch(np.random.default_rng(1), 700 if ON_CPU else 2048, 512)
    exact_loss, exact = loss_and_gradient(model, batch.to("cpu"), "fp32")
    model.to(DEVICE)
    for dtype in GRADIENT_TOLERANCE:
        accelerate(model, DEVICE, dtype)
        loss, gradient = loss_and_gradient(model, batch.to(DEVICE), dtype)
        measured[dtype] = {"loss_error": abs(loss / exact_loss - 1), "gradient_error": error(gradient, exact)}
    for dtype, tolerance in GRADIENT_TOLERANCE.items():
        # the loss is a mean of hundreds of rounded numbers: its error is far smaller than a gradient's
        assert measured[dtype]["loss_error"] < tolerance / 10 + 1e-6, f"loss in {dtype}"
        assert measured[dtype]["gradient_error"] < tolerance, f"gradient in {dtype}"


def varlen(measured: dict, folder: Path, preset: str) -> None:
    """In bf16 and fp16 every layer's attention is one variable-length kernel, forward and backward."""
    model = make_model(preset).to(DEVICE).train()
    inputs = make_batch(np.random.default_rng(2), 700, 300).to(DEVICE)
    n_layers = model.config.n_layers
    for dtype in ("bf16", "fp16"):
        accelerate(model, DEVICE, dtype)
        loss_and_gradient(model, inputs, dtype)
        events = profiled(lambda dtype=dtype: loss_and_gradient(model, inputs, dtype))
        backward = count(events, "_varlen_attn_backward")
        measured[dtype] = {
            "layers": n_layers, "forward": count(events, "::_varlen_attn") - backward, "backward": backward,
            "other_attention": count(events, "scaled_dot_product"),
            "kernels": sorted({e.key[:80] for e in events if e.key.startswith("void ") and "flash" in e.key.lower()})}
    for dtype in ("bf16", "fp16"):
        got = measured[dtype]
        assert min(got["forward"], got["backward"]) >= n_layers and not got["other_attention"], dtype


def packing(measured: dict, folder: Path, preset: str) -> None:
    """The gradient of a packed buffer in bf16 is as near to float32 as that of its documents one by one in bf16."""
    from common.runtime import autocast

    model = make_model(preset).to(DEVICE).train()
    batch = make_batch(np.random.default_rng(3), 700, 300)
    exact = loss_and_gradient(model, batch.to(DEVICE), "fp32")[1]
    accelerate(model, DEVICE, "bf16")
    packed = loss_and_gradient(model, batch.to(DEVICE), "bf16")[1]
    model.zero_grad()
    begin = 0
    for length in batch.lengths:
        inside = (batch.target_index >= begin) & (batch.target_index < begin + length)
        if inside.any():
            one = MicroBatch(batch.tokens[begin:begin + length], [length], batch.target_index[inside] - begin,
                             batch.targets[inside], batch.weights[inside]).to(DEVICE)
            with autocast(DEVICE, "bf16"):
                loss = model(**one | {"lengths": None, "boundaries": None})
            loss.backward()
        begin += length
    measured |= {"documents": len(batch.lengths), "packed_error": error(packed, exact),
                 "one_by_one_error": error(gradient_of(model), exact)}
    assert measured["packed_error"] < 1.5 * measured["one_by_one_error"] + 1e-3


def transformers_logits(measured: dict, folder: Path, preset: str) -> None:
    """Logits in float32 are those of transformers' model with the same weights."""
    from formats.hf import to_transformers

    torch.set_float32_matmul_precision("highest")
    ours = make_model(preset)
    theirs = to_transformers(ours).to(DEVICE)
    tokens = torch.from_numpy(np.random.default_rng(4).integers(0, VOCAB, (2, 200))).to(DEVICE)
    with torch.no_grad():
        measured["logits_error"] = error(ours.to(DEVICE)(tokens), theirs(tokens).logits)
    assert measured["logits_error"] < 1e-5


def decoding(measured: dict, folder: Path, preset: str) -> None:
    """Cached logits of prompts of unequal length in a batch are the full forward's, and `generate` chooses by them."""
    from common.generation import Decoder, Sampling, decode_one_token, generate, prefill
    from common.runtime import autocast

    torch.set_float32_matmul_precision("highest")
    model = make_model(preset).to(DEVICE).eval()
    for weight in model.model.layers.parameters():
        if weight.ndim == 2:  # so large that logits differ from token to token
            torch.nn.init.normal_(weight, std=1.6 / weight.shape[1]**0.5)
    rng, new = np.random.default_rng(5), 24
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (5, 40, 17, 40)]
    answers = [rng.integers(0, VOCAB, new).tolist() for _ in prompts]

    @torch.no_grad()
    def full_forward(replies: list[list[int]], dtype: str) -> torch.Tensor:
        """Logits (B, new, V) from which the tokens of each reply are chosen, each row alone and without a cache."""
        with autocast(DEVICE, dtype):
            rows = [model(torch.tensor([p + r], device=DEVICE))[0, len(p) - 1:-1].float()
                    for p, r in zip(prompts, replies, strict=True)]
        return torch.stack(rows)

    def cached(decoder: Decoder) -> torch.Tensor:
        """The same for `answers`, all rows at once, from the cache."""
        cache = decoder.new_cache(len(prompts), max(map(len, prompts)) + new)
        logits = [prefill(decoder, prompts, cache)]
        for step in range(new - 1):
            tokens = torch.tensor([answer[step] for answer in answers], device=DEVICE)
            logits.append(decode_one_token(decoder, tokens, cache))
        return torch.stack(logits, 1).float()

    exact = full_forward(answers, "fp32")
    for dtype in ("fp32", "bf16"):
        decoder = Decoder(model, dtype)
        replies = [g.ids for g in generate(decoder, prompts, new, Sampling(), ())]
        every_token = [g.ids for g in generate(decoder, prompts, new, Sampling(), (), sync_every=1)]
        one_by_one = [generate(decoder, [prompt], new, Sampling(), ())[0].ids for prompt in prompts]
        gaps = {}  # by how much another token's logit is larger than that of the token chosen, in standard deviations
        for name, ids in (("batch", replies), ("one_by_one", one_by_one)):
            logits = full_forward(ids, "fp32")
            chosen = logits.gather(2, torch.tensor(ids, device=DEVICE)[..., None])[..., 0]
            gaps[name] = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
        stop = replies[0][3]
        ended = generate(decoder, prompts, new, Sampling(), (stop,))[0]
        sampled = [[g.ids for g in generate(decoder, prompts, new, Sampling(0.7, 0.9, 50, 1.1), (),
                                            generator=torch.Generator(DEVICE).manual_seed(1))] for _ in range(2)]
        measured[dtype] = {
            "cached_error": error(cached(decoder), exact), "full_error": error(full_forward(answers, dtype), exact),
            "greedy_gap": gaps, "same_as_one_by_one": sum(a == b for a, b in zip(replies, one_by_one, strict=True)),
            "sync_every_same": replies == every_token, "sampling_repeats": sampled[0] == sampled[1],
            "stopped": [ended.reason, ended.ids == replies[0][:replies[0].index(stop)]],
            "different_tokens": len({token for ids in replies for token in ids})}
    for dtype, largest_gap in (("fp32", 1e-3), ("bf16", 0.3)):
        got = measured[dtype]
        assert got["cached_error"] < 1.5 * got["full_error"] + (1e-5 if dtype == "fp32" else 1e-3), dtype
        assert max(got["greedy_gap"].values()) < largest_gap, dtype
        assert got["sync_every_same"] and got["sampling_repeats"] and got["stopped"] == ["eos", True], dtype


def compiled(measured: dict, folder: Path, preset: str) -> None:
    """Compiled blocks compute what eager ones do in buffers of changing sizes, from few graphs, and stay compiled."""
    from torch._dynamo.utils import counters

    from common import runtime

    n_layers, rng = 2 if ON_CPU else 4, np.random.default_rng(6)
    eager = make_model(preset, n_layers=n_layers).to(DEVICE).train()
    model = copy.deepcopy(eager)
    measured["log"] = runtime.compile_blocks(model, DEVICE)
    assert not measured["log"].startswith("off"), "torch.compile does not work"
    counters.clear()
    sizes = (60, 160) if ON_CPU else (300, 2048)
    batches = [make_batch(rng, int(rng.integers(*sizes)), int(longest))
               for longest in rng.integers(20, sizes[1] // 4, 3 if ON_CPU else 19)]
    batches.insert(1, make_batch(rng, 100, 10**9))  # one document

    def training() -> list[dict]:
        rows = []
        for batch in batches:
            inputs = batch.to(DEVICE)
            exact_loss, exact = loss_and_gradient(eager, inputs, "fp32")
            eager_gradient = loss_and_gradient(eager, inputs, "bf16")[1]
            loss, gradient = loss_and_gradient(model, inputs, "bf16")
            rows.append({"tokens": len(batch.tokens), "documents": len(batch.lengths),
                         "loss_error": abs(loss / exact_loss - 1), "compiled_error": error(gradient, exact),
                         "eager_error": error(eager_gradient, exact)})
        return rows

    @torch.no_grad()
    def validation() -> list[float]:
        eager.eval(), model.eval()
        errors = []
        for batch in batches:
            with runtime.autocast(DEVICE, "bf16"):
                errors.append(float(model(**batch.to(DEVICE)) / eager(**batch.to(DEVICE)) - 1))
        eager.train(), model.train()
        return errors

    def graphs() -> int:
        return counters["stats"]["unique_graphs"]

    rows = training()
    measured |= {"buffers": len(rows), "documents": [row["documents"] for row in rows],
                 "compiled_error": max(row["compiled_error"] for row in rows),
                 "eager_error": max(row["eager_error"] for row in rows),
                 "loss_error": max(row["loss_error"] for row in rows), "graphs_training": graphs()}
    measured |= {"validation_error": max(map(abs, validation())), "graphs_with_validation": graphs()}
    training()
    events = profiled(lambda: loss_and_gradient(model, batches[-1].to(DEVICE), "bf16"))
    backward = count(events, "_varlen_attn_backward")
    measured |= {"graphs_at_the_end": graphs(), "breaks": dict(counters["graph_break"]), "layers": n_layers,
                 "compiled_calls": count(events, "Torch-Compiled Region"),
                 "varlen": [count(events, "::_varlen_attn") - backward, backward]}  # forward, backward
    for row in rows:
        assert row["compiled_error"] < 1.25 * row["eager_error"] + 1e-3, row
        assert row["loss_error"] < 2e-3, row
    assert measured["validation_error"] < 2e-3
    assert measured["compiled_calls"] >= n_layers, "some blocks ran eagerly"
    if not ON_CPU:  # there attention is computed document by document, outside the graph
        assert min(measured["varlen"]) >= n_layers
        assert measured["compiled_calls"] == n_layers and not measured["breaks"]
        assert measured["graphs_training"] <= 2
        assert measured["graphs_at_the_end"] == measured["graphs_with_validation"] <= 4


# ---------------------------------------------------------------------------------------------
# the stage scripts


def run_script(script: str, *flags) -> None:
    """Run one of the project's scripts. Raises RuntimeError with the end of its stderr where it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"MPLBACKEND": "Agg"})
    if done.returncode:
        raise RuntimeError(f"{script} ended with exit code {done.returncode}: {done.stderr[-1500:]}")


def stage_flags(folder: Path, stage: str, out: Path, device=DEVICE, steps: int = 12) -> list:
    """The flags of a short run."""
    data = folder / "data" / ("pretrain.jsonl" if stage == "pretrain" else "r1_1024.jsonl")
    return ["--data_path", data, "--tokenizer_path", folder / "tokenizer", "--cache_dir", folder / "cache", "--out_dir",
            out, "--device", device.type, "--max_seq_len", 256, "--batch_size", 4, "--accumulation_steps", 2,
            "--epochs", 50, "--max_steps", steps, "--save_interval", 6, "--keep_checkpoints", 9, "--log_interval", 1,
            "--eval_interval", 0, "--eval_tokens", 2000]


def preset() -> str:
    """The model of the resume checks: on a GPU one whose heads are 64 wide, as those of the 30m presets are."""
    return "nano" if ON_CPU else "weakwater-5m"


def make_data(measured: dict, folder: Path) -> None:
    """A small corpus, its tokenizer, and weights for distillation to start from; the token cache is made on the way."""
    run_script("make_demo_data.py", "--out_dir", folder / "data", "--share", 0.1)
    run_script("train_tokenizer.py", "--data_path", folder / "data", "--tokenizer_path", folder / "tokenizer",
               "--vocab_size", 1024)
    run_script("pretrain.py", *stage_flags(folder, "pretrain", folder / "start", torch.device("cpu"), steps=1),
               "--preset", preset(), "--dtype", "fp32")


def same(a, b) -> bool:
    """Whether two states are equal, all bits of all tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def rows_of(out: Path, stage: str) -> list[tuple]:
    """(step, loss, gradient norm) of each step."""
    rows = map(json.loads, (out / "log" / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def resume(measured: dict, folder: Path, stage: str, dtype: str, *extra: str) -> None:
    """With --deterministic, a run resumed at step 6 ends with the losses, weights and optimizers of one run of 12."""
    whole = folder / "_".join(["resume", stage, dtype, *extra]).replace("--", "")
    again = whole.with_name(whole.name + "_again")
    start = ["--preset", preset()] if stage == "pretrain" else ["--init_from", folder / "start" / "pretrain.pth"]
    flags = [*start, "--dtype", dtype, "--dropout", 0.1, "--deterministic", *extra]
    run_script(f"{stage}.py", *stage_flags(folder, stage, whole), *flags)
    shutil.copytree(whole, again)
    last = Path("checkpoints", stage, "step_00000012.pth")
    (again / last).unlink()
    run_script(f"{stage}.py", *stage_flags(folder, stage, again), *flags, "--resume")
    states = [torch.load(out / last, map_location="cpu", weights_only=True) for out in (whole, again)]
    rows = [rows_of(out, stage) for out in (whole, again)]
    measured |= {key: same(states[0][key], states[1][key]) for key in ("model", "optimizers", "scaler")}
    measured |= {"losses": rows[0] == rows[1], "steps": len(rows[1]), "first_and_last_loss": [rows[0][0][1],
                                                                                               rows[0][-1][1]]}
    assert measured["steps"] == 12 and rows[0][0][1] > rows[0][-1][1], "the run did not train"
    assert all(measured[key] for key in ("model", "optimizers", "scaler", "losses"))


def follows_cpu(measured: dict, folder: Path) -> None:
    """Twenty steps in float32 give the losses that the CPU gives."""
    rows = []
    for name, device in (("cpu", torch.device("cpu")), ("device", DEVICE)):
        out = folder / f"follows_{name}"
        run_script("pretrain.py", *stage_flags(folder, "pretrain", out, device, steps=20), "--preset", "nano",
                   "--dtype", "fp32", "--dropout", 0)
        rows.append(rows_of(out, "pretrain"))
    errors = [abs(b[1] / a[1] - 1) for a, b in zip(*rows, strict=True)]
    measured |= {"steps": len(errors), "loss": [rows[0][0][1], rows[0][-1][1]], "first_error": errors[0],
                 "largest_error": max(errors)}
    assert len(errors) == 20 and errors[0] < 1e-5 and max(errors) < 1e-3


def out_of_memory(measured: dict, folder: Path) -> None:
    """Out of memory is exit code 2 and one line that suggests a --batch_size."""
    limit = ("import resource; size = int(open('/proc/self/statm').read().split()[0]) * 4096 + 2**29;"
             "resource.setrlimit(resource.RLIMIT_AS, (size, size))" if ON_CPU else
             "torch.cuda.set_per_process_memory_fraction(0.01)")  # 0.8 GB of an H100: less work until it is full
    code = f"import sys, torch, pretrain; from common import exits; {limit}; sys.exit(exits.run(pretrain.main))"
    flags = [*stage_flags(folder, "pretrain", folder / "out_of_memory"), "--preset", "weakwater-5m", "--batch_size",
             100_000, "--dtype", "fp32"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    measured |= {"exit": done.returncode, "errors": errors, "stderr": done.stderr[-400:]}
    assert done.returncode == 2 and len(errors) == 1
    assert "memory" in errors[0] and "--batch_size" in errors[0]
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------


def main() -> None:
    folder, name, *arguments = sys.argv[1:]
    begin, measured, failure = time.perf_counter(), {}, {}
    try:
        globals()[name](measured, Path(folder), *arguments)
    except Exception as problem:  # what was measured before is printed all the same
        where = traceback.extract_tb(problem.__traceback__)[-1]
        failure = {"error": f"{type(problem).__name__}: {problem}"[-2000:], "at": f"{where.name}: {where.line}"}
        traceback.print_exc()
    print(json.dumps({"check": " ".join([name, *arguments]), "ok": not failure,
                      "seconds": round(time.perf_counter() - begin, 1)} | failure | measured), flush=True)
    sys.exit(bool(failure))


if __name__ == "__main__":
    main()
