"""Score the weights of any stage: loss, perplexity and bits per byte on a file, exact-match accuracy on questions.

a file       python evaluate.py --model_mode 0 --data_path data/val/pretrain.jsonl
questions    python evaluate.py --model_mode 2 --data_path data/eval/multi_step.jsonl --max_questions 500
any weights  python evaluate.py --checkpoint out/SFT_best.pth --data_path data/val/sft_512.jsonl --max_tokens 512

The keys of a record decide how it is scored. {"text"} and {"conversations"} get a loss. Questions are answered greedily
and compared exactly (see common/answers.py):

{"question", "answer"}             if it has "choices", a correct reply names the correct choice and no other
{"history", "question", "answer"}  the messages of "history" stand before the question: user and assistant in turn, the
                                   last one an assistant's, after an optional system message
{"question", "decline": true}      has no answer: a correct reply says that it does not know, in one of the phrases in
                                   common/answers.py, and gives no number and none of its "choices", if it has any (one
                                   that stands in the question may be repeated)

"declined" is the share of replies to the other questions that are wrong and say so too. "source" groups the questions
in the result.

Weights that think (distill's) are asked with --thinking on, off or both: the prompt ends in <think>, which is part of
the reply that is scored, or in an empty thought, which is not. A reply is well-formed if it ends by </s> and has each
of the four tags once and in order; with thinking off, if it ends by </s> and has no tag.

--data_path takes the same values as in the training stages and may be repeated; shares do not change the scores. The
last line on stdout is one JSON object with all results: "exact" are the questions, and with --thinking both,
"exact_no_think" the same questions with thinking off.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

from common import exits
from common.answers import (
    TAG,
    declines,
    given_in,
    is_well_formed,
    normalize,
    phrase_of,
    read_answer,
    read_choice,
    read_reply,
    same_answer,
    wilson,
)
from common.files import write_jsonl
from common.generation import Generation, Sampling, generate
from common.scoring import score_documents, total_of
from common.weights import Loaded, model_parser, open_weights
from Config import FLAGS, UserError, number
from dataset import evaluated, load_documents
from text.chat import encode_chat
from text.content import OPEN_THINK, Reading
from text.records import MalformedRecord, check_conversation, parse_object, read_lines
from text.sources import Source, find_sources, kind_of

SCORE_TOKENS = 16_384  # tokens per buffer when a loss is computed
MODES = {"on": [True], "off": [False], "both": [True, False]}  # --thinking
SAID = {None: "", True: " with thinking", False: " without thinking"}  # in printed lines


# ---------------------------------------------------------------------------------------------
# files


def parse_question(line: bytes) -> dict:
    """Parse a line as {"question", "answer"} or {"question", "decline": true}, with optional "source", "choices" and
    "history". Raises MalformedRecord."""
    record = parse_object(line)
    decline = record.get("decline", False)
    if not isinstance(decline, bool):
        raise MalformedRecord('"decline" is not true or false')
    if decline and "answer" in record:
        raise MalformedRecord('"answer" and "decline" in one record')
    for key in ("question",) if decline else ("question", "answer"):
        value = record.get(key)
        if key == "answer" and isinstance(value, (int, float)) and not isinstance(value, bool):
            record[key] = value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise MalformedRecord(f'no "{key}"')
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise MalformedRecord(f'"{key}" has a lone surrogate, which is not valid text')
    if not decline and read_answer(record["answer"]) == "":
        raise MalformedRecord('"answer" has only punctuation')
    if "choices" in record:
        check_choices(record["choices"], record.get("answer"))
    if "history" in record:
        check_history(record["history"])
    return record


def check_choices(choices, answer: str | None) -> None:
    """Raises MalformedRecord if `choices` is invalid, or if a reply that names one choice could also name another. The
    latter is no error where there is no `answer`: such a reply is wrong whichever it names."""
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise MalformedRecord('"choices" is not a list of texts')
    if answer is None:
        return
    if answer not in choices:
        raise MalformedRecord('"answer" is not one of its "choices"')
    plain = [normalize(choice) for choice in choices]
    if any(one in other for i, one in enumerate(plain) for j, other in enumerate(plain) if i != j):
        raise MalformedRecord('one of its "choices" is part of another')


def check_history(history) -> None:
    """Raises MalformedRecord unless `history` is a list of messages that a question can follow."""
    if not isinstance(history, list):
        raise MalformedRecord('"history" is not a list of messages')
    try:
        check_conversation(history)
    except MalformedRecord as error:
        raise MalformedRecord(f'"history": {error}') from None
    first = int(bool(history) and history[0]["role"] == "system")
    for index, message in enumerate(history):
        if not message["content"].strip():
            raise MalformedRecord(f'"history": message {index + 1} is empty')
        expected = "user" if (index - first) % 2 == 0 else "assistant"
        if index >= first and message["role"] != expected:
            raise MalformedRecord(f'"history": message {index + 1} is not of the {expected}')
    if not history or history[-1]["role"] != "assistant":
        raise MalformedRecord('"history" does not end with a reply of the assistant')


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
    answers = [question["answer"] for question in questions if "answer" in question and "choices" not in question]
    n_texts = sum(isinstance(read_answer(answer), str) for answer in answers)
    n_decline = sum("answer" not in question for question in questions)
    print(f"questions: {n_lines:,} lines, {len(malformed):,} malformed; {n_texts:,} answers are no numbers and are "
          f"compared as text{f'; {n_decline:,} have no answer: a correct reply declines' if n_decline else ''}")
    if not questions or len(malformed) > max_bad_ratio * n_lines:
        raise UserError(f"{len(malformed):,} of {n_lines:,} lines are malformed, more than --max_bad_ratio "
                        f"{max_bad_ratio} (the first: {malformed[0]})")
    return questions, len(malformed)


# ---------------------------------------------------------------------------------------------
# scores


def score_file(loaded: Loaded, file: Path, kind: str, args) -> dict:
    """The result of scoring.score for one file, with the counts of cut and skipped lines."""
    reading = Reading.of(args, kind, thoughts=loaded.thinks)
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


def modes_of(loaded: Loaded, args) -> list[bool | None]:
    """The modes in which the questions are asked, as `thinking` of encode_chat. Raises UserError when --thinking is
    given for weights that do not think."""
    if loaded.thinks:
        return MODES[args.thinking or "on"]
    if args.thinking is not None:
        raise UserError(f"--thinking {args.thinking}: {loaded.path} ({loaded.stage}) has no thinking format; only "
                        "distill's weights have")
    return [None]


def answer_all(loaded: Loaded, questions: list[dict], args, thinking: bool | None = None) -> list[Generation]:
    """A greedy reply to each question, in batches. A question that fills the context gets an empty reply with the
    reason "context"."""
    if loaded.continues_text and not args.as_chat:
        prompts = [[loaded.encoder.bos_id, *ids] for ids in loaded.encoder.encode([q["question"] for q in questions])]
    else:
        prompts = [encode_chat(loaded.tokenizer, [*q.get("history", ()), {"role": "user", "content": q["question"]}],
                               True, thinking)[0] for q in questions]
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
        print(f"answered {start + len(chosen):,} of {len(questions):,} questions{SAID[thinking]}, "
              f"{n_tokens / (time.perf_counter() - begin):,.0f} tokens/s", flush=True)
    return replies


def compare(loaded: Loaded, questions: list[dict], replies: list[Generation], thinking: bool | None = None,
            ) -> list[dict]:
    """One record per question: the unchanged reply, with the <think> that its prompt opened, the answer read from it,
    and whether that is correct. A question that has an answer also gets "declined"; "tokens" are those generated."""
    records = []
    for question, reply in zip(questions, replies, strict=True):
        # with special tokens: a reply that contains one is not well-formed
        text = (OPEN_THINK if thinking else "") + loaded.tokenizer.decode(reply.ids)
        repeated = normalize(question["question"])
        names = [name for name in question.get("choices", ()) if normalize(name) not in repeated]
        declined = declines(text, names)
        if "answer" not in question:
            read, correct, judged = given_in(text, names) or phrase_of(text), declined, {}
        else:
            if "choices" in question:
                expected, read = question["answer"], read_choice(text, question["choices"])
            else:
                expected = read_answer(question["answer"])
                read = read_reply(text, is_number=not isinstance(expected, str))
            correct = same_answer(expected, read)
            judged = {"declined": declined and not correct}
        tidy = is_well_formed(text) if thinking is not False else not TAG.search(text)
        asked = {key: question[key] for key in ("history", "question", "answer", "decline", "source", "file", "line")
                 if key in question}
        records.append(asked | {
            "thinking": thinking, "reply": text, "read": None if read is None else str(read), "correct": correct,
            **judged, "well_formed": tidy and reply.reason == "eos", "ended": reply.reason, "tokens": len(reply.ids)})
    return records


def summary(records: list[dict]) -> dict:
    """Accuracy with its 95 % interval, shares and means over the records that `compare` returns."""
    n = len(records)
    by_source = {}
    for record in records:
        if "source" in record:
            by_source.setdefault(str(record["source"]), []).append(record)
    return {"thinking": records[0]["thinking"], **accuracy(records),
            "well_formed": sum(r["well_formed"] for r in records) / n,
            "ended": sum(r["ended"] == "eos" for r in records) / n,
            "mean_tokens": sum(r["tokens"] for r in records) / n,
            "by_source": {source: accuracy(by_source[source]) for source in sorted(by_source)}}


def accuracy(records: list[dict]) -> dict:
    """Accuracy with its 95 % interval, and the share of the questions that have an answer which were declined (None
    where none has one)."""
    n, correct = len(records), sum(r["correct"] for r in records)
    declined = [r["declined"] for r in records if "declined" in r]
    return {"questions": n, "correct": correct, "accuracy": correct / n, "interval95": wilson(correct, n),
            "declined": sum(declined) / len(declined) if declined else None}


def exact_answers(loaded: Loaded, files: list[Path], questions: list[dict], args) -> list[dict]:
    """Answer the questions in each mode, write the generations of all modes, print and return the summaries."""
    path, written, summaries = generations_path(loaded, files, args), [], []
    for thinking in modes_of(loaded, args):
        begin = time.perf_counter()
        records = compare(loaded, questions, answer_all(loaded, questions, args, thinking), thinking)
        seconds = time.perf_counter() - begin
        written += records
        exact = summary(records) | {"tokens_per_second": sum(r["tokens"] for r in records) / seconds,
                                    "max_new_tokens": args.max_new_tokens, "seed": args.seed, "generations": str(path)}
        low, high = exact["interval95"]
        print(f"exact answers{SAID[thinking]}: {exact['correct']:,} of {exact['questions']:,}, {exact['accuracy']:.2%} "
              f"(95 % interval {low:.2%} to {high:.2%}){said_declined(exact)}; well-formed {exact['well_formed']:.1%}, "
              f"ended by </s> {exact['ended']:.1%}, {exact['mean_tokens']:.1f} tokens on average, "
              f"{exact['tokens_per_second']:,.0f} tokens/s")
        for source, part in exact["by_source"].items():
            print(f"  {source}: {part['correct']:,} of {part['questions']:,}, {part['accuracy']:.2%}"
                  f"{said_declined(part)}")
        summaries.append(exact)
    write_jsonl(path, written)
    print(f"generations written to {path}")
    return summaries


def said_declined(part: dict) -> str:
    """The share of declined questions for a printed line; "" where none was declined or none has an answer."""
    return f", {part['declined']:.1%} of those with an answer declined" if part["declined"] else ""


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
    parser.add_argument("--thinking", choices=tuple(MODES),
                        help="answer with thinking on, off, or in both modes (distill's weights only; default: on)")
    parser.add_argument("--batch_size", type=number(int, 1), default=64, help="questions per batch (default: 64)")
    parser.add_argument("--generations", metavar="PATH", help="file for the replies, JSONL (default: in out_dir/eval)")
    for name in ("max_bad_ratio", "max_text_loss"):
        parser.add_argument(f"--{name}", type=number(float, 0, 1), default=FLAGS[name].default, help=FLAGS[name].help)
    parser.add_argument("--split_documents", action="store_true", help=FLAGS["split_documents"].help)
    parser.add_argument("--keep_malformed_thoughts", action="store_true",
                        help="also score replies whose tags are cut, repeated or out of order")
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
    modes_of(loaded, args)  # fail before the evaluation starts
    if asking:
        generations_path(loaded, asking, args)
    print("\n".join(loaded.described))

    result = {"checkpoint": str(loaded.path), "stage": loaded.stage, "device": str(loaded.device),
              "dtype": loaded.dtype, "max_seq_len": args.max_seq_len}
    if asking:
        questions, malformed = read_questions(asking, args.max_bad_ratio)
        if args.max_questions and args.max_questions < len(questions):
            chosen = sorted(random.Random(args.seed).sample(range(len(questions)), args.max_questions))
            questions = [questions[i] for i in chosen]
        with_history = next((q for q in questions if "history" in q), None)
        if with_history and loaded.continues_text and not args.as_chat:
            raise UserError(f'{with_history["file"]}:{with_history["line"]}: a question with "history" needs the chat '
                            f"format, and {loaded.path} continues text (--as_chat asks in the chat format)")
    scores = [score_file(loaded, file, kinds[file], args) for file in files if file not in asking]
    if scores:
        result |= total_of(scores) | {"files": scores}
    if asking:
        summaries = exact_answers(loaded, asking, questions, args)
        for key, exact in zip(("exact", "exact_no_think"), summaries, strict=False):
            result[key] = exact | {"malformed": malformed}
    print(json.dumps(result, ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    sys.exit(exits.run(main))
