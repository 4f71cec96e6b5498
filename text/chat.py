"""The chat format: a conversation → ids, and for each id what it is.

    <s>user\\n…</s>\\n<s>assistant\\n…</s>\\n        after an optional <s>system\\n…</s>\\n
"""

import re
import weakref

from Config import UserError
from text.content import TAG_PATTERN
from text.records import ROLES, MalformedRecord, check_conversation
from text.tokenizer import TAGS, Encoded, TextEncoder

CHAT_TEMPLATE = (r"{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}"
                 r"{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")
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

    def encode(self, conversations: list[list[dict]]) -> list[Encoded]:
        """Many conversations at once, since one batch is encoded on all cores."""
        split = [self._split_content(m) for conversation in conversations for m in conversation]
        plain = iter(self.text.encode([text for message in split for text, type_ in message if type_ is not None]))
        encoded, messages = [], iter(split)
        for conversation in conversations:
            ids, types, replies = [], bytearray(), []  # a byte a token: a conversation may have millions
            for message in conversation:
                begin = len(ids)
                ids += self.headers[message["role"]]
                types += bytes([CONTEXT]) * (len(ids) - begin)
                for text, type_ in next(messages):
                    if type_ is None:
                        new_ids, new_types = self._encode_tagged(text)
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

    def _encode_tagged(self, text: str) -> tuple[list[int], bytearray]:
        """A reply whose tags are not all single ids: a token's type follows from where its characters stand."""
        type_of_char = bytearray([REPLY]) * len(text)
        for match in THINK_PATTERN.finditer(text):
            type_of_char[match.start(1):match.end(1)] = bytes([THINK]) * (match.end(1) - match.start(1))
        for match in TAG_PATTERN.finditer(text):
            type_of_char[match.start():match.end()] = bytes([TAG]) * (match.end() - match.start())
        ids, types = [], bytearray()
        parts, begin = [], 0
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


def encode_chat(tokenizer, conversations: list[dict],
                add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """Ids of a conversation and its loss mask: 1 on the assistant's content and its `</s>`, 0 elsewhere.

    `conversations` is the list of {"role", "content"} messages. With `add_generation_prompt` the ids end
    in the header of the reply to come. Raises UserError on a message that is not valid, a lone surrogate included.
    """
    try:
        check_conversation(conversations)
    except MalformedRecord as error:
        raise UserError(f"conversation refused: {error}") from None
    encoder = ChatEncoder.of(tokenizer)
    encoded = encoder.encode([conversations])[0]
    ids, mask = encoded.ids, [int(type_ != CONTEXT) for type_ in encoded.types]
    if add_generation_prompt:
        header = encoder.headers["assistant"]
        ids, mask = ids + header, mask + [0] * len(header)
    return ids, mask
