"""What a step of the recipe is, and the options that decide what the steps do."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

SORT_BY, WEIGHT_BY, BALANCE = ("length", "score"), ("score",), ("category",)


@dataclass(frozen=True)
class Options:
    """The flags of prepare_data.py that decide what is in its output; prepare_data.py says what each means."""

    simplify: bool = False
    min_chars: int = 30
    max_chars: int = 200_000
    min_han: float = 0.3
    blocklist: tuple[str, ...] = ()  # the words of --blocklist FILE
    assistant_name: str | None = None
    drop_refusals: bool = False
    near: float = 0.6
    contained: float = 0.5
    keep_other_numbers: bool = False
    mini_share: float = 0.1
    shard_mb: int = 512
    rename_field: tuple[tuple[str, str], ...] = ()
    skip: tuple[str, ...] = ()
    score_with: str | None = None
    good: tuple[str, ...] = ()
    keep: float = 1.0
    categories: int = 50
    sort_by: str | None = None
    weight_by: str | None = None
    balance: str | None = None
    seed: int = 42


class Drop(NamedTuple):
    """What a step returns in place of a record that is to be dropped. `reason`: a few words, one of a fixed set (it is
    counted), without words of the record."""

    reason: str


class Step(NamedTuple):
    """One rule of the recipe.

    name: one word, as in --skip and dropped/<name>.jsonl.zst · rule, origin: a sentence each, for the report and the
    docs: what it does, and where the rule comes from ·
    on: "text" (documents only), "message" (documents, and each message of a chat), "whole" (documents, and chats as one
    text, their messages joined by line feeds: such a step only judges) or "chat" (conversations only) ·
    apply: (value, options, counts) → the value, changed or not, or a Drop. The value is a string, for "chat" the list
    of messages. `counts` counts by short names what was changed ("mail addresses masked") ·
    when: whether the options ask for the step.
    """

    name: str
    rule: str
    origin: str
    on: str
    apply: Callable[[object, Options, Counter], object]
    when: Callable[[Options], bool] = lambda options: True
