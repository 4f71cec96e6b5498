"""What clients get: ids → the thought and the answer → JSON objects, whole or as a stream of chunks."""

import secrets
import time

from common.generation import StreamDecoder
from serving.errors import dump
from text.content import CLOSE_THINK, OPEN_ANSWER, OPEN_THINK, TAG_PATTERN
from text.tokenizer import TAGS

THOUGHT, ANSWER, TEXT = "reasoning_content", "content", "text"  # the fields of a reply
DONE = b"data: [DONE]\n\n"
Pieces = list[tuple[str, str]]  # (field, text)


def partial_match(text: str, strings: tuple[str, ...]) -> int:
    """How many of the last characters of `text` may be the beginning of one of `strings`, which are short."""
    return max((n for string in strings for n in range(min(len(string), len(text) + 1)) if text.endswith(string[:n])),
               default=0)


class Matcher:
    """How many characters of `string` the text so far ends in, one character at a time (Knuth, Morris and Pratt 1977):
    the time for each does not grow with the string."""

    def __init__(self, string: str):
        self.string, self.matched = string, 0
        self.borders = [0]  # of each beginning of the string: the longest shorter beginning that it ends in
        for char in string[1:]:
            self.borders.append(self._longer(self.borders[-1], char))

    def push(self, char: str) -> bool:
        """True if the string is now complete; then there is no more to push."""
        self.matched = self._longer(self.matched, char)
        return self.matched == len(self.string)

    def _longer(self, matched: int, char: str) -> int:
        while matched and self.string[matched] != char:
            matched = self.borders[matched - 1]
        return matched + (self.string[matched] == char)


class StopFinder:
    """Passes text on up to the first stop string, the one that is complete first; holds back what may become one."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.held, self.found = [Matcher(stop) for stop in stops], "", False

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        if self.found or not self.stops:
            return "" if self.found else text
        begin, text = len(self.held), self.held + text
        for end, char in enumerate(text[begin:], begin + 1):
            complete = [len(stop.string) for stop in self.stops if stop.push(char)]
            if complete:
                self.found, self.held = True, ""
                return text[:end - max(complete)]
        shown = len(text) - max(stop.matched for stop in self.stops)
        self.held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The rest at the end."""
        rest, self.held = self.held, ""
        return rest


class Part:
    """The thought, or the answer, as it grows. Once there are tags, white space at its ends is left out, as
    text.chat.without_thought leaves it out."""

    def __init__(self, stops: tuple[str, ...] = ()):
        self.stops, self.space = StopFinder(stops), ""
        self.has_text = self.shown = False  # is there a character that is not white space?

    def push(self, text: str, tagged: bool) -> str:
        """The text that can be shown now."""
        if tagged and not self.has_text:
            text = text.lstrip()
        self.has_text = self.has_text or bool(text.strip())
        return self._show(self.space + self.stops.push(text), tagged)

    def flush(self, tagged: bool) -> str:
        """The rest at the end."""
        text = self._show(self.space + self.stops.flush(), tagged)
        return text if tagged else text + self.space

    def _show(self, text: str, tagged: bool) -> str:
        if tagged and not self.shown:
            text = text.lstrip()
        visible = text.rstrip()
        self.space, self.shown = text[len(visible):], self.shown or bool(visible)
        return visible


class Splitter:
    """Splits a reply at its tags into thought and answer. `opened`: the prompt ends in <think>. The tags are found in
    the text, since not every tokenizer has them as single ids. Stop strings are looked for in the answer only."""

    def __init__(self, opened: bool, stops: tuple[str, ...]):
        self.field, self.tagged, self.held = THOUGHT if opened else ANSWER, opened, ""
        self.parts = {THOUGHT: Part(), ANSWER: Part(stops)}

    @property
    def stopped(self) -> bool:
        """True once a stop string was found."""
        return self.parts[ANSWER].stops.found

    def push(self, text: str) -> Pieces:
        """The pieces that can be shown now."""
        text, pieces = self.held + text, []
        while match := TAG_PATTERN.search(text):
            self._add(pieces, text[:match.start()])
            self.tagged, text = True, text[match.end():]
            self.field = {OPEN_THINK: THOUGHT, CLOSE_THINK: ANSWER, OPEN_ANSWER: ANSWER}.get(match.group(), self.field)
        shown = len(text) - partial_match(text, TAGS)
        self.held = text[shown:]
        self._add(pieces, text[:shown])
        return pieces

    def flush(self) -> Pieces:
        """The rest at the end."""
        pieces, rest, self.held = [], self.held, ""
        self._add(pieces, rest)
        return pieces + [(field, text) for field, part in self.parts.items() if (text := part.flush(self.tagged))]

    def _add(self, pieces: Pieces, text: str) -> None:
        if text and not self.stopped and (shown := self.parts[self.field].push(text, self.tagged)):
            pieces.append((self.field, shown))


