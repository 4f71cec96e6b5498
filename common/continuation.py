"""One greedy sample at each validation, for the log."""

import sys
from contextlib import nullcontext

import torch

from common.runtime import autocast
from dataset import Documents
from fastpath import DTYPES
from fastpath.decoding import cache_dtype
from model import KVCache, WeakWater
from text.chat import CONTEXT, ChatEncoder
from text.tokenizer import TextEncoder

NEW_TOKENS, TEXT_PROMPT = 40, 16  # tokens


def first_chat(documents: Documents) -> int | None:
    """The number of the first conversation, or None."""
    return next((d for d in range(len(documents)) if documents.cache_of(d).is_chat), None)


def prompt_of(documents: Documents) -> list[int]:
    """The first conversation up to its first reply; where there is none, the beginning of the first text."""
    chat = first_chat(documents)
    if chat is None:
        return documents.tokens(0)[:min(1 + TEXT_PROMPT, 1 + len(documents.tokens(0)) // 2)].tolist()
    types = documents.types(chat)
    return documents.tokens(chat)[:int((types != CONTEXT).argmax())].tolist()


@torch.no_grad()
def greedy(net: WeakWater, prompt: list[int], n_tokens: int, vocab_size: int, stop_id: int, device,
           dtype: str) -> list[int]:
    """Up to n_tokens ids that continue `prompt`, each the likeliest, without the stop id. Draws no random number, and
    leaves torch.compile's graphs and the model's mode as they are."""
    n_tokens = min(n_tokens, net.config.max_seq_len - len(prompt))
    was_training = net.training
    net.eval()
    cache = KVCache(net.config, 1, len(prompt) + n_tokens, device, cache_dtype(torch.device(device), DTYPES[dtype]))
    ids, tokens = [], prompt
    compiled = "torch._dynamo" in sys.modules  # else nothing is compiled, and importing it takes a second
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), autocast(device, dtype):
        while len(ids) < n_tokens:
            logits_V = net(torch.tensor([tokens], device=device), cache=cache)[0, -1]
            next_id = int(logits_V[:vocab_size].argmax())
            if next_id == stop_id:
                break
            ids.append(next_id)
            tokens = [next_id]
    net.train(was_training)
    return ids


def continuation(net: WeakWater, tokenizer, documents: Documents, device, dtype: str) -> str:
    """A line for the log: the prompt taken from `documents`, and the model's greedy continuation of it."""
    encoder = TextEncoder.of(tokenizer)
    prompt = prompt_of(documents)
    ids = greedy(net, prompt, NEW_TOKENS, encoder.vocab_size, encoder.eos_id, device, dtype)
    shown = prompt[1:]
    if first_chat(documents) is not None:  # its last question alone
        chat = ChatEncoder.of(tokenizer)
        opened = chat.prompt(thinking=False)  # distill's chats may begin with a reply behind an empty thought
        header = opened if prompt[-len(opened):] == opened else chat.headers["assistant"]
        before = prompt[:-len(header) - len(chat.newline) - 1]
        begin = max(i for i, token in enumerate(before) if token == encoder.bos_id)
        shown = before[begin + len(chat.headers["user"]):]
    return "sample: " + " → ".join(tokenizer.decode(part).strip().replace("\n", "\\n") for part in (shown, ids))
