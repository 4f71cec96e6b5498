"""What the records hold that is not plain content: empty texts and replies, thoughts, tool calls, control strings and
keys that are not read. Each is counted, over all records; what cannot be learned from is left out."""

import re
from collections import Counter
from dataclasses import dataclass

from text.records import TOOL_ROLES, calls_tool
from text.tokenizer import TAGS

# white space, and characters that show nothing: controls, zero-width characters, fillers, byte order marks
VISIBLE = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
                     r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffc]")
TAG_PATTERN = re.compile("|".join(map(re.escape, TAGS)))
OPEN_THINK, CLOSE_THINK, OPEN_ANSWER, CLOSE_ANSWER = TAGS
# control strings of other tokenizers: <s>, <|im_end|>, <｜User｜>, [INST], <start_of_turn>, …
CONTROL_STRING = re.compile(
    r"</?s>|<\|\w+\|>|<｜[^｜<>]{1,40}｜>|<(?:unk|pad|bos|eos|mask|sep|cls|sop|eop|eod|eot|start_of_turn|end_of_turn"
    r"|(?:extra_id_|reserved_|unused)\d+)>|\[/?INST\]|<</?SYS>>|\[(?:CLS|SEP|PAD|UNK|BOS|EOS|g?MASK|sMASK|TOOL_CALLS)\]")
KEYS = {"text": {"text", "weight"}, "chat": {"conversations", "weight"}}
MESSAGE_KEYS = {"role", "content"}
MOST_NAMES = 1000  # different keys that are counted by name

BARE, WELL_FORMED, EMPTY_THOUGHT = "without tags", "well-formed", "well-formed with an empty thought"
GOOD_SHAPES = (WELL_FORMED, EMPTY_THOUGHT, BARE)


def is_empty(text: str) -> bool:
    """True if a text shows nothing."""
    return VISIBLE.search(text) is None


def thought_shape(reply: str) -> str:
    """The shape of a reply's thought: one of GOOD_SHAPES, or what is wrong with it.

    Well-formed is <think>…</think> and then <answer>…</answer>, each tag once, with an answer in it and nothing around
    it; so is <think></think> and then text without tags, which is how a reply says that it did not think.
    """
    if "<" not in reply:
        return BARE
    tags = tuple(TAG_PATTERN.findall(reply))
    if not tags:
        return BARE
    before, *parts = TAG_PATTERN.split(reply)
    if tags == TAGS:
        thought, between, answer, after = parts
        if not is_empty(before + between + after):
            return "text outside of the tags"
        if is_empty(answer):
            return "empty <answer>"
        return EMPTY_THOUGHT if is_empty(thought) else WELL_FORMED
    if tags == (OPEN_THINK, CLOSE_THINK) and not is_empty(parts[1]):
        return EMPTY_THOUGHT if is_empty(before + parts[0]) else "no <answer>"
    count = Counter(tags)
    if count[OPEN_THINK] > count[CLOSE_THINK] or count[OPEN_ANSWER] > count[CLOSE_ANSWER]:
        return "cut"
    if count[OPEN_THINK] < count[CLOSE_THINK] or count[OPEN_ANSWER] < count[CLOSE_ANSWER]:
        return "not opened"
    if max(count.values()) > 1:
        return "tags repeated"
    if not count[OPEN_THINK]:
        return "no <think>"
    return "no <answer>" if not count[OPEN_ANSWER] else "<answer> before <think>"


@dataclass(frozen=True)
class Reading:
    """How records become documents; part of the token cache's fingerprint.

    kind: "text" or "chat" · thoughts: conversations are in the thinking format (text/chat.py; distill), and
    reasoning_content becomes a <think>; else it is left out ·
    split_documents: a text is split at control strings · keep_malformed_thoughts: replies of any shape are trained on.
    """

    kind: str
    thoughts: bool = False
    split_documents: bool = False
    keep_malformed_thoughts: bool = False

    @property
    def key(self) -> tuple:
        """What of it decides the tokens."""
        return ("text", self.split_documents) if self.kind == "text" else (
            "chat", self.thoughts, self.keep_malformed_thoughts)

    @classmethod
    def of(cls, args, kind: str, thoughts: bool = False) -> "Reading":
        """The reading that the flags of a stage ask for."""
        return cls(kind, thoughts, args.split_documents, getattr(args, "keep_malformed_thoughts", False))


