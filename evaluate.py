"""Score the weights of any stage: loss, perplexity and bits per byte on a file, exact-match accuracy on questions.

a file       python evaluate.py --model_mode 0 --data_path data/pretrain_val.jsonl
questions    python evaluate.py --model_mode 2 --data_path data/math.jsonl --max_questions 500
any weights  python evaluate.py --checkpoint out/SFT_best.pth --data_path data/sft_val.jsonl --max_tokens 512

The keys of a record decide how it is scored. {"text"} and {"conversations"} get a loss. {"question", "answer"} are
answered greedily and compared exactly (see common/answers.py); if a question has "choices", a correct answer names the
correct choice and no other. "source" groups the questions in the result. --data_path takes the same values as in the
training stages and may be repeated; shares do not change the scores. The last line on stdout is one JSON object with
all results.
"""

import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path

from common import exits
from common.answers import is_well_formed, normalize, read_answer, read_choice, read_reply, same_answer, wilson
from common.files import write_jsonl
from common.generation import Generation, Sampling, generate
from common.scoring import score_documents, total_of
from common.weights import Loaded, model_parser, open_weights
from Config import FLAGS, UserError, number
from dataset import evaluated, load_documents
from text.chat import encode_chat
from text.content import Reading
from text.records import MalformedRecord, parse_object, read_lines
from text.sources import Source, find_sources, kind_of

SCORE_TOKENS = 16_384  # tokens per buffer when a loss is computed


# ---------------------------------------------------------------------------------------------
# files


def parse_question(line: bytes) -> dict:
    """Parse a line as {"question", "answer"} with optional "source" and "choices". Raises MalformedRecord."""
    record = parse_object(line)
    for key in ("question", "answer"):
        value = record.get(key)
        if key == "answer" and isinstance(value, (int, float)) and not isinstance(value, bool):
            record[key] = value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise MalformedRecord(f'no "{key}"')
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise MalformedRecord(f'"{key}" has a lone surrogate, which is not valid text')
    if read_answer(record["answer"]) == "":
        raise MalformedRecord('"answer" has only punctuation')
    if "choices" in record:
        check_choices(record["choices"], record["answer"])
    return record


def check_choices(choices, answer: str) -> None:
    """Raises MalformedRecord if `choices` is invalid, or if a reply that names one choice could also name another."""
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise MalformedRecord('"choices" is not a list of texts')
    if answer not in choices:
        raise MalformedRecord('"answer" is not one of its "choices"')
    plain = [normalize(choice) for choice in choices]
    if any(one in other for i, one in enumerate(plain) for j, other in enumerate(plain) if i != j):
        raise MalformedRecord('one of its "choices" is part of another')


def read_questions(files: list[Path], max_bad_ratio: float) -> tuple[list[dict], int]:
    """All questions in the files, each with its "file" and "line", and the number of malformed lines.

    Prints the number of answers that are compared as text, because a share of correct replies near 0 % is often a file
    whose answers are not read as numbers. Raises UserError when too many lines are malformed.
    """
    questions, malformed = [], []
    for file in files:
        for line_number, line in read_lines(file):
            try:
                questions.append(parse_question(line) | {"file": str(file), "line": line_number})
            except MalformedRecord as error:
                malformed.append(f"{file}:{line_number}: {error}")
    for example in malformed[:5]:
        print(f"malformed: {example}")
    n_lines = len(questions) + len(malformed)
    n_texts = sum("choices" not in question and isinstance(read_answer(question["answer"]), str)
                  for question in questions)
    print(f"questions: {n_lines:,} lines, {len(malformed):,} malformed; {n_texts:,} answers are no numbers and are "
          "compared as text")
    if not questions or len(malformed) > max_bad_ratio * n_lines:
        raise UserError(f"{len(malformed):,} of {n_lines:,} lines are malformed, more than --max_bad_ratio "
                        f"{max_bad_ratio} (the first: {malformed[0]})")
    return questions, len(malformed)


# ---------------------------------------------------------------------------------------------
# scores


