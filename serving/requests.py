"""What clients send: JSON → checked values, each wrong one refused in OpenAI's words. Unknown fields are ignored, and
null is the same as a field that is not there."""

import dataclasses
import math
from dataclasses import dataclass

from common.generation import Sampling
from serving.errors import ApiError
from text.chat import without_thought
from text.content import TAG_PATTERN, is_empty
from text.records import MalformedRecord, check_text, parse_object

DEFAULT = Sampling(0.7, 0.9)  # as in eval_model.py
MOST_STOPS, LONGEST_STOP = 4, 1000  # characters
MOST_NESTED = 8  # each takes a pass over a text
NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", dict: "an object", list: "an array"}
TOOLS = "tools are not supported: this model was not trained to call them"


@dataclass(frozen=True)
class Request:
    """What both kinds of request name."""

    model: str | None
    stream: bool
    include_usage: bool
    max_tokens: int | None
    stop: tuple[str, ...]
    sampling: Sampling
    seed: int | None


@dataclass(frozen=True)
class ChatRequest(Request):
    """A request for a reply in a conversation."""

    messages: list[dict]
    thinking: bool


@dataclass(frozen=True)
class CompletionRequest(Request):
    """A request to continue a text."""

    prompt: str


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request whose field `param` is wrong."""
    return ApiError(400, f"{param}: {message}" if param else message, param, code)


def read_object(body: bytes) -> dict:
    """The object in a body. Raises ApiError on anything that is not strict JSON."""
    try:
        return parse_object(body)
    except MalformedRecord as error:
        raise wrong(f"the body must be one JSON object: {error}", code="invalid_json") from None


def field(content: dict, name: str, kind: type, default=None, low: float = -math.inf, high: float = math.inf,
          within: str = ""):
    """The value of a field of type `kind` between `low` and `high`; `default` where it is absent or null."""
    value, param = content.get(name), within + name
    if value is None:
        return default
    fits = (int, float) if kind is float else kind
    if not isinstance(value, fits) or isinstance(value, bool) and kind is not bool:
        raise wrong(f"must be {NAMES[kind]}", param, "invalid_type")
    if kind in (int, float) and not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise wrong(f"must be {limits}", param, "invalid_value")
    if kind is str:
        well_formed(value, param)
    return value


def well_formed(text: str, param: str) -> str:
    """`text`, if it is text. Raises ApiError on a lone surrogate."""
    try:
        check_text(text, "the string")
    except MalformedRecord as error:
        raise wrong(str(error), param, "invalid_value") from None
    return text


# ---------------------------------------------------------------------------------------------
# both kinds of request


def read_request(content: dict) -> Request:
    """The fields that both kinds have."""
    if field(content, "n", int, 1) != 1:
        raise wrong("only 1 is supported", "n", "invalid_value")
    options = field(content, "stream_options", dict, {})
    seed = field(content, "seed", int)
    newer = field(content, "max_completion_tokens", int, low=1)
    older = field(content, "max_tokens", int, low=1)
    return Request(
        field(content, "model", str), field(content, "stream", bool, False),
        field(options, "include_usage", bool, False, within="stream_options."), older if newer is None else newer,
        read_stops(content.get("stop")), read_sampling(content), None if seed is None else seed % 2**63)


def read_stops(value) -> tuple[str, ...]:
    """The stop strings: one, or a list of up to four."""
    if value is None:
        return ()
    if not isinstance(value, (str, list)):
        raise wrong("must be a string or an array of strings", "stop", "invalid_type")
    stops = [value] if isinstance(value, str) else value
    if len(stops) > MOST_STOPS:
        raise wrong(f"must have at most {MOST_STOPS} strings", "stop", "invalid_value")
    for index, stop in enumerate(stops):
        param = f"stop[{index}]" if isinstance(value, list) else "stop"
        if not isinstance(stop, str):
            raise wrong("must be a string", param, "invalid_type")
        if not 0 < len(well_formed(stop, param)) <= LONGEST_STOP:
            raise wrong(f"must have 1 to {LONGEST_STOP:,} characters", param, "invalid_value")
    return tuple(stops)


def read_sampling(content: dict) -> Sampling:
    """How tokens are chosen; a top_p of 0 is greedy."""
    temperature = field(content, "temperature", float, DEFAULT.temperature, 0, 2)
    top_p = field(content, "top_p", float, DEFAULT.top_p, 0, 1)
    top_k = field(content, "top_k", int, DEFAULT.top_k, -1)  # -1 is off, as in vLLM
    penalty = field(content, "repetition_penalty", float, DEFAULT.repetition_penalty, 0.01, 100)
    if top_p < 1e-6:
        temperature, top_p = 0, 1
    return Sampling(float(temperature), float(top_p), min(max(top_k, 0), 2**31), float(penalty))


# ---------------------------------------------------------------------------------------------
# conversations


def read_chat(content: dict) -> ChatRequest:
    """A body of /v1/chat/completions."""
    common = read_request(content)
    options = field(content, "chat_template_kwargs", dict, {})
    effort = field(content, "reasoning_effort", str)
    thinking = field(content, "enable_thinking", bool, effort != "none")  # where other servers look for it, too
    thinking = field(options, "enable_thinking", bool, thinking, within="chat_template_kwargs.")
    return ChatRequest(**_fields(common), messages=read_messages(content.get("messages")), thinking=thinking)


def _fields(request: Request) -> dict:
    return {each.name: getattr(request, each.name) for each in dataclasses.fields(request)}


def read_messages(value) -> list[dict]:
    """The conversation: an optional system message first, and a user's message last."""
    if not isinstance(value, list):
        raise wrong("must be an array of messages", "messages", "invalid_type")
    if not value:
        raise wrong("must not be empty", "messages", "invalid_value")
    messages = [read_message(message, index) for index, message in enumerate(value)]
    if messages[-1]["role"] != "user":
        raise wrong("the last message must be the user's", "messages", "invalid_value")
    if messages[0]["role"] == "system" and is_empty(messages[0]["content"]):
        messages = messages[1:]
    return messages


