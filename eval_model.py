"""Talk with the weights of any stage.

chat         python eval_model.py --model_mode 1
one answer   python eval_model.py --model_mode 2 --prompt "小明有3个苹果，又买了5个，一共几个？" --temperature 0
any file     python eval_model.py --checkpoint out/SFT_best.pth

--model_mode 0 is pretrain, which continues text; 1 SFT, 2 distill, 3 SFT_long hold a conversation. Ctrl-C stops the
answer (at the prompt: the program), Ctrl-D leaves, /help lists the commands. The answer goes to stdout, all else to
stderr. On a terminal what stands in <think> is dimmed and the tags are left out; elsewhere the text is as it came.
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
from text.chat import TAG_PATTERN, encode_chat
from text.tokenizer import TAGS

SHORTEST_ANSWER = 16  # tokens: a prompt that leaves less room is refused
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = "/clear forgets the conversation, /quit leaves (also Ctrl-D), Ctrl-C stops an answer"


# ---------------------------------------------------------------------------------------------
# what the user sees


def note(text: str) -> None:
    """A line beside the conversation, on stderr."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


class Display:
    """Streaming text for the screen: with colour, thinking is dimmed and the tags are left out, each with the line
    break after it; without, all stays as it is."""

    def __init__(self, colour: bool):
        self.colour, self.held, self.after_tag = colour, "", False

    def push(self, piece: str) -> str:
        """What can be shown once `piece` has come; the beginning of a tag is held back."""
        if not self.colour:
            return piece
        # an escape character of the model's own would be obeyed by the terminal
        text, out = self.held + piece.replace("\x1b", "␛"), ""
        while match := TAG_PATTERN.search(text):
            out += self._plain(text[:match.start()]) + {"<think>": DIM, "</think>": PLAIN}.get(match.group(), "")
            text, self.after_tag = text[match.end():], True
        begun = max((n for tag in TAGS for n in range(len(tag)) if text.endswith(tag[:n])), default=0)
        self.held = text[len(text) - begun:]
        return out + self._plain(text[:len(text) - begun])

    def flush(self) -> str:
        """The rest, at the end of the answer."""
        return self.held + PLAIN if self.colour else ""

    def _plain(self, text: str) -> str:
        if text and self.after_tag:
            text, self.after_tag = text.removeprefix("\n"), False
        return text


def answer(loaded: Loaded, ids: list[int], args, generator: torch.Generator, colour: bool) -> tuple[str, bool]:
    """Stream the continuation of `ids` to stdout; (its text, whether Ctrl-C stopped it)."""
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty)
    _ = loaded.decoder.native  # made before the clock starts
    words, display, text, n_tokens, reason = StreamDecoder(loaded.tokenizer), Display(colour), "", 0, "interrupted"
    begin, times = time.perf_counter(), []
    try:
        for _, new_ids, reason_now in stream(loaded.decoder, [ids], args.max_new_tokens, sampling,
                                             {loaded.encoder.eos_id}, loaded.encoder.vocab_size, generator):
            times.append(time.perf_counter())
            n_tokens += len(new_ids)  # none, with </s>
            piece = "".join(map(words.push, new_ids))
            text += piece
            print(display.push(piece), end="", flush=True)
            reason = reason_now or reason
    except KeyboardInterrupt:
        pass
    rest = words.flush()
    print(display.push(rest) + display.flush(), flush=True)
    endings = {"eos": "", "length": f", stopped at --max_new_tokens {args.max_new_tokens}",
               "context": f", stopped where the context of {loaded.model.config.max_seq_len} tokens is full",
               "interrupted": ", stopped by Ctrl-C"}
    first, last = (times[0] - begin, times[-1] - begin) if times else (0.0, math.inf)
    note(f"[{n_tokens} tokens, {n_tokens / last:.1f} tokens/s, the first after {first:.2f} s{endings[reason]}]")
    return text + rest, reason == "interrupted"


# ---------------------------------------------------------------------------------------------
# the conversation