def score_file(loaded: Loaded, file: Path, kind: str, args) -> dict:
    """The result of scoring.score for one file, with the counts of cut and skipped lines."""
    reading = Reading.of(args, kind, thoughts=loaded.stage == "distill")
    documents = load_documents(Source(str(file), None, [file]), loaded.tokenizer, reading,
                               str(Path(args.out_dir) / "cache"), args.max_seq_len, args.min_tokens, args.max_tokens,
                               args.max_bad_ratio, max_text_loss=args.max_text_loss)
    chosen, counts = evaluated(documents, args.eval_tokens), documents.counts[0]
    begin = time.perf_counter()
    scores = score_documents(loaded.model, documents, args.max_seq_len, max(SCORE_TOKENS, args.max_seq_len),
                             args.eval_tokens, loaded.device, loaded.dtype)
    rate = int(documents.length[:chosen].sum()) / (time.perf_counter() - begin)
    if not math.isfinite(scores["ppl"]):
        raise UserError(f"{loaded.path}: loss {scores['loss']} on {file}: the weights are damaged, or fp16 overflows "
                        "(--dtype fp32)")
    left_out = "".join(f", {n:,} {what}" for what, n in counts.items() if n and what != "lines")
    print(f"{file}: {kind}, {counts['lines']:,} lines{left_out}; {chosen:,} of {len(documents):,} documents "
          f"scored at {rate:,.0f} tokens/s, {scores['targets']:,} targets: loss {scores['loss']:.4f}, "
          f"PPL {scores['ppl']:.2f}, bits per byte {scores['bpb']:.4f}", flush=True)
    return {"file": str(file), "kind": kind, "documents": chosen, **scores, "counts": counts}


def answer_all(loaded: Loaded, questions: list[dict], args) -> list[Generation]:
    """A greedy reply to each question, in batches. A question that fills the context gets an empty reply with the
    reason "context"."""
    if loaded.continues_text and not args.as_chat:
        prompts = [[loaded.encoder.bos_id, *ids] for ids in loaded.encoder.encode([q["question"] for q in questions])]
    else:
        prompts = [encode_chat(loaded.tokenizer, [{"role": "user", "content": q["question"]}], True)[0]
                   for q in questions]
    replies = [Generation([], "context") for _ in questions]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < loaded.model.config.max_seq_len]
    fitting.sort(key=lambda i: -len(prompts[i]))  # similar lengths together, the largest batch first
    decoder, n_tokens = loaded.decoder, 0
    begin = time.perf_counter()
    for start in range(0, len(fitting), args.batch_size):
        chosen = fitting[start:start + args.batch_size]
        batch = generate(decoder, [prompts[i] for i in chosen], args.max_new_tokens, Sampling(),
                         {loaded.encoder.eos_id}, loaded.encoder.vocab_size)
        for i, reply in zip(chosen, batch, strict=True):
            replies[i] = reply
        n_tokens += sum(len(reply.ids) for reply in batch)
        print(f"answered {start + len(chosen):,} of {len(questions):,} questions, "
              f"{n_tokens / (time.perf_counter() - begin):,.0f} tokens/s", flush=True)
    return replies


def compare(loaded: Loaded, questions: list[dict], replies: list[Generation]) -> list[dict]:
    """One record per question: the unchanged reply, the answer read from it, and whether that is correct."""
    records = []
    for question, reply in zip(questions, replies, strict=True):
        text = loaded.tokenizer.decode(reply.ids)  # with special tokens: a reply that contains one is not well-formed
        if "choices" in question:
            expected, read = question["answer"], read_choice(text, question["choices"])
        else:
            expected = read_answer(question["answer"])
            read = read_reply(text, is_number=not isinstance(expected, str))
        asked = {key: question[key] for key in ("question", "answer", "source", "file", "line") if key in question}
        records.append(asked | {
            "reply": text, "read": None if read is None else str(read), "correct": same_answer(expected, read),
            "well_formed": is_well_formed(text) and reply.reason == "eos", "ended": reply.reason,
            "tokens": len(reply.ids)})
    return records


def summary(records: list[dict]) -> dict:
    """Accuracy with its 95 % interval, shares and means over the records that `compare` returns."""
    n, correct = len(records), sum(r["correct"] for r in records)
    result = {"questions": n, "correct": correct, "accuracy": correct / n, "interval95": wilson(correct, n),
              "well_formed": sum(r["well_formed"] for r in records) / n,
              "ended": sum(r["ended"] == "eos" for r in records) / n,
              "mean_tokens": sum(r["tokens"] for r in records) / n}
    asked = Counter(str(r["source"]) for r in records if "source" in r)
    right = Counter(str(r["source"]) for r in records if "source" in r and r["correct"])
    result["by_source"] = {source: {"questions": asked[source], "correct": right[source],
                                    "accuracy": right[source] / asked[source],
                                    "interval95": wilson(right[source], asked[source])} for source in sorted(asked)}
    return result