def read_message(message, index: int) -> dict:
    """A message with a role of ours and its text. Of a reply that thought only the answer is left."""
    param = f"messages[{index}]"
    if not isinstance(message, dict):
        raise wrong("must be an object", param, "invalid_type")
    role = field(message, "role", str, within=f"{param}.")
    role = "system" if role == "developer" else role
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise wrong(TOOLS, param, "unsupported")
    if role not in ("system", "user", "assistant"):
        raise wrong("must be one of system, developer, user, assistant", f"{param}.role", "invalid_value")
    if role == "system" and index:
        raise wrong("a system message may only come first", param, "invalid_value")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""  # a reply that was cut in its thought
    text = read_content(content, f"{param}.content")
    nested = 0
    while role == "assistant" and TAG_PATTERN.search(text):  # again, as what is taken out may join the parts of another
        if nested == MOST_NESTED:
            raise wrong(f"tags are nested more than {MOST_NESTED} deep", f"{param}.content", "invalid_value")
        text, nested = without_thought(text), nested + 1
    return {"role": role, "content": text}


def read_content(content, param: str) -> str:
    """The text of a message: a string, or a list of text parts, joined by line breaks as vLLM and llama.cpp do."""
    if isinstance(content, str):
        return well_formed(content, param)
    if not isinstance(content, list):
        raise wrong("must be a string or an array of text parts", param, "invalid_type")
    texts = []
    for index, part in enumerate(content):
        name = f"{param}[{index}]"
        if not isinstance(part, dict):
            raise wrong("must be an object", name, "invalid_type")
        if part.get("type") != "text":
            raise wrong("only text is supported: the type must be \"text\"", f"{name}.type", "unsupported")
        if not isinstance(part.get("text"), str):
            raise wrong("must be a string", f"{name}.text", "invalid_type")
        texts.append(well_formed(part["text"], f"{name}.text"))
    return "\n".join(texts)


# ---------------------------------------------------------------------------------------------
# texts


def read_completion(content: dict) -> CompletionRequest:
    """A body of /v1/completions."""
    common, prompt = read_request(content), content.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise wrong("must be a string (one prompt; token ids are not supported)", "prompt", "invalid_type")
    if field(content, "echo", bool, False):
        raise wrong("only false is supported", "echo", "invalid_value")
    return CompletionRequest(**_fields(common), prompt=well_formed(prompt, "prompt"))
