"""What a line of a data file and a message of a chat become: records, the tokenizer, the chat format."""

from text.chat import encode_chat

__all__ = ["encode_chat"]
