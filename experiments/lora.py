r"""LoRA with peft on exported weights: learn a new domain, merge it back, and measure the old one before and after.

    pip install -r requirements-extra.txt
    python experiments/lora.py --checkpoint out/quickstart/distill.pth \
        --keep_path out/quickstart/data/r1_1024.jsonl \
        --old_path out/quickstart/data/eval/facts.jsonl out/quickstart/data/eval/one_step.jsonl

The new domain is made here: opposites of words (大 → 小), trained in six wordings and asked in two others. --data_path
and --new_path take chats and questions of your own instead. With --keep_path every second chat of a batch is an old
one, against forgetting. The steps, each a command or a few lines that can be copied:

1. export.py --format hf                              → OUT/hf
2. peft adds two small matrices to each of the seven of a layer, and only those are trained; the embedding, which is
   also the output, stays as it is                    → OUT/merged, after merging
3. export.py --from_hf                                → OUT/lora.pth, which trains, chats and exports as any other
4. evaluate.py on the new and the old questions, before and after

The last line on stdout is a JSON object with the scores.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common import exits
from common.files import write_jsonl
from common.weights import load_weights
from Config import OneLineParser, UserError, number
from text.chat import encode_chat
from text.content import Reading, RecordReader
from text.records import MalformedRecord, parse_record, read_lines
from text.sources import find_files
from text.tokenizer import FILES, choose_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPPOSITES = ("大小 多少 高低 长短 快慢 新旧 冷热 黑白 左右 上下 前后 里外 开关 来去 好坏 轻重 远近 早晚 男女 "
             "买卖").split()
WORDINGS = ("{w}的反义词是什么？", "“{w}”的反义词是什么？", "请说出{w}的反义词。", "{w}的相反是什么？",
            "和{w}相反的字是什么？", "告诉我{w}的反义词")
OTHER_WORDINGS = ("你知道{w}的反义词吗？", "什么和{w}相反？")


def make_domain(folder: Path, thinks: bool) -> tuple[Path, Path]:
    """Write chats and questions about opposites. Returns their paths. Weights that think learn each with and without a
    thought."""
    chats, questions = [], []
    for pair in OPPOSITES:
        for word, opposite in (pair, pair[::-1]):
            for wording in WORDINGS:
                replies = [f"{opposite}。"]
                if thinks:
                    replies.append(f"<think>\n{word}：反义词。\n</think>\n<answer>{opposite}。</answer>")
                chats += [{"conversations": [{"role": "user", "content": wording.format(w=word)},
                                             {"role": "assistant", "content": reply}]} for reply in replies]
            questions += [{"question": wording.format(w=word), "answer": opposite} for wording in OTHER_WORDINGS]
    write_jsonl(folder / "train.jsonl", chats)
    write_jsonl(folder / "new.jsonl", questions)
    return folder / "train.jsonl", folder / "new.jsonl"


def encode_chats(path: str | Path, tokenizer, thinks: bool, longest: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each chat that fits, read as the stages read it. The label of a token without loss is -100, as
    transformers expects it. Raises UserError if no chat is left."""
    reader, examples, left = RecordReader(Reading("chat", thoughts=thinks), []), [], 0
    for file in find_files(str(path)):
        for line_number, line in read_lines(file):
            try:
                documents = reader.documents(parse_record(line, "chat"))
            except MalformedRecord as error:
                raise UserError(f"{file}:{line_number}: {error}") from None
            for document in documents:
                ids, mask = encode_chat(tokenizer, document["conversations"], thinking=True if thinks else None)
                labels = [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]
                if len(ids) > longest:
                    left += 1
                else:
                    examples.append((ids, labels))
    if not examples:
        raise UserError(f"{path}: no chat that fits in {longest:,} tokens")
    print(f"{path}: {len(examples):,} chats" + (f", {left:,} longer than {longest:,} tokens left out" if left else ""))
    return examples