class Whole:
    """A text that is not split: the continuation of a prompt. Has the methods of Splitter."""

    field = TEXT

    def __init__(self, stops: tuple[str, ...]):
        self.stops = StopFinder(stops)

    @property
    def stopped(self) -> bool:
        """True once a stop string was found."""
        return self.stops.found

    def push(self, text: str) -> Pieces:
        """The pieces that can be shown now."""
        shown = self.stops.push(text)
        return [(TEXT, shown)] if shown else []

    def flush(self) -> Pieces:
        """The rest at the end."""
        rest = self.stops.flush()
        return [(TEXT, rest)] if rest else []


class Reply:
    """A reply as its ids come: the pieces of text to show, and what was counted."""

    def __init__(self, tokenizer, splitter: Splitter | Whole, prompt_tokens: int):
        self.words, self.splitter = StreamDecoder(tokenizer), splitter
        self.prompt_tokens, self.tokens, self.thought_tokens = prompt_tokens, 0, 0
        self.finish_reason: str | None = None

    def push(self, ids: list[int], reason: str | None) -> Pieces:
        """Add ids and, at the end, the reason of Generation. Returns the pieces that can be shown now; ids behind a
        stop string are not read."""
        pieces = []
        for token in ids:
            self.tokens += 1
            self.thought_tokens += self.splitter.field == THOUGHT
            pieces += self.splitter.push(self.words.push(token))
            if self.splitter.stopped:
                break
        if reason is not None and not self.splitter.stopped:
            pieces += self.splitter.push(self.words.flush())
        if reason is not None or self.splitter.stopped:
            pieces += self.splitter.flush()
            self.finish_reason = "stop" if reason == "eos" or self.splitter.stopped else "length"
        return _joined(pieces)

    @property
    def usage(self) -> dict:
        """The counts, as OpenAI names them."""
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens,
                "total_tokens": self.prompt_tokens + self.tokens,
                "completion_tokens_details": {"reasoning_tokens": self.thought_tokens}}


def _joined(pieces: Pieces) -> Pieces:
    """Neighbors of the same field as one."""
    joined: Pieces = []
    for field, text in pieces:
        if joined and joined[-1][0] == field:
            joined[-1] = field, joined[-1][1] + text
        else:
            joined.append((field, text))
    return joined


# ---------------------------------------------------------------------------------------------
# objects


class Form:
    """The objects of one reply. `kind` is "chat" or "text"."""

    def __init__(self, kind: str, model: str):
        self.chat = kind == "chat"
        self.shared = {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}",
                       "created": int(time.time()), "model": model, "system_fingerprint": None}

    def whole(self, reply: Reply, pieces: Pieces) -> dict:
        """The object of a reply that is not streamed."""
        def text_of(field):
            return "".join(text for its_field, text in pieces if its_field == field)

        if self.chat:
            said = {"message": {"role": "assistant", "content": text_of(ANSWER), "refusal": None}}
            if thought := text_of(THOUGHT):
                said["message"]["reasoning_content"] = thought
        else:
            said = {"text": text_of(TEXT)}
        return self._object("chat.completion", [said | {"finish_reason": reply.finish_reason}]) | {"usage": reply.usage}

    def first(self) -> list[dict]:
        """What a stream begins with."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.chat else []

    def piece(self, field: str, text: str) -> dict:
        """The chunk of a piece of text."""
        return self._chunk({"delta": {field: text}} if self.chat else {field: text})

    def last(self, reply: Reply) -> dict:
        """The chunk that says why the reply ended."""
        return self._chunk(({"delta": {}} if self.chat else {"text": ""}) | {"finish_reason": reply.finish_reason})

    def usage(self, reply: Reply) -> dict:
        """The chunk of stream_options.include_usage."""
        return self._object("chat.completion.chunk", []) | {"usage": reply.usage}

    def _chunk(self, said: dict) -> dict:
        return self._object("chat.completion.chunk", [said])

    def _object(self, name: str, choices: list[dict]) -> dict:
        choices = [{"index": 0, "logprobs": None, "finish_reason": None} | said for said in choices]
        return self.shared | {"object": name if self.chat else "text_completion", "choices": choices}


def event(content: dict) -> bytes:
    """An object as a server-sent event."""
    return b"data: " + dump(content) + b"\n\n"
