"""The tokenizer: its folder, its copy inside a weights file, and text → ids without control tokens."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.files import refuse_lfs_pointer
from Config import LLMConfig, UserError

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FILES = ("tokenizer.json", "tokenizer_config.json")  # what a weights file holds of a tokenizer
LONG_TEXT = 50_000  # characters: a longer text is encoded in parts, since the library takes 600 bytes a character
# where our split always ends a word, so that the parts have the same tokens as the whole: after a line, after letters
BOUNDARY = re.compile(r"(?<=\n)(?=\S)|(?<=[^\W\d_])(?=[^\w\s])")
DEFAULT_FOLDER = "weakwater_tokenizer"


class OurTokenizer:
    """A tokenizer made by train_tokenizer.py. It has the methods of transformers' class that this project uses, because
    importing transformers would add a second to each start.

    `files` are the texts of FILES. Raises UserError when tokenizer.json is damaged or lacks a control token.
    """

    SETTINGS = {  # tokenizer_config.json, with the chat template
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LLMConfig().max_seq_len,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>",  # it never occurs; collators take padding out of the loss, where </s> must stay
        "add_prefix_space": False, "clean_up_tokenization_spaces": False}

    def __init__(self, files: dict[str, str]):
        from tokenizers import Tokenizer

        self.files = files
        try:
            self.backend_tokenizer = Tokenizer.from_str(files["tokenizer.json"])
        except Exception as error:  # plain Exception, from Rust
            raise UserError(f"tokenizer.json: {error}") from None
        added = self.backend_tokenizer.get_added_tokens_decoder()
        control = {token.content: index for index, token in added.items() if token.special}
        for name in ("unk_token", "bos_token", "eos_token"):
            if self.SETTINGS[name] not in control:
                raise UserError(f"tokenizer.json has no control token {self.SETTINGS[name]}")
        self.bos_token_id, self.eos_token_id = (control[self.SETTINGS[name]] for name in ("bos_token", "eos_token"))

    @classmethod
    def is_ours(cls, files: dict[str, str]) -> bool:
        """True if train_tokenizer.py made these files, going by the settings."""
        try:
            config = json.loads(files["tokenizer_config.json"])
            return {key: value for key, value in config.items() if key != "chat_template"} == cls.SETTINGS
        except (ValueError, KeyError, AttributeError):  # transformers names the error
            return False

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Every entry and its id, added tokens too."""
        return self.backend_tokenizer.get_vocab()

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; the tags are not special."""
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def load_tokenizer(path: str):
    """The tokenizer in a folder: one of ours, or what transformers' AutoTokenizer reads (nothing is downloaded).

    Raises UserError when the folder is missing, damaged, or not a fast tokenizer with an end token.
    """
    name = f"--tokenizer_path {path}"
    if not os.path.isdir(path):
        raise UserError(f"{name}: no such folder (python train_tokenizer.py makes it)")
    for file in FILES:
        refuse_lfs_pointer(Path(path, file))
    others = ("special_tokens_map.json", "added_tokens.json")  # which transformers would read too
    if not any(Path(path, other).exists() for other in others):
        settings = {}
        with contextlib.suppress(OSError, UserError):  # transformers names the error
            settings = {FILES[1]: _read(path, FILES[1])}
        if OurTokenizer.is_ours(settings):
            return _checked(lambda: OurTokenizer({file: _read(path, file) for file in FILES}), name)
    return _checked(lambda: _load_with_transformers(path), name)


def _read(folder: str, file: str) -> str:
    try:
        return Path(folder, file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}") from None


def tokenizer_from_files(files: dict[str, str], name: str):
    """The tokenizer whose FILES have these texts; `name` says in messages where they come from. Raises UserError."""
    if OurTokenizer.is_ours(files):
        return _checked(lambda: OurTokenizer(files), name)
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            Path(folder, file).write_text(files[file], encoding="utf-8")
        return _checked(lambda: _load_with_transformers(folder), name)


def tokenizer_files(tokenizer) -> dict[str, str]:
    """The texts of FILES, from which `tokenizer_from_files` makes the same tokenizer. Raises UserError where
    transformers cannot write such files."""
    if isinstance(tokenizer, OurTokenizer):
        return tokenizer.files
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = {file: Path(folder, file).read_text(encoding="utf-8") for file in FILES}
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise UserError(f"--tokenizer_path: transformers cannot save this tokenizer: {error}") from None
    copy = tokenizer_from_files(files, "--tokenizer_path: the tokenizer that transformers has saved")
    if TextEncoder.of(copy).fingerprint != TextEncoder.of(tokenizer).fingerprint:
        raise UserError("--tokenizer_path: this tokenizer is not the same after transformers has saved it; use another")
    return files


def _load_with_transformers(folder: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _checked(load, name: str):
    try:
        tokenizer = load()
    except Exception as error:  # each kind of damage raises its own type, some plain Exception
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}: not a tokenizer that can be loaded: {reason[0]}") from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"{name}: not a fast tokenizer (it has no tokenizer.json)")
    try:
        TextEncoder.of(tokenizer)  # fail now if it lacks an end token
    except Exception as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from None
    return tokenizer


def choose_tokenizer(path: str | None, owner: str | None = None, files: dict[str, str] | None = None,
                     fingerprint: str | None = None):
    """The tokenizer for a run: the one in the folder `path` (--tokenizer_path) if given, else `files`, which the
    weights `owner` hold, else the one in DEFAULT_FOLDER.

    `fingerprint` identifies the tokenizer that the weights were trained with. Raises UserError when it is another.
    """
    if path is None and files is not None:
        if not isinstance(files, dict) or not all(isinstance(files.get(file), str) for file in FILES):
            raise UserError(f"the tokenizer in {owner} is damaged; name its folder with --tokenizer_path")
        tokenizer = tokenizer_from_files(files, f"the tokenizer in {owner}")
        if fingerprint not in (None, TextEncoder.of(tokenizer).fingerprint):
            raise UserError(f"the tokenizer in {owner} is not the one it was trained with; name that with "
                            "--tokenizer_path")
        return tokenizer
    if path is None and owner is not None and not os.path.isdir(DEFAULT_FOLDER):
        raise UserError(f"{owner} holds no tokenizer, and there is no folder {DEFAULT_FOLDER}: name its folder with "
                        "--tokenizer_path")
    tokenizer = load_tokenizer(path or DEFAULT_FOLDER)
    if fingerprint not in (None, TextEncoder.of(tokenizer).fingerprint):
        hint = "; leave the flag out to use the one in the weights" if path is not None and files is not None else ""
        raise UserError(f"{owner} was trained with another tokenizer than --tokenizer_path {path or DEFAULT_FOLDER}"
                        f"{hint}")
    return tokenizer


class TextEncoder:
    """Turns text into ids that never include a control token.

    Text is encoded by a copy of the tokenizer without its added tokens, so that no message can forge the end of a
    turn; text/chat.py inserts `<s>`, `</s>` and the tags as ids. `fingerprint` identifies the tokenizer.
    """

    _made = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, tokenizer) -> "TextEncoder":
        """The encoder of a tokenizer, made once."""
        if tokenizer not in cls._made:
            cls._made[tokenizer] = cls(tokenizer)
        return cls._made[tokenizer]

    def __init__(self, tokenizer):
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # not used here, and no part of the fingerprint: transformers puts an empty post-processor in
        state.update(post_processor=None, truncation=None, padding=None)
        identity = json.dumps(state)
        self.plain = Tokenizer.from_str(json.dumps(state | {"added_tokens": []}))
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.known = list(range(self.vocab_size))  # one object for each id
        self.eos_id = tokenizer.eos_token_id
        if self.eos_id is None:
            raise UserError("the tokenizer has no end token (eos_token in its tokenizer_config.json)")
        self.bos_id = tokenizer.bos_token_id
        if self.bos_id is None:  # Qwen has no bos token: its turns begin with <|im_start|>; else the end token serves
            self.bos_id = vocabulary.get("<|im_start|>", self.eos_id)
        self.fingerprint = hashlib.sha256(f"{self.bos_id} {self.eos_id} {identity}".encode()).hexdigest()
        self.tag_ids = {tag: vocabulary[tag] for tag in TAGS if tag in vocabulary}
        self.control_ids = {self.bos_id, self.eos_id, *self.tag_ids.values()}
        self.control_strings = [token["content"] for token in state["added_tokens"] if token["special"]]
        model = state["model"]
        self.unk_id = model["unk_id"] if "unk_id" in model else vocabulary.get(model.get("unk_token"))
        names = {id_: token for token, id_ in vocabulary.items()}
        self.control_pattern = re.compile("|".join(re.escape(names[i]) for i in sorted(self.control_ids)))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without any control id, encoded on all cores at once."""
        if any(len(text) > LONG_TEXT for text in texts):
            short = iter(self.encode([text for text in texts if len(text) <= LONG_TEXT]))
            return [self._encode_long(text) if len(text) > LONG_TEXT else next(short) for text in texts]
        ids = [encoding.ids for encoding in self.plain.encode_batch_fast(texts, add_special_tokens=False)]
        for index, text in enumerate(texts):
            if not self.control_ids.isdisjoint(ids[index]):  # a vocabulary that has "<s>" as an ordinary entry
                ids[index] = self._encode_split(text)
        return ids

    def _encode_long(self, text: str) -> list[int]:
        """Ids of a long text, part by part. Equal ids are one object: 8 bytes a token instead of 40."""
        ids = []
        for part in split_long(text):
            ids += [self.known[i] for i in self.encode([part])[0]]
        return ids

    def _encode_split(self, text: str) -> list[int]:
        """Ids of a text in which each control string is split in two after its first character."""
        cuts = [0, *(match.start() + 1 for match in self.control_pattern.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        encodings = self.plain.encode_batch_fast(pieces, add_special_tokens=False)
        return self.checked([i for encoding in encodings for i in encoding.ids])

    def encode_with_offsets(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield (id, begin, end) of each token of a text: the range of characters that it encodes."""
        begin = 0
        for part in split_long(text):
            encoding = self.plain.encode(part, add_special_tokens=False)
            for token, (a, b) in zip(self.checked(encoding.ids), encoding.offsets, strict=True):
                yield self.known[token], begin + a, begin + b
            begin += len(part)

    def losses(self, texts: list[str]) -> Counter:
        """What becomes of texts that are encoded and decoded again: {"texts", "exact" (texts that come back as they
        were), "characters", "lost" (characters that do not come back, in whatever order), "tokens", "unknown"}."""
        found = Counter(texts=len(texts))
        for text, ids in zip(texts, self.encode(texts), strict=True):
            decoded = self.plain.decode(ids, skip_special_tokens=False)
            found["exact"] += decoded == text
            found["characters"] += len(text)
            found["lost"] += 0 if decoded == text else (Counter(text) - Counter(decoded)).total()
            found["tokens"] += len(ids)
            found["unknown"] += ids.count(self.unk_id)
        return found

    def checked(self, ids: list[int]) -> list[int]:
        """`ids`; raises UserError when a control id is among them."""
        if not self.control_ids.isdisjoint(ids):
            raise UserError("this tokenizer turns ordinary text into its control tokens: it cannot be used")
        return ids

    def encode_texts(self, texts: list[str]) -> list["Encoded"]:
        """Pretraining documents: `<s>` text `</s>`, every token but the first a target."""
        return [Encoded(ids=[self.bos_id, *ids, self.eos_id], types=None, replies=[(len(ids) + 2, len(ids) + 1,
                        len(text.encode("utf-8")))]) for text, ids in zip(texts, self.encode(texts), strict=True)]


def split_long(text: str) -> list[str]:
    """A text in parts of at most LONG_TEXT characters, cut where words end if there is such a place."""
    parts, begin = [], 0
    while len(text) - begin > LONG_TEXT:
        end = begin + LONG_TEXT
        window = text[end - 1000:end + 1]  # one more: a cut at `end` looks at what follows
        cut = max((match.start() for match in BOUNDARY.finditer(window, 1, len(window) - 1)), default=1000)
        parts.append(text[begin:end - 1000 + cut])
        begin = end - 1000 + cut
    return [*parts, text[begin:]]


@dataclass
class Encoded:
    """One document: ids, the type of each (a byte; None: text, all targets but the first), and for each reply (for
    text: the whole) where it ends, its number of targets and its UTF-8 bytes."""

    ids: list[int]
    types: bytearray | None
    replies: list[tuple[int, int, int]]