def exact_answers(loaded: Loaded, files: list[Path], questions: list[dict], args) -> dict:
    """Answer the questions, write the generations, print and return the summary."""
    path = generations_path(loaded, files, args)
    begin = time.perf_counter()
    records = compare(loaded, questions, answer_all(loaded, questions, args))
    seconds = time.perf_counter() - begin
    write_jsonl(path, records)
    exact = summary(records) | {"tokens_per_second": sum(r["tokens"] for r in records) / seconds,
                                "max_new_tokens": args.max_new_tokens, "seed": args.seed, "generations": str(path)}
    low, high = exact["interval95"]
    print(f"exact answers: {exact['correct']:,} of {exact['questions']:,}, {exact['accuracy']:.2%} "
          f"(95 % interval {low:.2%} to {high:.2%}); well-formed {exact['well_formed']:.1%}, ended by </s> "
          f"{exact['ended']:.1%}, {exact['mean_tokens']:.1f} tokens on average, "
          f"{exact['tokens_per_second']:,.0f} tokens/s")
    for source, part in exact["by_source"].items():
        print(f"  {source}: {part['correct']:,} of {part['questions']:,}, {part['accuracy']:.2%}")
    print(f"generations written to {path}")
    return exact


def generations_path(loaded: Loaded, files: list[Path], args) -> Path:
    """The path of the generations. The default contains the names of weights and data, so a repeated evaluation
    replaces its own file.

    Raises UserError if --generations names an existing file or the folder cannot be created.
    """
    if args.generations is not None and Path(args.generations).exists():
        raise UserError(f"--generations {args.generations} already exists: remove it or choose another name")
    data = files[0].name.split(".jsonl")[0] + (f"_and_{len(files) - 1}_more" if len(files) > 1 else "")
    path = Path(args.generations or Path(args.out_dir) / "eval" / f"{loaded.path.stem}_{data}.jsonl")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be created: {error}") from None
    return path


def main(argv: list[str] | None = None) -> None:
    parser = model_parser("evaluate.py", __doc__)
    parser.add_argument("--data_path", action="append", nargs="+", required=True, metavar="PATH",
                        help="JSONL files, folders, globs or names in data/; repeatable")
    parser.add_argument("--max_seq_len", type=number(int, 2), help="window of the loss (default: the model's context)")
    parser.add_argument("--min_tokens", type=number(int, 0), default=0, help="skip shorter conversations")
    parser.add_argument("--max_tokens", type=number(int, 1), help="skip longer conversations")
    parser.add_argument("--eval_tokens", type=number(int, 0), default=0,
                        help="compute the loss on this many tokens (default: 0, all)")
    parser.add_argument("--max_questions", type=number(int, 0), default=0,
                        help="answer a sample of this size, drawn by --seed (default: 0, all)")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=512, help="longest reply (default: 512)")
    parser.add_argument("--as_chat", action="store_true",
                        help="use the chat format for pretrained weights too (default: they continue the question)")
    parser.add_argument("--batch_size", type=number(int, 1), default=64, help="questions per batch (default: 64)")
    parser.add_argument("--generations", metavar="PATH", help="file for the replies, JSONL (default: in out_dir/eval)")
    for name in ("max_bad_ratio", "max_text_loss"):
        parser.add_argument(f"--{name}", type=number(float, 0, 1), default=FLAGS[name].default, help=FLAGS[name].help)
    for name in ("split_documents", "keep_malformed_thoughts"):
        parser.add_argument(f"--{name}", action="store_true", help=FLAGS[name].help)
    args = parser.parse_args(argv)
    sources = [source for paths in args.data_path for source in find_sources(paths)]
    files = list(dict.fromkeys(file for source in sources for file in source.files))
    kinds = {file: kind_of([file]) for file in files}
    asking = [file for file in files if kinds[file] == "question"]
    loaded = open_weights(args)
    context = loaded.model.config.max_seq_len
    args.max_seq_len = args.max_seq_len or context
    if args.max_seq_len > context:
        raise UserError(f"--max_seq_len {args.max_seq_len} exceeds the model's context of {context}")
    if asking:
        generations_path(loaded, asking, args)  # fail before the evaluation starts
    print("\n".join(loaded.described))

    result = {"checkpoint": str(loaded.path), "stage": loaded.stage, "device": str(loaded.device),
              "dtype": loaded.dtype, "max_seq_len": args.max_seq_len}
    scores = [score_file(loaded, file, kinds[file], args) for file in files if file not in asking]
    if scores:
        result |= total_of(scores) | {"files": scores}
    if asking:
        questions, malformed = read_questions(asking, args.max_bad_ratio)
        if args.max_questions and args.max_questions < len(questions):
            chosen = sorted(random.Random(args.seed).sample(range(len(questions)), args.max_questions))
            questions = [questions[i] for i in chosen]
        result["exact"] = exact_answers(loaded, asking, questions, args) | {"malformed": malformed}
    print(json.dumps(result, ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    sys.exit(exits.run(main))
