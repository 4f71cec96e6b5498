"""The chat format: a conversation → ids, and for each id what it is.

    <s>user\\n…</s>\\n<s>assistant\\n…</s>\\n        after an optional <s>system\\n…</s>\\n

This is the format of the stages before distillation. In distillation's, the thinking format, the last reply thinks or
stands behind an empty thought, which has no loss:

    <s>assistant\\n<think>\\n…\\n</think>\\n<answer>…</answer></s>\\n
    <s>assistant\\n<think>\\n\\n</think>\\n…</s>\\n

Of an earlier reply that thought only the answer is left, behind an empty thought. The prompt for a reply ends in
`<think>`, or in an empty thought where thinking is switched off.
"""

import re
import weakref

from Config import UserError
from text.content import CLOSE_ANSWER, CLOSE_THINK, OPEN_ANSWER, OPEN_THINK, TAG_PATTERN
from text.records import ROLES, MalformedRecord, check_conversation
from text.tokenizer import TAGS, Encoded, TextEncoder

EMPTY_THOUGHT = f"{OPEN_THINK}\n\n{CLOSE_THINK}\n"
# Parts of chat templates: where the last reply is, and a reply with a thought, which only the last one keeps.
FIND_LAST_REPLY = (
    r"{% set ns = namespace(last=-1) %}"
    r"{% for message in messages %}{% if message['role'] == 'assistant' and not add_generation_prompt %}"
    r"{% set ns.last = loop.index0 %}{% endif %}{% endfor %}")
KEEP_OR_EMPTY_THOUGHT = (
    r"{% elif loop.index0 == ns.last or "
    r"'</think>' in text and not text.split('<think>')[1].split('</think>')[0].strip() %}{{ text }}"
    r"{% else %}{% set rest = text.split('</think>')[-1] if '</think>' in text else text.split('<think>')[0] %}"
    r"{{ '<think>\n\n</think>\n' + "
    r"rest.replace('<think>', '').replace('<answer>', '').replace('</answer>', '').strip() }}{% endif %}"
    r"{{ '</s>\n' }}{% endfor %}")
# The same formats for other programs: the thinking format is used where enable_thinking is true or false. The ids are
# the same for tokenizers with the tags. Without them (train_tokenizer.py --no_think_tokens) the ids of a given thought
# may differ: a prompt ends in <think>, so training splits there too, but a template's ">\n" can become one token.
CHAT_TEMPLATE = (
    r"{% set thinks = enable_thinking is defined and enable_thinking is not none %}" + FIND_LAST_REPLY +
    r"{% for message in messages %}{% set text = message['content'] %}{{ '<s>' + message['role'] + '\n' }}"
    r"{% if not thinks or message['role'] != 'assistant' %}{{ text }}"
    r"{% elif '<think>' not in text %}{{ '<think>\n\n</think>\n' + text }}" + KEEP_OR_EMPTY_THOUGHT +
    r"{% if add_generation_prompt %}{{ '<s>assistant\n' }}"
    r"{% if thinks %}{{ '<think>' if enable_thinking else '<think>\n\n</think>\n' }}{% endif %}{% endif %}")
THINK_PATTERN = re.compile(r"<think>(.*?)</think>", re.DOTALL)

# token types: a step gives each its loss weight, so that is no part of the token cache
CONTEXT, REPLY, TAG, THINK = range(4)


