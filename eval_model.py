"""Chat with the weights of any stage.

chat         python eval_model.py --model_mode 1
one answer   python eval_model.py --model_mode 2 --prompt "小明有3个苹果，又买了5个，一共几个？" --temperature 0
any file     python eval_model.py --checkpoint out/SFT_best.pth
no thoughts  python eval_model.py --model_mode 2 --no_think

--model_mode 0 is pretrain, which continues text; 1 SFT, 2 distill and 3 SFT_long hold a conversation. Distill's weights
think before they answer: the prompt opens their <think>, or with --no_think an empty thought; in a conversation /think
and /no_think switch between the two. Ctrl-C stops an answer; at the prompt it ends the program. Ctrl-D quits, and /help
lists the commands. The answer goes to stdout, everything else to stderr. On a terminal the text in <think> is dimmed
and the tags are hidden; elsewhere the text is unchanged.
"""

import contextlib
import math
import os
import sys
import time

import torch

from common import exits
from common.generation import Sampling, StreamDecoder, stream
from common.weights import Loaded, model_parser, open_weights
from Config import UserError, number
from text.chat import encode_chat
from text.content import OPEN_THINK, TAG_PATTERN, is_empty
from text.tokenizer import TAGS

SHORTEST_ANSWER = 16  # tokens: a prompt that leaves less room is an error
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = "/clear starts a new conversation, /quit or Ctrl-D quits, Ctrl-C stops an answer"
HELP_THINKING = "/think and /no_think switch thoughts on and off"
SWITCHES = {"/think": True, "/no_think": False}
STATES = {None: "", True: "[think] ", False: "[no think] "}  # in the prompt line; None: weights that do not think


# ---------------------------------------------------------------------------------------------
# what the user sees


def note(text: str) -> None:
    """Print a line about the conversation to stderr."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


class Display:
    """Formats streamed text for the terminal. With color, the text in <think> is dimmed, and each tag is hidden with
    the line break after it. Without color, the text is unchanged."""

    def __init__(self, color: bool):
        self.color, self.held, self.after_tag = color, "", False

    def push(self, piece: str) -> str:
        """Add `piece`. Returns the text that can be shown now; what may be the beginning of a tag is held back."""
        if not self.color:
            return piece
        # the terminal would interpret an escape character that the model generates
        text, out = self.held + piece.replace("\x1b", "␛"), ""
        while match := TAG_PATTERN.search(text):
            out += self._plain(text[:match.start()]) + {"<think>": DIM, "</think>": PLAIN}.get(match.group(), "")
            text, self.after_tag = text[match.end():], True
        begun = max((n for tag in TAGS for n in range(len(tag)) if text.endswith(tag[:n])), default=0)
        self.held = text[len(text) - begun:]
        return out + self._plain(text[:len(text) - begun])

    def flush(self) -> str:
        """The remaining text at the end of the answer."""
        return self.held + PLAIN if self.color else ""

    def _plain(self, text: str) -> str:
        if text and self.after_tag:
            text, self.after_tag = text.removeprefix("\n"), False
        return text


def answer(loaded: Loaded, ids: list[int], args, generator: torch.Generator, color: bool,
           opened: str) -> tuple[str, bool]:
    """Stream a reply to stdout: `opened`, the part of it that `ids` (the prompt) end in, and their continuation.
    Returns (its text, True if Ctrl-C stopped it)."""
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty)
    _ = loaded.decoder.native  # created before timing starts
    words, display, text, n_tokens, reason = StreamDecoder(loaded.tokenizer), Display(color), opened, 0, "interrupted"
    begin, times = time.perf_counter(), []
    try:
        print(display.push(opened), end="", flush=True)
        for _, new_ids, reason_now in stream(loaded.decoder, [ids], args.max_new_tokens, sampling,
                                             {loaded.encoder.eos_id}, loaded.encoder.vocab_size, generator):
            times.append(time.perf_counter())
            n_tokens += len(new_ids)  # 0 for </s>
            piece = "".join(map(words.push, new_ids))
            text += piece
            print(display.push(piece), end="", flush=True)
            reason = reason_now or reason
    except KeyboardInterrupt:
        pass
    rest = words.flush()
    print(display.push(rest) + display.flush(), flush=True)
    endings = {"eos": "", "length": f", stopped at --max_new_tokens {args.max_new_tokens}",
               "context": f", stopped because the context of {loaded.model.config.max_seq_len} tokens is full",
               "interrupted": ", stopped by Ctrl-C"}
    first, last = (times[0] - begin, times[-1] - begin) if times else (0.0, math.inf)
    note(f"[{n_tokens} tokens, {n_tokens / last:.1f} tokens/s, first token after {first:.2f} s{endings[reason]}]")
    return text + rest, reason == "interrupted"


# ---------------------------------------------------------------------------------------------
# the conversation


def check_text(text: str, where: str) -> None:
    """Raises UserError when `text` has bytes that are not UTF-8 (Python reads them as lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not UTF-8 at character {error.start + 1}: set the terminal to UTF-8 "
                        "or type the text again") from None


