"""Records of other people's data: the shapes that are known, and what each becomes in our form.

Text is taken as it stands. What our form cannot express is left out and counted.
"""

import ast
import contextlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from text.records import ROLES, MalformedRecord, check_conversation, check_text, unique_keys

# ---------------------------------------------------------------------------------------------
# words and keys


ROLE_OF = {word: role for role, words in {
    "system": "system developer 系统",
    "user": "user human prompter 用户 人类 提问者",
    "assistant": "assistant gpt chatgpt bot model ai claude 助手 助理 机器人",
    "tool": "tool function function_call observation tool_call tool_response tool_result 工具",
}.items() for word in words.split()}
USER_KEYS = ("instruction", "prompt", "query", "question", "input", "human", "user")
REPLY_KEYS = ("output", "response", "completion", "target", "reply", "answer", "assistant", "bot", "gpt")
TURN_OF = ROLE_OF | dict.fromkeys(USER_KEYS, "user") | dict.fromkeys(REPLY_KEYS, "assistant")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "cot", "complex_cot", "chain_of_thought")
SPEAKER_KEYS = ("role", "from", "sender", "speaker")
CONTENT_KEYS = ("content", "value", "text", "message")
CHAT_KEYS = ("conversations", "messages", "conversation", "dialogue", "dialog", "dialogues", "turns", "chat")
TEXT_KEYS = ("text", "content", "article", "body", "raw_content", "document", "passage", "paragraphs")
LIST_KEYS = {*CHAT_KEYS, "history", "chosen", "rejected"}  # in a CSV cell they are JSON or Python
IN_ENGLISH = {"问题": "question", "提问": "question", "回答": "response", "回复": "response", "答案": "answer",
              "指令": "instruction", "输入": "input", "输出": "output", "标题": "title", "内容": "content",
              "正文": "content", "文本": "text", "段落": "paragraphs", "对话": "conversation", "角色": "role",
              "用户": "user", "助手": "assistant"}
NO_ANSWER = re.compile(r"[\s。.!?,;:、！？，；：．…]*")  # evaluate.py refuses such answers
CUT = "conversations end before their first tool call, tool result or image"


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=lambda _: None)  # pandas' NaN: no value