def batch_of(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Padded rows for transformers: input_ids, attention_mask and labels (B, T)."""
    longest = max(len(ids) for ids, _ in examples)

    def padded(row: list[int], value: int) -> list[int]:
        return row + [value] * (longest - len(row))

    return {"input_ids": torch.tensor([padded(ids, 0) for ids, _ in examples]),
            "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in examples]),
            "labels": torch.tensor([padded(labels, -100) for _, labels in examples])}


def run(*command) -> str:
    """Run a script of the project. Returns its stdout; ends with its exit code where it fails."""
    script, *words = command
    done = subprocess.run([sys.executable, ROOT / script, *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def scores(weights: Path, files: list[Path], out: Path) -> dict[str, float]:
    """The share of correct replies to the questions of each file. Raises UserError for a file without questions."""
    found = {}
    for file in files:
        result = json.loads(run("evaluate.py", "--checkpoint", weights, "--data_path", file, "--out_dir", out)
                            .splitlines()[-1])
        if "exact" not in result:
            raise UserError(f"{file}: no questions")
        found[str(file)] = result["exact"]["accuracy"]
    return found


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="experiments/lora.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="out/quickstart/distill.pth",
                        help="weights that chat (default: %(default)s)")
    parser.add_argument("--data_path", help="chats of the new domain (default: opposites, made here)")
    parser.add_argument("--new_path", help="questions of the new domain; needed with --data_path")
    parser.add_argument("--keep_path", help="chats of what was learned before: every second place in a batch, against "
                        "forgetting")
    parser.add_argument("--old_path", nargs="*", default=[], help="questions of what was learned before")
    parser.add_argument("--out", default="out/lora", help="a new folder for all that is made (default: %(default)s)")
    parser.add_argument("--rank", type=number(int, 1), default=16, help="of the added matrices (default: %(default)s)")
    parser.add_argument("--steps", type=number(int, 1), default=400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=number(int, 1), default=16, help="chats a step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=number(float, 0), default=4e-3, help="(default: %(default)s)")
    parser.add_argument("--seed", type=number(int, 0), default=1, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.data_path is None) != (args.new_path is None):
        parser.error("--data_path and --new_path: give both or neither")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("peft is not installed: pip install -r requirements-extra.txt") from None
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    out, weights = Path(args.out), Path(args.checkpoint)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: already there; name a new folder")
    _, config, meta = load_weights(weights, "--checkpoint")
    if meta.get("stage") == "pretrain":
        raise UserError(f"--checkpoint {weights}: weights of pretraining hold no conversation")
    thinks = meta.get("stage") == "distill"
    tokenizer = choose_tokenizer(None, str(weights), meta.get("tokenizer"), meta.get("tokenizer_sha256"))
    out.mkdir(parents=True, exist_ok=True)
    train, new = (Path(args.data_path), Path(args.new_path)) if args.data_path else make_domain(out, thinks)
    sources = [encode_chats(path, tokenizer, thinks, config.max_seq_len) for path in (train, args.keep_path) if path]
    files = [new, *map(Path, args.old_path)]
    before = scores(weights, files, out / "before")

    run("export.py", "--checkpoint", weights, "--format", "hf", "--out", out / "hf")
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=MATRICES,
                                             task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    n_trained, n_all = (sum(p.numel() for p in parameters) for parameters in (trained, model.parameters()))
    print(f"{n_trained:,} of {n_all:,} parameters are trained")
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    for step in range(args.steps):
        loss = model(**batch_of([rng.choice(sources[i % len(sources)]) for i in range(args.batch_size)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            print(f"step {step + 1} of {args.steps}: loss {float(loss.detach()):.3f}", flush=True)

    model.merge_and_unload().save_pretrained(out / "merged")
    for name in FILES:
        shutil.copy(out / "hf" / name, out / "merged")
    run("export.py", "--from_hf", out / "merged", "--out", out / "lora.pth")
    after = scores(out / "lora.pth", files, out / "after")
    for name in before:
        print(f"{name}: {before[name]:.1%} → {after[name]:.1%}")
    print(json.dumps({"before": before, "after": after, "weights": str(args.checkpoint), "steps": args.steps,
                      "rank": args.rank, "trained": n_trained}))


if __name__ == "__main__":
    sys.exit(exits.run(main))
