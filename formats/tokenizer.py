"""The tokenizer as other programs need it.

Two things change. `<answer>` and `</answer>` become control tokens, which other programs hide; `<think>` and `</think>`
stay text, because programs look for them to show a thought apart. And the chat template is that of the weights' stage:
other programs do not know which of the two chat formats the weights learned.
"""

import json

from text.chat import CHAT_TEMPLATE, FIND_LAST_REPLY, KEEP_OR_EMPTY_THOUGHT
from text.content import CLOSE_ANSWER, OPEN_ANSWER
from text.tokenizer import FILES, OurTokenizer, TextEncoder, tokenizer_from_files

ANSWER_TAGS = (OPEN_ANSWER, CLOSE_ANSWER)
# text/chat.py's format for weights that do not think. It has no branch on enable_thinking: llama.cpp's server takes a
# template with one for a model that thinks, and sets it to true.
PLAIN_TEMPLATE = (
    r"{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")
# Distill's thinking format, on unless enable_thinking is false. The thought of the last reply stands in its content or
# in reasoning_content (text/content.py); that of an earlier reply is replaced by an empty one, which also stands before
# a reply without one.
THINKING_TEMPLATE = (
    FIND_LAST_REPLY +
    r"{% for message in messages %}{% set text = message['content'] or '' %}{{ '<s>' + message['role'] + '\n' }}"
    r"{% if message['role'] != 'assistant' %}{{ text }}"
    r"{% elif '<think>' not in text %}"
    r"{% if loop.index0 == ns.last and message.reasoning_content and '<answer>' not in text %}"
    r"{{ '<think>\n' + message.reasoning_content + '\n</think>\n<answer>\n' + text + '\n</answer>' }}"
    r"{% else %}{{ '<think>\n\n</think>\n' + text }}{% endif %}" + KEEP_OR_EMPTY_THOUGHT +
    r"{% if add_generation_prompt %}{{ '<s>assistant\n' }}"
    r"{{ '<think>\n\n</think>\n' if enable_thinking is defined and enable_thinking is false else '<think>' }}"
    r"{% endif %}")


def control_tokens(files: dict[str, str]) -> tuple[str, str]:
    """The strings of the tokens that begin and end a turn: `<s>` and `</s>` in a tokenizer of train_tokenizer.py."""
    tokenizer = tokenizer_from_files(files, "the tokenizer")
    encoder, names = TextEncoder.of(tokenizer), {index: token for token, index in tokenizer.get_vocab().items()}
    return names[encoder.bos_id], names[encoder.eos_id]


def template_of(stage: str, begin: str = "<s>", end: str = "</s>") -> str:
    """The chat template (Jinja) for weights of a stage, whose turns stand between two control tokens."""
    template = THINKING_TEMPLATE if stage == "distill" else PLAIN_TEMPLATE
    return template.replace("<s>", begin).replace("</s>", end)


def exported(files: dict[str, str], stage: str) -> dict[str, str]:
    """The texts of a tokenizer's files for other programs."""
    return changed(files, hidden=True, template=template_of(stage, *control_tokens(files)))


def imported(files: dict[str, str], fingerprint: str | None) -> dict[str, str]:
    """The inverse of `exported`, for a tokenizer that has this fingerprint afterwards: also where another program has
    saved the files again. Files of any other tokenizer stay as they are."""
    restored = changed(files, hidden=False, template=CHAT_TEMPLATE)
    tokenizer = tokenizer_from_files(restored, FILES[0])
    if TextEncoder.of(tokenizer).fingerprint != fingerprint:
        return files
    ours = restored | {FILES[1]: json.dumps(OurTokenizer.SETTINGS | {"chat_template": CHAT_TEMPLATE}, indent=2)}
    same = TextEncoder.of(tokenizer_from_files(ours, FILES[0])).fingerprint == fingerprint
    return ours if same else restored


def changed(files: dict[str, str], hidden: bool, template: str) -> dict[str, str]:
    """The files with the answer's tags `hidden` (control tokens) or not, and with another template."""
    tokenizer, config = (json.loads(files[name]) for name in FILES)
    for token in tokenizer.get("added_tokens", ()):
        if token["content"] in ANSWER_TAGS:
            token["special"] = hidden
    for index in config.get("added_tokens_decoder", {}).values():  # transformers' copy of the same list
        if index.get("content") in ANSWER_TAGS:
            index["special"] = hidden
    config["chat_template"] = template
    return dict(zip(FILES, (json.dumps(content, ensure_ascii=False, indent=2) for content in (tokenizer, config)),
                    strict=True))