def parse_value(text: str):
    """The value of JSON or of a Python literal, or a MalformedRecord."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        if (text[:1] + text[-1:]) in ("[]", "{}") and "'" in text:
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about "\d" and the like
                return ast.literal_eval(text)
        return error if isinstance(error, MalformedRecord) else MalformedRecord(f"not JSON: {error}")


def _plain_keys(record: dict) -> dict:
    """The record with its keys in lower case and in English."""
    plain = {}
    for key, value in record.items():
        key = str(key).strip().lower()
        key = IN_ENGLISH.get(key, key)
        if key in LIST_KEYS and isinstance(value, str) and value.startswith("["):
            value = parse_value(value)
        plain.setdefault(key, value)
    return plain


def _first(record: dict, keys: tuple[str, ...]):
    """The first value under one of the keys that is not empty, or None."""
    return next((record[key] for key in keys if record.get(key) not in (None, "", [])), None)


def _text(value) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    check_text(value, "a text")
    return value


def _add_answer_tags(reply: str) -> str:
    """<think>…</think>… as DeepSeek has it, with the <answer> of our form; any other reply as it is."""
    if reply.lstrip().startswith("<think>") and "<answer>" not in reply and "</answer>" not in reply:
        thought, _, answer = reply.lstrip().removeprefix("<think>").partition("</think>")
        if thought.strip() and answer.strip() and not re.search("</?think>", thought + answer):
            return f"<think>\n{thought.strip()}\n</think>\n<answer>\n{answer.strip()}\n</answer>"
    return reply


def _message(item: dict) -> dict | None:
    """A message in our form; None for a tool call, a tool result and an image, which it cannot express."""
    speaker, thought = _first(item, SPEAKER_KEYS), _first(item, THOUGHT_KEYS)
    role = ROLE_OF.get(str(speaker).strip().lower())
    if role is None:
        raise MalformedRecord(f"unknown role {speaker!r:.40}")
    if role == "tool" or item.get("tool_calls") or item.get("function_call"):
        return None
    content = next((item[key] for key in CONTENT_KEYS if item.get(key) not in (None, [])), None)
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = "text" if isinstance(part, str) else part.get("type")
            if kind == "thinking":
                thought = thought or part["thinking"]
            elif kind in ("text", "input_text", "output_text"):
                texts.append(part if isinstance(part, str) else part["text"])
            else:
                return None
        content = "".join(texts)
    content = _text(content)
    if role != "assistant":
        return {"role": role, "content": content}
    message = {"role": role, "content": _add_answer_tags(content)}
    return message | {"reasoning_content": thought} if isinstance(thought, str) and thought.strip() else message


def is_message(value) -> bool:
    """True for an object that says who speaks."""
    return isinstance(value, dict) and _first(_plain_keys(value), SPEAKER_KEYS) is not None


def _messages(items: list, notes: Counter) -> list[dict]:
    """The messages of a list of messages, of texts or pairs that take turns, or of objects with a turn each."""
    if not isinstance(items, (list, tuple)):
        raise MalformedRecord("its turns are not a list")
    messages = []
    for index, item in enumerate(items):
        if isinstance(item, str):
            turn = [(ROLES[1 + index % 2], item)]
        elif isinstance(item, (list, tuple)):
            if len(item) != 2:
                raise MalformedRecord(f"turn {index + 1} is a list of {len(item)}, not of question and reply")
            turn = [*zip(ROLES[1:], item, strict=True)]
        else:
            item = _plain_keys(item)
            turn = None if is_message(item) else sorted(
                ((TURN_OF[key], value) for key, value in item.items() if key in TURN_OF and value is not None),
                key=lambda each: [*ROLES, "tool"].index(each[0]))
        new = [_message(item)] if turn is None else [_message({"role": role, "content": text}) for role, text in turn]
        if not new:
            raise MalformedRecord(f"message {index + 1} has no role")
        if None in new:
            notes[CUT] += 1
            while messages and messages[-1]["role"] != "assistant":
                messages.pop()
            break
        messages += new
    return messages


def _chat(record: dict, messages: list[dict], notes: Counter) -> dict:
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    system = _first(record, ("system", "system_prompt"))
    if system and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(system)}, *messages]
    for role, name in (("user", "question"), ("assistant", "reply")):
        if not any(m["role"] == role and m["content"].strip() for m in messages):
            raise MalformedRecord(f"no {name}" + (" before a tool call, tool result or image" if notes[CUT] else ""))
    check_conversation(messages)
    weight = record.get("weight")
    return {"conversations": messages} | ({"weight": weight} if isinstance(weight, (int, float)) else {})


# ---------------------------------------------------------------------------------------------
# converters, each (record with plain keys, notes) → a record of ours


def _from_list(key: str):
    return lambda record, notes: _chat(record, _messages(record[key], notes), notes)


def _asked(record: dict, key: str, notes: Counter) -> list[dict]:
    """What stands before a reply: the history and the question under `key`."""
    messages, question = _messages(record.get("history") or [], notes), record[key]
    if notes[CUT]:
        return messages
    if isinstance(question, list):
        return messages + _messages(question, notes)
    more = [record.get(other) for other in ("input", "context")] if key in ("instruction", "prompt") else []
    return [*messages, {"role": "user", "content": "\n".join(_text(part) for part in [question, *more] if part)}]


def _reply(record: dict, key: str, notes: Counter) -> list[dict]:
    reply = record[key]
    if isinstance(reply, (list, dict)):
        return _messages(reply if isinstance(reply, list) else [reply], notes)
    thought = {name: record[name] for name in THOUGHT_KEYS if name in record}
    return [_message({"role": "assistant", "content": _text(reply)} | thought)]


def _from_pair(user: str, assistant: str):
    def convert(record: dict, notes: Counter) -> dict:
        if record.get("label") is False:  # KTO
            raise MalformedRecord('"label" is false: a reply to avoid')
        messages = _asked(record, user, notes)
        return _chat(record, messages if notes[CUT] else messages + _reply(record, assistant, notes), notes)
    return convert


def _from_preference(record: dict, notes: Counter) -> dict:
    notes["rejected replies are left out"] += 1
    chosen = record["chosen"]
    if isinstance(chosen, str) and chosen.lstrip().startswith("Human:"):  # Anthropic's, one text
        texts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + chosen.lstrip())[1:]
        record = record | {"chosen": [{"role": "user" if who == "Human" else "assistant", "content": text}
                                      for who, text in zip(texts[::2], texts[1::2], strict=True)]}
    reply = _reply(record, "chosen", notes)
    key = next((key for key in (*CHAT_KEYS, *USER_KEYS) if record.get(key)), None)
    whole = key is None or any(message["role"] == "user" for message in reply)
    return _chat(record, reply if whole else _asked(record, key, notes) + reply, notes)


def _from_problem(record: dict, notes: Counter) -> dict:
    """A chat with the solution, and beside it the question and answer, so that evaluate.py can score it too."""
    has_answer = record.get("answer") is not None and not NO_ANSWER.fullmatch(_text(record["answer"]))
    question = {"question": _text(record["problem"]), "answer": _text(record["answer"])} if has_answer else {}
    if not has_answer or _first(record, ("solution",)):
        question |= _from_pair("problem", "solution")(record, notes)
    return question


def _from_chatgpt(record: dict, notes: Counter) -> dict:
    """The branch of a ChatGPT export that its user saw last."""
    nodes, items = record["mapping"], []
    node = nodes.get(record.get("current_node") or [*nodes][-1])
    while node and len(items) < len(nodes):
        items.append(node.get("message") or {})
        node = nodes.get(node.get("parent"))
    messages = []
    for item in reversed(items):
        content = item.get("content") or {}
        kind, parts = content.get("content_type"), content.get("parts") or []
        hidden = (item.get("metadata") or {}).get("is_visually_hidden_from_conversation")
        called = item.get("recipient") not in (None, "all") or kind == "code"
        if kind in ("thoughts", "reasoning_recap"):
            notes[f"messages of type {kind} are left out"] += 1
        elif called or (parts != [""] and parts and not hidden):
            messages.append({"role": "tool" if called else item["author"]["role"], "content": parts})
    return _chat(record, _messages(messages, notes), notes)


def _from_text(key: str):
    def convert(record: dict, notes: Counter) -> dict:
        text, title = record[key], record.get("title")
        if isinstance(text, list):
            lines = [part if isinstance(part, str) else _first(_plain_keys(part), CONTENT_KEYS) for part in text]
            text = "\n".join(_text(line) for line in lines if line)
        text = _text(text)
        is_new = title and text.partition("\n")[0].strip() != _text(title).strip()
        return {"text": f"{title}\n{text}" if is_new else text}
    return convert


# ---------------------------------------------------------------------------------------------
# the table


class Shape(NamedTuple):
    name: str  # for the user
    fits: Callable[[dict], bool]  # of a record with plain keys
    convert: Callable[[dict, Counter], dict]  # may count in the notes what it leaves out


def _has(*keys: str) -> Callable[[dict], bool]:
    return lambda record: all(record.get(key) is not None for key in keys)


def _has_list(key: str, inner: str = "") -> Callable[[dict], bool]:
    """True for a list under `key`, of objects that have `inner` if it is given."""
    return lambda record: isinstance(record.get(key), list) and bool(record[key]) and (
        not inner or isinstance(record[key][0], dict) and inner in record[key][0])


PAIR_NAMES = {("instruction", "output"): "Alpaca data", ("prompt", "completion"): "old OpenAI fine-tuning data",
              ("query", "response"): "ms-swift data", ("input", "target"): "Firefly data"}
OWN = ("chat", "question", "text")
SHAPES = [
    Shape('DPO data ("chosen")', _has("chosen"), _from_preference),
    Shape('OpenAI fine-tuning data ("messages")', _has_list("messages"), _from_list("messages")),
    Shape('ShareGPT data ("conversations" of "from" and "value")', _has_list("conversations", "from"),
          _from_list("conversations")),
    *(Shape(f'chats with other roles, keys or thoughts ("{key}")', _has_list(key), _from_list(key))
      for key in CHAT_KEYS),
    Shape('a ChatGPT export ("mapping")', lambda record: isinstance(record.get("mapping"), dict), _from_chatgpt),
    Shape('a Claude export ("chat_messages")', _has_list("chat_messages"), _from_list("chat_messages")),
    *(Shape(f'mathematics problems ("problem", "{key}")', _has("problem", key), _from_problem)
      for key in ("solution", "answer")),
    Shape("questions and answers under other keys", _has("question", "answer"), lambda record, notes: {
        key: _text(record[key]) for key in ("question", "answer")}),
    *(Shape(f'{PAIR_NAMES.get((user, reply), "pairs of question and reply")} ("{user}", "{reply}")', _has(user, reply),
            _from_pair(user, reply)) for user in USER_KEYS for reply in REPLY_KEYS),
    Shape('replies with thoughts ("input", "content", "reasoning_content")', _has(
        "input", "content", "reasoning_content"), _from_pair("input", "content")),
    *(Shape(f'text under another key ("{key}")', lambda record, key=key: record.get(key) is not None and not any(
        str(record.get(name)).lower() in ROLE_OF for name in SPEAKER_KEYS), _from_text(key)) for key in TEXT_KEYS),
]


def _own_kind(record: dict) -> str | None:
    """The kind of a record that the project reads as it is."""
    conversation = record.get("conversations")
    if conversation and isinstance(conversation, list):
        try:
            check_conversation([m | {} if isinstance(m, dict) else m for m in conversation], with_tools=True)
        except MalformedRecord:
            return None
        replies = [m for m in conversation if m["role"] == "assistant"]
        is_other = _first(record, ("system",)) or any(
            _first(m, THOUGHT_KEYS[1:]) or _add_answer_tags(m.get("content") or "") != (m.get("content") or "")
            for m in replies)
        return None if is_other else "chat"
    if isinstance(record.get("question"), str) and (
            isinstance(record.get("answer"), (str, int, float)) or record.get("decline") is True):
        return "question"
    is_text = isinstance(record.get("text"), str) and not {"instruction", "output"} <= record.keys()
    return "text" if is_text else None


def _find_shape(record: dict) -> tuple[Shape | None, dict]:
    plain = _plain_keys(record)
    return next((shape for shape in SHAPES if shape.fits(plain)), None), plain


def shape_of(record: dict) -> str | None:
    """The name of a record's shape: one of OWN if the project reads it as it is, else of one in SHAPES, or None."""
    if kind := _own_kind(record):
        return kind
    shape = _find_shape(record)[0]
    return shape.name if shape else None


def convert_record(record: dict, notes: Counter | None = None) -> dict:
    """A record in our form; one that is in it already is returned as it is. `notes` counts what was left out of it.

    Raises MalformedRecord with the reason.
    """
    if _own_kind(record):
        return record
    shape, plain = _find_shape(record)
    if shape is None:
        more = ", …" if len(record) > 5 else ""
        raise MalformedRecord(f"no known shape: {', '.join(f'{key!r:.40}' for key in [*record][:5])}{more}")
    left_out = Counter()
    try:
        converted = shape.convert(plain, left_out)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # a record of others can hold anything
        raise MalformedRecord(f"unusual {shape.name}: {type(error).__name__}: {error}") from None
    if notes is not None:
        notes.update(left_out)
    return converted
