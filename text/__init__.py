"""Text handling: records of data files, the tokenizer, the chat format."""

from text.chat import encode_chat

__all__ = ["encode_chat"]