class RecordReader:
    """Turns records of `parse_record` into documents, and counts in `found` what it met.

    found: name → number. Names that begin with "left out for" and "shortened for" count conversations, with "reply: "
    replies by the shape of their thought, with "key: " keys that are not read, with "spells: " documents that spell a
    control string.
    """

    def __init__(self, reading: Reading, control_strings: list[str]):
        self.reading, self.found = reading, Counter()
        own = "|".join(re.escape(name) for name in sorted(set(control_strings) - set(TAGS), key=len, reverse=True))
        self.control = re.compile(f"{own}|{CONTROL_STRING.pattern}" if own else CONTROL_STRING.pattern)
        self.control_or_tag = re.compile(f"{self.control.pattern}|{TAG_PATTERN.pattern}")

    def documents(self, record: dict) -> list[dict]:
        """The documents of a record: none, one, or several of a text that is split."""
        self._count_keys(record, KEYS[self.reading.kind])
        weight = {"weight": record["weight"]} if "weight" in record else {}
        if self.reading.kind == "text":
            return [{"text": text} | weight for text in self._texts(record["text"])]
        conversation = self._usable_turns(record["conversations"])
        return [{"conversations": conversation} | weight] if conversation else []

    def _texts(self, text: str) -> list[str]:
        spelled = set(self.control_or_tag.findall(text))
        texts = [text]
        if self.reading.split_documents and spelled - set(TAGS):
            texts = [part for part in self.control.split(text) if not is_empty(part)]
            self.found["split"] += len(texts) > 0
        elif spelled:
            self._count_spelled(spelled)
        if not texts or is_empty(texts[0]):
            self.found["empty"] += 1
            return []
        self.found["documents"] += len(texts)
        return texts

    def _usable_turns(self, conversation: list[dict]) -> list[dict]:
        """The turns before the first that nothing can be learned from; [] if there are none."""
        kept, end, reason, spelled = [], 0, None, set()
        for message in conversation:
            if message["role"] == "system" and is_empty(message["content"]):
                self.found["empty system messages"] += 1
                continue
            kept_message, trouble = self._message(message)
            reason = reason or trouble
            if reason:  # the rest is only counted
                continue
            kept.append(kept_message)
            of_user = message["role"] != "assistant"
            end = end if of_user else len(kept)
            spelled.update((self.control_or_tag if of_user else self.control).findall(kept_message["content"]))
        if not kept and not reason:
            self.found["empty"] += 1
        if reason:
            self.found[f"{'shortened' if end else 'left out'} for {reason}"] += 1
            kept = kept[:end]
        self.found["documents"] += bool(kept)
        if self.reading.thoughts:
            earlier = [m["content"] for m in kept if m["role"] == "assistant"][:-1]
            if n := sum(thought_shape(text) == WELL_FORMED for text in earlier):
                self.found["thoughts of earlier turns"] += n
        if kept and spelled:
            self._count_spelled(spelled)
        return kept

    def _message(self, message: dict) -> tuple[dict, str | None]:
        """A message with its role and content alone, and why nothing can be learned from its turn, or None."""
        role, content = message["role"], message.get("content")
        self._count_keys(message, MESSAGE_KEYS | ({"reasoning_content"} if role == "assistant" else set()))
        if role in TOOL_ROLES or calls_tool(message) and is_empty(content):
            return message, "a tool call"
        if role == "user" and is_empty(content):
            return message, "an empty question"
        if role == "assistant":
            if is_empty(content):
                self.found["reply: empty"] += 1
                return message, "an empty reply"
            thought = message.get("reasoning_content") or ""
            if not is_empty(thought):
                self.found["thoughts in reasoning_content"] += 1
                if self.reading.thoughts and not TAG_PATTERN.search(content):
                    content = f"{OPEN_THINK}\n{thought}\n{CLOSE_THINK}\n{OPEN_ANSWER}\n{content}\n{CLOSE_ANSWER}"
            shape = thought_shape(content)
            self.found[f"reply: {shape}"] += 1
            if shape not in GOOD_SHAPES and not self.reading.keep_malformed_thoughts:
                return message, "a malformed thought"
        return {"role": role, "content": content}, None

    def _count_spelled(self, strings: set[str]) -> None:
        self.found["spell control strings"] += 1
        for string in sorted(strings):
            self._count("spells", string)

    def _count_keys(self, record: dict, read: set[str]) -> None:
        for key in record.keys() - read:
            self._count("key", key)

    def _count(self, prefix: str, name: str) -> None:
        """Count one of the names under a prefix; names without end (ids as keys, say) are counted as others."""
        name = "".join(char if char.isprintable() else "?" for char in name[:40])  # it is printed
        known = f"{prefix}: {name}" in self.found or len(self.found) < MOST_NAMES
        self.found[f"{prefix}: {name if known else 'others'}"] += 1


def describe_found(found: dict[str, int], reading: Reading) -> list[str]:
    """Lines for the user that say what the records of one source hold."""
    def named(prefix: str, most: int = 8) -> str:
        counts = sorted(((n, name.removeprefix(prefix)) for name, n in found.items() if name.startswith(prefix)),
                        key=lambda each: (-each[0], each[1]))
        more = f", {len(counts) - most} more" if len(counts) > most else ""
        return ", ".join(f"{name} {n:,}" for n, name in counts[:most]) + more

    lines = []
    if reading.kind == "chat" and (replies := named("reply: ", 99)):
        lines.append(f"replies: {replies}")
        if n := found.get("thoughts in reasoning_content"):
            become = "become <think>…</think><answer>…</answer>" if reading.thoughts else "are left out in this stage"
            lines.append(f"{n:,} replies have a thought in reasoning_content: they {become}")
        if n := found.get("thoughts of earlier turns"):
            lines.append(f"{n:,} thoughts are not of the last turn: they become empty, as in a chat")
        malformed = sum(n for name, n in found.items() if name.endswith("for a malformed thought"))
        if malformed:
            lines.append(f"{malformed:,} conversations are cut before a malformed thought, or left out: from cut "
                         "thoughts a model learns to think without end (--keep_malformed_thoughts keeps them; "
                         "python -m text.convert adds a missing <answer>)")
    if n := found.get("empty system messages"):
        lines.append(f"{n:,} empty system messages left out")
    if n := found.get("spell control strings"):
        can_split = reading.kind == "text" and any(
            name.startswith("spells: ") and name.removeprefix("spells: ") not in TAGS for name in found)
        advice = ("--split_documents makes each part between them a document" if can_split else
                  "take them out of the data")
        lines.append(f"{n:,} of {found['documents']:,} documents spell control strings ({named('spells: ')}): they are "
                     f"learned as text, and the model may write them; {advice}")
    if n := found.get("split"):
        lines.append(f"{n:,} lines split at control strings; {found['documents']:,} documents in all")
    if keys := named("key: "):
        lines.append(f"keys that are not read: {keys}")
    return lines