def check_text(text: str, where: str) -> None:
    """Raises UserError when `text` has bytes that are no UTF-8 (Python reads them as lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not UTF-8 at character {error.start + 1}: set the terminal to UTF-8, "
                        "or type it again") from None


def make_prompt(loaded: Loaded, system: list[dict], history: list[dict], message: str,
                max_new_tokens: int) -> tuple[list[int], int]:
    """Ids to be continued, and how many of the oldest whole turns in `history` had to be left out.

    Turns go until there is room for max_new_tokens, or for half the context where that is less. Pretraining
    weights get `<s>` and the message only. Raises UserError when the message alone leaves no room for an answer.
    """
    context = loaded.model.config.max_seq_len
    room = min(max_new_tokens, context // 2)
    for dropped in range(len(history) // 2 + 1):
        messages = [*system, *history[2 * dropped:], {"role": "user", "content": message}]
        if loaded.continues_text:
            ids = [loaded.encoder.bos_id, *loaded.encoder.encode([message])[0]]
        else:
            ids, _ = encode_chat(loaded.tokenizer, messages, add_generation_prompt=True)
        if len(ids) + room <= context:
            return ids, dropped
    most = context - min(max_new_tokens, SHORTEST_ANSWER)
    if len(ids) > most:
        raise UserError(f"too long: {len(ids):,} tokens, where the model's context of {context:,} has room for "
                        f"{most:,}; please shorten it")
    return ids, dropped


def read_lines():
    """What the user types, line by line, until Ctrl-D."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def main(argv: list[str] | None = None) -> int:
    parser = model_parser("eval_model.py", __doc__)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once and exit")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus sampling (default: 0.9; 1: off)")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest (default: 0, off)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 against loops (default: 1, off)")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=512, help="longest answer (default: 512)")
    parser.add_argument("--history_turns", type=number(int, 0), default=3, help="past turns kept (default: 3)")
    parser.add_argument("--no_color", action="store_true", help="no ANSI codes (so too with NO_COLOR, or into a pipe)")
    args = parser.parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt: no text")
    Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty)  # refuses nonsense before loading
    for name in ("prompt", "system"):
        check_text(getattr(args, name) or "", f"--{name}")
    with contextlib.suppress(AttributeError):  # a stdin that is not a terminal's or file's
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # check_text speaks of what is broken
    loaded = open_weights(args)
    generator = loaded.generator(args.seed)
    colour = sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")
    if colour and os.name == "nt":
        os.system("")  # after this the Windows console obeys ANSI codes
    if args.system and loaded.continues_text:
        raise UserError(f"--system: {loaded.stage} weights continue text and know no system message")
    system = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        ids, _ = make_prompt(loaded, system, [], args.prompt, args.max_new_tokens)
    for line in loaded.described:
        note(line)
    note(loaded.decoder.computed_by)
    shown = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "history_turns", "seed")
    note(", ".join(f"{name} {getattr(args, name)}" for name in shown))
    if args.prompt is not None:
        _, interrupted = answer(loaded, ids, args, generator, colour)
        return 130 if interrupted else 0

    note(f"{'text to be continued' if loaded.continues_text else 'your message'}, a line at a time; {HELP}")
    history: list[dict] = []
    for line in read_lines():
        if line.strip() in ("/quit", "/exit"):
            break
        if line.strip() == "/help":
            note(HELP)
        elif line.strip() == "/clear":
            history.clear()
            note("the conversation is forgotten")
        elif line.strip():
            try:
                check_text(line, "the line")
                if not sys.stdin.isatty():
                    note(f"> {line}")  # so that a conversation read from a file can be followed
                ids, dropped = make_prompt(loaded, system, history, line, args.max_new_tokens)
            except UserError as error:
                note(str(error))
                continue
            if dropped:
                del history[:2 * dropped]
                note(f"[the context is full: the {dropped} oldest turn{'s' * (dropped > 1)} dropped]")
            reply, _ = answer(loaded, ids, args, generator, colour)
            if loaded.continues_text:
                continue
            history += [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]
            del history[:max(0, len(history) - 2 * args.history_turns)]
    return 0


if __name__ == "__main__":
    sys.exit(exits.run(main))