def make_prompt(loaded: Loaded, system: list[dict], history: list[dict], message: str, max_new_tokens: int,
                thinking: bool | None) -> tuple[list[int], int]:
    """(prompt ids, number of dropped turns). The oldest whole turns in `history` are dropped first.

    Turns are dropped until max_new_tokens fit, or half the context if that is less. The prompt of pretraining weights
    is `<s>` and the message only. `thinking` is encode_chat's: None for weights that do not think. Raises UserError
    when the message alone leaves no room for an answer.
    """
    context = loaded.model.config.max_seq_len
    room = min(max_new_tokens, context // 2)
    for dropped in range(len(history) // 2 + 1):
        messages = [*system, *history[2 * dropped:], {"role": "user", "content": message}]
        if loaded.continues_text:
            ids = [loaded.encoder.bos_id, *loaded.encoder.encode([message])[0]]
        else:
            ids, _ = encode_chat(loaded.tokenizer, messages, add_generation_prompt=True, thinking=thinking)
        if len(ids) + room <= context:
            return ids, dropped
    most = context - min(max_new_tokens, SHORTEST_ANSWER)
    if len(ids) > most:
        raise UserError(f"message too long: {len(ids):,} tokens, but the model's context of {context:,} has room for "
                        f"{most:,}; please shorten it")
    return ids, dropped


def read_line(prompt: str) -> str | None:
    """A line that the user types behind `prompt`, which only a terminal shows; None at Ctrl-D."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history
    try:
        return input(prompt if terminal else "")
    except EOFError:
        return None


def main(argv: list[str] | None = None) -> int:
    parser = model_parser("eval_model.py", __doc__)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this message and exit")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus sampling (default: 0.9; 1: off)")
    parser.add_argument("--top_k", type=int, default=0, help="sample from the k likeliest tokens (default: 0, off)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 reduces loops (default: 1, off)")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=512, help="longest answer (default: 512)")
    parser.add_argument("--history_turns", type=number(int, 0), default=3, help="past turns in the prompt (default: 3)")
    parser.add_argument("--no_think", action="store_true",
                        help="answer at once, without a thought (distill's weights only)")
    parser.add_argument("--no_color", action="store_true", help="no ANSI codes (also with NO_COLOR set, or in a pipe)")
    args = parser.parse_args(argv)
    if args.prompt is not None and is_empty(args.prompt):
        raise UserError("--prompt: empty")
    Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty)  # check the values before loading
    for name in ("prompt", "system"):
        check_text(getattr(args, name) or "", f"--{name}")
    with contextlib.suppress(AttributeError):  # sys.stdin may be another object, e.g. StringIO in a test
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # check_text reports invalid bytes
    loaded = open_weights(args)
    generator = loaded.generator(args.seed)
    color = sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")
    if color and os.name == "nt":
        os.system("")  # turns on ANSI codes in the Windows console
    if args.system and loaded.continues_text:
        raise UserError(f"--system: {loaded.stage} weights continue text and have no system message")
    no_thoughts = f"{loaded.stage} weights do not think: only distill's have learned to"
    if args.no_think and not loaded.thinks:
        raise UserError(f"--no_think: {no_thoughts}")
    thinking = not args.no_think if loaded.thinks else None
    system = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        ids, _ = make_prompt(loaded, system, [], args.prompt, args.max_new_tokens, thinking)
    for line in loaded.described:
        note(line)
    note(loaded.decoder.computed_by)
    shown = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "history_turns", "seed")
    settings = [f"{name} {getattr(args, name)}" for name in shown]
    note(", ".join([*settings, f"thinking {'on' if thinking else 'off'}"] if loaded.thinks else settings))
    if args.prompt is not None:
        _, interrupted = answer(loaded, ids, args, generator, color, OPEN_THINK if thinking else "")
        return 130 if interrupted else 0

    commands = f"{HELP_THINKING}, {HELP}" if loaded.thinks else HELP
    note(f"enter {'text to continue' if loaded.continues_text else 'a message'}, one line at a time; {commands}")
    history: list[dict] = []
    while (line := read_line(f"{STATES[thinking]}> ")) is not None:
        command = line.strip()
        if command in ("/quit", "/exit"):
            break
        if command == "/help":
            note(commands)
        elif command == "/clear":
            history.clear()
            note("conversation cleared")
        elif command in SWITCHES:
            if loaded.thinks:
                thinking = SWITCHES[command]
            note(f"thinking {'on' if thinking else 'off'}" if loaded.thinks else f"{command}: {no_thoughts}")
        elif not is_empty(line):
            try:
                check_text(line, "the line")
                if not sys.stdin.isatty():
                    note(f"{STATES[thinking]}> {line}")  # the terminal does not echo lines read from a file
                ids, dropped = make_prompt(loaded, system, history, line, args.max_new_tokens, thinking)
            except UserError as error:
                note(str(error))
                continue
            if dropped:
                del history[:2 * dropped]
                note(f"[context full: dropped the {dropped} oldest turn{'s' * (dropped > 1)}]")
            reply, _ = answer(loaded, ids, args, generator, color, OPEN_THINK if thinking else "")
            if loaded.continues_text:
                continue
            history += [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]
            del history[:max(0, len(history) - 2 * args.history_turns)]
    return 0


if __name__ == "__main__":
    sys.exit(exits.run(main))