class ChatEncoder:
    """Turns conversations into ids and token types. The ids of headers, `</s>` and tags are inserted by the
    program; the content of a message is encoded apart, so that it can never become one of them."""

    _made = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, tokenizer) -> "ChatEncoder":
        """The encoder of a tokenizer, made once."""
        if tokenizer not in cls._made:
            cls._made[tokenizer] = cls(TextEncoder.of(tokenizer))
        return cls._made[tokenizer]

    def __init__(self, encoder: TextEncoder):
        self.text = encoder
        self.newline, *headers = encoder.encode(["\n", *(f"{role}\n" for role in ROLES)])
        self.headers = {role: [encoder.bos_id, *ids] for role, ids in zip(ROLES, headers, strict=True)}
        self.opened_thought, self.empty_thought = (self._encode_tagged(text)[0] for text in (OPEN_THINK, EMPTY_THOUGHT))

    def prompt(self, thinking: bool | None = None) -> list[int]:
        """The ids that a reply to come begins with: the header, and in the thinking format `<think>` or an empty
        thought."""
        opened = [] if thinking is None else self.opened_thought if thinking else self.empty_thought
        return self.headers["assistant"] + opened

    def encode(self, conversations: list[list[dict]], thinking: bool = False, continued: bool = False) -> list[Encoded]:
        """Many conversations at once, since one batch is encoded on all cores.

        `thinking`: in the thinking format; `continued`: another reply is to come, so every thought is an earlier one.
        """
        prefixed = [[] for _ in conversations]
        if thinking:
            conversations, prefixed = zip(*[in_thinking_format(c, continued) for c in conversations], strict=True)
        split = [self._split_content(m) for conversation in conversations for m in conversation]
        plain = iter(self.text.encode([text for message in split for text, type_ in message if type_ is not None]))
        encoded, messages = [], iter(split)
        for conversation, behind_empty_thought in zip(conversations, prefixed, strict=True):
            ids, types, replies = [], bytearray(), []  # a byte a token: a conversation may have millions
            for index, message in enumerate(conversation):
                begin = len(ids)
                ids += self.headers[message["role"]]
                if index in behind_empty_thought:
                    ids += self.empty_thought
                types += bytes([CONTEXT]) * (len(ids) - begin)
                for text, type_ in next(messages):
                    if type_ is None:
                        new_ids, new_types = self._encode_tagged(text, apart=len(OPEN_THINK) * (
                            thinking and text.startswith(OPEN_THINK)))
                    elif type_ == TAG and text in self.text.tag_ids:
                        next(plain)
                        new_ids, new_types = [self.text.tag_ids[text]], bytes([TAG])
                    else:
                        new_ids = next(plain)
                        new_types = bytes([type_]) * len(new_ids)
                    ids += new_ids
                    types += new_types
                answered = message["role"] == "assistant"
                ids += [self.text.eos_id, *self.newline]
                types += bytes([REPLY if answered else CONTEXT]) + bytes([CONTEXT]) * len(self.newline)
                if answered:
                    targets = len(types) - begin - types.count(CONTEXT, begin)
                    replies.append((len(ids), targets, len(message["content"].encode("utf-8"))))
            encoded.append(Encoded(ids, types, replies))
        return encoded

    def _split_content(self, message: dict) -> list[tuple[str, int | None]]:
        """A message's content as (text, token type) to be encoded apart; type None: it holds tags as ordinary text."""
        text = message["content"]
        if message["role"] != "assistant":
            return [(text, CONTEXT)]
        present = [match.span() for match in TAG_PATTERN.finditer(text)]
        if not present:
            return [(text, REPLY)]
        if len(self.text.tag_ids) < len(TAGS):
            return [(text, None)]
        split, begin = [], 0
        thoughts = [match.span(1) for match in THINK_PATTERN.finditer(text)]
        for start, end in [*present, (len(text), len(text))]:
            if start > begin:
                thinking = any(a <= begin < b for a, b in thoughts)
                split.append((text[begin:start], THINK if thinking else REPLY))
            if end > start:
                split.append((text[start:end], TAG))
            begin = end
        return split

    def _encode_tagged(self, text: str, apart: int = 0) -> tuple[list[int], bytearray]:
        """A reply whose tags are not all single ids: a token's type follows from where its characters stand. The first
        `apart` characters are encoded by themselves, as where a prompt ends in them."""
        type_of_char = bytearray([REPLY]) * len(text)
        for match in THINK_PATTERN.finditer(text):
            type_of_char[match.start(1):match.end(1)] = bytes([THINK]) * (match.end(1) - match.start(1))
        for match in TAG_PATTERN.finditer(text):
            type_of_char[match.start():match.end()] = bytes([TAG]) * (match.end() - match.start())
        ids, types = [], bytearray()
        parts, begin = [], 0
        if apart and text[:apart] not in self.text.tag_ids:
            parts, begin = [(0, apart, None)], apart
        for match in TAG_PATTERN.finditer(text):  # some of the four tags may be single ids
            if match.group() in self.text.tag_ids:
                parts += [(begin, match.start(), None), (match.start(), match.end(), self.text.tag_ids[match.group()])]
                begin = match.end()
        for start, end, tag_id in [*parts, (begin, len(text), None)]:
            if tag_id is not None:
                ids.append(tag_id)
                types.append(TAG)
            elif end > start:
                for token, a, b in self.text.encode_with_offsets(text[start:end]):
                    covered = type_of_char[start + a:max(start + b, start + a + 1)]
                    ids.append(token)
                    types.append(TAG if TAG in covered else covered[0] if covered else REPLY)
        return ids, types


def in_thinking_format(conversation: list[dict], continued: bool) -> tuple[list[dict], set[int]]:
    """A conversation in which only the last reply keeps its thought (none where it is `continued`), and the indices of
    the replies that stand behind an empty thought. A reply that spells an empty thought itself is left as it is."""
    replies = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
    conversation, behind_empty_thought = list(conversation), set()
    for index in replies:
        text = conversation[index]["content"]
        if OPEN_THINK in text:
            if index == replies[-1] and not continued or not thinks(text):
                continue
            conversation[index] = conversation[index] | {"content": without_thought(text)}
        behind_empty_thought.add(index)
    return conversation, behind_empty_thought


def thinks(reply: str) -> bool:
    """True if a reply has a thought that is not empty."""
    if OPEN_THINK not in reply:
        return False
    return CLOSE_THINK not in reply or bool(reply.split(OPEN_THINK)[1].split(CLOSE_THINK)[0].strip())


def without_thought(reply: str) -> str:
    """The answer of a reply that thought: what follows the thought, without tags; of a reply cut inside it, what stands
    before it."""
    rest = reply.split(CLOSE_THINK)[-1] if CLOSE_THINK in reply else reply.split(OPEN_THINK)[0]
    return rest.replace(OPEN_THINK, "").replace(OPEN_ANSWER, "").replace(CLOSE_ANSWER, "").strip()


def encode_chat(tokenizer, conversations: list[dict], add_generation_prompt: bool = False,
                thinking: bool | None = None) -> tuple[list[int], list[int]]:
    """Ids of a conversation and its loss mask: 1 on the assistant's content and its `</s>`, 0 elsewhere.

    `conversations` is the list of {"role", "content"} messages. With `add_generation_prompt` the ids end in the prompt
    of the reply to come. `thinking` None is the format of the stages without thoughts; True and False are the thinking
    format, whose prompt ends in `<think>` or in an empty thought. Raises UserError on a message that is not valid, a
    lone surrogate included.
    """
    try:
        check_conversation(conversations)
    except MalformedRecord as error:
        raise UserError(f"conversation refused: {error}") from None
    encoder = ChatEncoder.of(tokenizer)
    encoded = encoder.encode([conversations], thinking is not None, add_generation_prompt)[0]
    ids, mask = encoded.ids, [int(type_ != CONTEXT) for type_ in encoded.types]
    if add_generation_prompt:
        prompt = encoder.prompt(thinking)
        ids, mask = ids + prompt, mask + [0] * len(prompt)
    return ids, mask
