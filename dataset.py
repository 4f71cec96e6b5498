"""Data: JSONL files → token cache (made once) → packed buffers → optimizer steps.

Read from top to bottom it follows one document on its way into the loss:

1. files and records   a line of JSON becomes a record, or is counted as malformed
2. encoding            a record becomes token ids, and for each token what it is (loss mask)
3. the token cache     all ids of a data set in flat arrays
4. selection           which documents train and which validate; what is cut or skipped
5. steps               documents become micro-batches without padding, in a seeded order
"""

import contextlib
import glob
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from Config import LLMConfig, UserError

# ---------------------------------------------------------------------------------------------
# 1. files and records

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
ROLES = ("system", "user", "assistant")


class MalformedRecord(ValueError):
    """A line that is not a record; the message says why."""


def find_files(path: str) -> list[Path]:
    """The data files behind a path, a folder (its *.jsonl, .gz, .xz, .zst) or a glob, sorted.

    Raises UserError when there are none.
    """
    if os.path.isdir(path):
        found = [p for p in Path(path).iterdir() if p.name.endswith(SUFFIXES) and p.is_file()]
        reason = f"the folder {path} holds no *.jsonl, *.jsonl.gz, *.jsonl.xz or *.jsonl.zst"
    elif os.path.isfile(path):
        found, reason = [Path(path)], ""
    else:
        found = [Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        reason = f"no such file, folder or match: {path}"
    if not found:
        raise UserError(reason)
    return sorted(found)


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of a plain, .gz, .xz or .zst file; blank lines are passed over.

    Raises UserError, with the number of the last good line, when the file is truncated or damaged.
    """
    number = 0
    try:
        if file.suffix == ".gz":
            stream = gzip.open(file, "rb")
        elif file.suffix == ".xz":
            stream = lzma.open(file, "rb")
        elif file.suffix == ".zst":
            stream = contextlib.closing(_zst_lines(file))
        else:
            stream = open(file, "rb")
        with stream as lines:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip(b"\r\n")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is no text
                if line.strip():
                    yield number, line
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read beyond line {number}: {error}") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise UserError(f"{file}: cannot be read beyond line {number}: {error}") from None
        raise


def _zst_lines(file: Path) -> Iterator[bytes]:
    """Lines of a .zst file. Raises EOFError where it ends inside a frame, which zstandard's own reader passes over."""
    try:
        import zstandard  # only where such a file is read
    except ImportError:
        raise UserError(f"{file}: reading .zst needs a package: pip install zstandard") from None

    frame, rest = None, b""
    with open(file, "rb") as stream:
        while block := stream.read(1 << 16):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from lines
                frame, block = (None, frame.unused_data) if frame.eof else (frame, b"")
    if frame is not None:
        raise EOFError("the file ends inside a compressed frame")
    if rest:
        yield rest


def write_jsonl(records: Iterable[dict], path: Path) -> None:
    """Write records to a file, whole or not at all. Raises UserError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error}") from None


def _unique_keys(pairs: list) -> dict:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise MalformedRecord("a key stands twice in one object")
    return record


def _no_constant(name: str):
    raise MalformedRecord(f"{name} is not JSON")


def parse_object(line: bytes) -> dict:
    """One line as a JSON object without doubled keys. Raises MalformedRecord with the reason, in words for the user."""
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise MalformedRecord(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise MalformedRecord(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise MalformedRecord("not a record: nested too deeply") from None
    except ValueError as error:  # MalformedRecord from the hooks, or a number Python will not read
        raise MalformedRecord(str(error)) from None
    if not isinstance(record, dict):
        raise MalformedRecord("not an object")
    return record


def parse_record(line: bytes, kind: str) -> dict:
    """One line as a record of `kind` "text" ({"text": …}) or "chat" ({"conversations": […]}).

    Raises MalformedRecord with the reason.
    """
    record = parse_object(line)
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 3e38:
        raise MalformedRecord(f'"weight" must be a finite number of at least 0, not {weight!r}')
    if kind == "text":
        if "text" not in record:
            hint = ' (a conversation? chat stages read those)' if "conversations" in record else ""
            raise MalformedRecord(f'no "text"{hint}')
        check_text(record["text"], '"text"')
        record.pop("conversations", None)  # another key is ignored, whatever it holds
    else:
        if "conversations" not in record:
            hint = ' (plain text? pretrain.py reads that)' if "text" in record else ""
            raise MalformedRecord(f'no "conversations"{hint}')
        _check_conversation(record["conversations"])
        record.pop("text", None)
    return record


def check_text(text, name: str) -> None:
    """Raises MalformedRecord when `text`, called `name`, is not a string or has a lone surrogate."""
    if not isinstance(text, str):
        raise MalformedRecord(f"{name} is not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MalformedRecord(f"{name} has a lone surrogate at character {error.start}, which is no text") from None


def _check_conversation(conversation) -> None:
    if not isinstance(conversation, list):
        raise MalformedRecord('"conversations" is not a list')
    for index, message in enumerate(conversation):
        name = f"message {index + 1}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise MalformedRecord(f'{name} is not an object with "role" and "content"')
        if message["role"] not in ROLES:
            raise MalformedRecord(f'{name}: role {message["role"]!r} is not one of {", ".join(ROLES)}')
        if message["role"] == "system" and index:
            raise MalformedRecord(f"{name}: a system message may only come first")
        check_text(message["content"], f'{name}: "content"')


def text_hash(record: dict) -> int:
    """64 bits that identify the text of a record as `parse_record` gives it, whatever file it stands in and
    whatever its weight.

    Decides what is validation: both copies of a double always fall on the same side.
    """
    if "text" in record:
        content = record["text"]
    else:
        content = json.dumps([[m["role"], m["content"]] for m in record["conversations"]], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8"), digest_size=8).digest(), "little")


def is_held_out(hashes):
    """True where a text hash (int or array) falls in the 0.5 % that validate when no --val_path is given."""
    return hashes % 200 == 0


# ---------------------------------------------------------------------------------------------
# 2. encoding

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TAG_PATTERN = re.compile("|".join(map(re.escape, TAGS)))
THINK_PATTERN = re.compile(r"<think>(.*?)</think>", re.DOTALL)

# what a token is: the loss weight of each kind is chosen when a step is made, so it is no part of the cache
CONTEXT, REPLY, TAG, THINK = range(4)


class OurTokenizer:
    """A tokenizer that train_tokenizer.py made, with what is used here of transformers' class for it, by the same
    names. Importing transformers would take each start a second.

    Raises UserError when tokenizer.json is damaged or lacks a control token.
    """

    SETTINGS = {  # tokenizer_config.json, with the chat template
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LLMConfig().max_seq_len,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>",  # it never occurs; collators take padding out of the loss, where </s> must stay
        "add_prefix_space": False, "clean_up_tokenization_spaces": False}

    def __init__(self, path: str):
        from tokenizers import Tokenizer

        try:
            self.backend_tokenizer = Tokenizer.from_file(os.path.join(path, "tokenizer.json"))
        except Exception as error:  # plain Exception, from Rust
            raise UserError(f"tokenizer.json: {error}") from None
        added = self.backend_tokenizer.get_added_tokens_decoder()
        control = {token.content: index for index, token in added.items() if token.special}
        for name in ("unk_token", "bos_token", "eos_token"):
            if self.SETTINGS[name] not in control:
                raise UserError(f"tokenizer.json has no control token {self.SETTINGS[name]}")
        self.bos_token_id, self.eos_token_id = (control[self.SETTINGS[name]] for name in ("bos_token", "eos_token"))

    @classmethod
    def is_in(cls, path: str) -> bool:
        """Whether a folder holds one, going by its settings; transformers would read other files' too."""
        if any(Path(path, name).exists() for name in ("special_tokens_map.json", "added_tokens.json")):
            return False
        try:
            config = json.loads(Path(path, "tokenizer_config.json").read_text(encoding="utf-8"))
            return {key: value for key, value in config.items() if key != "chat_template"} == cls.SETTINGS
        except (OSError, ValueError, AttributeError):  # what is wrong with it is said by transformers
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
    if not os.path.isdir(path):
        raise UserError(f"--tokenizer_path {path}: no such folder (train_tokenizer.py makes one)")
    try:
        if OurTokenizer.is_in(path):
            tokenizer = OurTokenizer(path)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # each damage has an exception of its own, some of them plain Exception
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--tokenizer_path {path}: not a tokenizer that can be loaded: {reason[0]}") from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"--tokenizer_path {path}: not a fast tokenizer (it has no tokenizer.json)")
    try:
        TextEncoder.of(tokenizer)  # what it lacks is said now
    except Exception as error:
        raise UserError(f"--tokenizer_path {path}: {' '.join(str(error).split())}") from None
    return tokenizer


class TextEncoder:
    """Turns text into ids that never include a control token, and conversations into ids and kinds.

    Text is encoded by a copy of the tokenizer without its added tokens; `<s>`, `</s>` and the tags are
    put in by construction. So no message can forge the end of a turn, whatever it says.
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
        self.eos_id = tokenizer.eos_token_id
        if self.eos_id is None:
            raise UserError("the tokenizer has no end token (eos_token in its tokenizer_config.json)")
        self.bos_id = tokenizer.bos_token_id
        if self.bos_id is None:  # Qwen's has none: its turns begin with <|im_start|>; else the end token also begins
            self.bos_id = vocabulary.get("<|im_start|>", self.eos_id)
        self.fingerprint = hashlib.sha256(f"{self.bos_id} {self.eos_id} {identity}".encode()).hexdigest()
        self.tag_ids = {tag: vocabulary[tag] for tag in TAGS if tag in vocabulary}
        self.control_ids = {self.bos_id, self.eos_id, *self.tag_ids.values()}
        names = {id_: token for token, id_ in vocabulary.items()}
        self.control_pattern = re.compile("|".join(re.escape(names[i]) for i in sorted(self.control_ids)))
        self.newline, *headers = self.encode(["\n", *(f"{role}\n" for role in ROLES)])
        self.headers = {role: [self.bos_id, *ids] for role, ids in zip(ROLES, headers, strict=True)}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without any control id, encoded on all cores at once."""
        ids = [encoding.ids for encoding in self.plain.encode_batch_fast(texts, add_special_tokens=False)]
        for index, text in enumerate(texts):
            if not self.control_ids.isdisjoint(ids[index]):  # a vocabulary that has "<s>" as an ordinary piece
                ids[index] = self._encode_broken(text)
        return ids

    def _encode_broken(self, text: str) -> list[int]:
        """Ids of a text in which each control string is broken in two after its first character."""
        cuts = [0, *(match.start() + 1 for match in self.control_pattern.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        encodings = self.plain.encode_batch_fast(pieces, add_special_tokens=False)
        ids = [i for encoding in encodings for i in encoding.ids]
        if not self.control_ids.isdisjoint(ids):
            raise UserError("this tokenizer turns ordinary text into its control tokens: it cannot be used")
        return ids

    def encode_texts(self, texts: list[str]) -> list["Encoded"]:
        """Pretraining documents: `<s>` text `</s>`, every token but the first a target."""
        return [Encoded(ids=[self.bos_id, *ids, self.eos_id], kinds=None, replies=[(len(ids) + 2, len(ids) + 1,
                        len(text.encode("utf-8")))]) for text, ids in zip(texts, self.encode(texts), strict=True)]

    def encode_conversations(self, conversations: list[list[dict]]) -> list["Encoded"]:
        """Conversations in the chat format; many at once, since one batch is encoded on all cores."""
        segments = [self._segments(m) for conversation in conversations for m in conversation]
        plain = iter(self.encode([text for message in segments for text, kind in message if kind is not None]))
        encoded, messages = [], iter(segments)
        for conversation in conversations:
            ids, kinds, replies = [], [], []
            for message in conversation:
                begin = len(ids)
                ids += self.headers[message["role"]]
                kinds += [CONTEXT] * (len(ids) - begin)
                for text, kind in next(messages):
                    if kind is None:
                        piece_ids, piece_kinds = self._encode_tagged(text)
                    elif kind == TAG and text in self.tag_ids:
                        next(plain)
                        piece_ids, piece_kinds = [self.tag_ids[text]], [TAG]
                    else:
                        piece_ids = next(plain)
                        piece_kinds = [kind] * len(piece_ids)
                    ids += piece_ids
                    kinds += piece_kinds
                answered = message["role"] == "assistant"
                ids += [self.eos_id, *self.newline]
                kinds += [REPLY if answered else CONTEXT] + [CONTEXT] * len(self.newline)
                if answered:
                    targets = sum(kind != CONTEXT for kind in kinds[begin:])
                    replies.append((len(ids), targets, len(message["content"].encode("utf-8"))))
            encoded.append(Encoded(ids, kinds, replies))
        return encoded

    def _segments(self, message: dict) -> list[tuple[str, int | None]]:
        """A message's content as (text, kind) to be encoded apart; kind None: tags are in it as ordinary text."""
        text = message["content"]
        if message["role"] != "assistant":
            return [(text, CONTEXT)]
        present = [match.span() for match in TAG_PATTERN.finditer(text)]
        if not present:
            return [(text, REPLY)]
        if len(self.tag_ids) < len(TAGS):
            return [(text, None)]
        segments, begin = [], 0
        thoughts = [match.span(1) for match in THINK_PATTERN.finditer(text)]
        for start, end in [*present, (len(text), len(text))]:
            if start > begin:
                thinking = any(a <= begin < b for a, b in thoughts)
                segments.append((text[begin:start], THINK if thinking else REPLY))
            if end > start:
                segments.append((text[start:end], TAG))
            begin = end
        return segments

    def _encode_tagged(self, text: str) -> tuple[list[int], list[int]]:
        """A reply whose tags are no single ids: what a token is follows from where its characters stand."""
        kind_of_char = np.full(len(text), REPLY, dtype=np.uint8)
        for match in THINK_PATTERN.finditer(text):
            kind_of_char[match.start(1):match.end(1)] = THINK
        for match in TAG_PATTERN.finditer(text):
            kind_of_char[match.start():match.end()] = TAG
        ids, kinds = [], []
        pieces, begin = [], 0
        for match in TAG_PATTERN.finditer(text):  # of four tags some may be single ids
            if match.group() in self.tag_ids:
                pieces += [(begin, match.start(), None), (match.start(), match.end(), self.tag_ids[match.group()])]
                begin = match.end()
        for start, end, tag_id in [*pieces, (begin, len(text), None)]:
            if tag_id is not None:
                ids, kinds = [*ids, tag_id], [*kinds, TAG]
            elif end > start:
                encoding = self.plain.encode(text[start:end], add_special_tokens=False)
                if not self.control_ids.isdisjoint(encoding.ids):
                    raise UserError("this tokenizer turns ordinary text into its control tokens: it cannot be used")
                for token, (a, b) in zip(encoding.ids, encoding.offsets, strict=True):
                    covered = kind_of_char[start + a:max(start + b, start + a + 1)]
                    ids.append(token)
                    kinds.append(TAG if (covered == TAG).any() else int(covered[0]) if len(covered) else REPLY)
        return ids, kinds


@dataclass
class Encoded:
    """One document: ids, the kind of each (None: text, all targets but the first), and for each reply
    (for text: the one whole) where it ends, its number of targets and its UTF-8 bytes."""

    ids: list[int]
    kinds: list[int] | None
    replies: list[tuple[int, int, int]]


def encode_chat(tokenizer, conversations: list[dict],
                add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """Ids of a conversation and its loss mask: 1 on the assistant's content and its `</s>`, 0 elsewhere.

    `conversations` is the list of {"role", "content"} messages. With `add_generation_prompt` the ids end
    in the header of the reply to come. Raises UserError on a message that is not valid, a lone surrogate included.
    """
    try:
        _check_conversation(conversations)
    except MalformedRecord as error:
        raise UserError(f"conversation refused: {error}") from None
    encoder = TextEncoder.of(tokenizer)
    encoded = encoder.encode_conversations([conversations])[0]
    ids, mask = encoded.ids, [int(kind != CONTEXT) for kind in encoded.kinds]
    if add_generation_prompt:
        header = encoder.headers["assistant"]
        ids, mask = ids + header, mask + [0] * len(header)
    return ids, mask


# ---------------------------------------------------------------------------------------------
# 3. the token cache

DOCUMENT = np.dtype([("start", "<i8"), ("reply", "<i8"), ("hash", "<u8"), ("weight", "<f4"), ("file", "<u4"),
                     ("line", "<i8")])
REPLIES = np.dtype([("end", "<i8"), ("targets", "<i8"), ("bytes", "<i8")])
CACHE_FORMAT = 2  # part of the fingerprint: raise it when anything above changes what is stored


class TokenCache:
    """All documents of a data set, encoded, as flat arrays in the files of one folder.

    tokens (uint16; uint32 above 65,536 entries) · kinds (uint8, chat only) · documents (DOCUMENT, one more
    than there are: the last one's start is the end) · replies (REPLIES). `meta` holds the counts.
    Raises UserError, naming the file, when one is missing, truncated or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            sums = self.meta["crc32"]
            if sums.pop("meta.json") != _crc32_of_meta(self.meta):
                raise ValueError("wrong checksum")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'meta.json'}: damaged: {error}") from None
        for name, expected in sums.items():
            file = folder / name
            if not file.is_file() or _crc32(file) != expected:
                raise UserError(f"{file}: missing, truncated or damaged")
        self.is_chat = self.meta["kind"] == "chat"
        self.tokens = FileArray(folder / "tokens.bin", np.dtype(self.meta["token_type"]))
        self.kinds = FileArray(folder / "kinds.bin", np.dtype(np.uint8)) if self.is_chat else None
        self.documents = FileArray(folder / "documents.bin", DOCUMENT)
        self.replies = FileArray(folder / "replies.bin", REPLIES)


class FileArray:
    """A flat array in a file, of which only what is asked for is read: `[i]`, `[a:b]`, or `[name]`, a whole field.

    Not a memory map: the pages of one that have been touched, and those around them, count as this process's memory,
    more the larger the file is.
    """

    def __init__(self, file: Path, dtype: np.dtype):
        self.stream, self.dtype = open(file, "rb", buffering=0), dtype
        self.length = file.stat().st_size // dtype.itemsize

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, what: int | slice | str) -> np.ndarray:
        if isinstance(what, str):
            return self[:][what]
        begin, end, _ = (what if isinstance(what, slice) else slice(int(what), int(what) + 1)).indices(self.length)
        self.stream.seek(int(begin) * self.dtype.itemsize)
        array = np.empty(max(0, end - begin), self.dtype)
        read = self.stream.readinto(array.view(np.uint8).data) if len(array) else 0
        if read != array.nbytes:
            raise UserError(f"{self.stream.name}: truncated")
        return array if isinstance(what, slice) else array[0]


def _crc32_of_meta(meta: dict) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode("utf-8"))


def _crc32(file: Path) -> int:
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def open_cache(path: str, tokenizer, kind: str, cache_dir: str) -> TokenCache:
    """The token cache of the files behind `path`, made if there is none.

    The folder's name is a fingerprint of the files (path, size, time of change), the tokenizer and the
    settings. A damaged cache is named and made again; a half-made one never bears the name.
    Raises UserError when the data cannot be read, holds no record, or the disk is full.
    """
    files = find_files(path)
    encoder = TextEncoder.of(tokenizer)
    described = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = json.dumps([CACHE_FORMAT, kind, encoder.fingerprint, encoder.bos_id, encoder.eos_id, described])
    folder = Path(cache_dir) / hashlib.sha256(key.encode("utf-8")).hexdigest()[:16]
    if folder.is_dir():
        try:
            return TokenCache(folder)
        except UserError as error:
            print(f"token cache refused: {error}; making it again", flush=True)
            shutil.rmtree(folder)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    for leftover in folder.parent.glob("*.partial"):
        ours = re.fullmatch(r"[0-9a-f]{16}\.(\d+)\.partial", leftover.name)
        if ours and (leftover == partial or not process_lives(int(ours[1]))):  # a killed run's
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        _build_cache(files, encoder, kind, partial)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process made the same one first
                raise
    except OSError as error:
        raise UserError(f"{partial}: the token cache cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenCache(folder)


def process_lives(pid: int) -> bool:
    """Whether a process of this number runs here; in doubt yes."""
    try:
        if os.name == "posix":  # on Windows this would be a signal
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _build_cache(files: list[Path], encoder: TextEncoder, kind: str, folder: Path) -> None:
    """Encode all files into `folder`, a block of lines at a time, so that memory does not grow with the data."""
    folder.mkdir(parents=True)
    token_type = np.dtype("<u2" if encoder.vocab_size <= 65536 else "<u4")
    meta = {"kind": kind, "token_type": token_type.str, "files": [str(f) for f in files],
            "lines": 0, "empty": 0, "malformed": 0, "examples": []}
    names = ["tokens.bin", "documents.bin", "replies.bin"] + (["kinds.bin"] if kind == "chat" else [])
    out = {name: open(folder / name, "wb") for name in names}
    n_tokens = n_documents = n_replies = 0
    progress = Progress("tokenising")
    try:
        for block in _record_blocks(files, kind, meta):
            records = [record for _, _, record in block]
            if kind == "text":
                encoded = encoder.encode_texts([record["text"] for record in records])
            else:
                encoded = encoder.encode_conversations([record["conversations"] for record in records])
            documents, replies = np.zeros(len(block), DOCUMENT), []
            for row, (file, line, record), document in zip(documents, block, encoded, strict=True):
                row["start"], row["reply"] = n_tokens, n_replies + len(replies)
                row["hash"], row["weight"] = text_hash(record), record.get("weight", 1.0)
                row["file"], row["line"] = file, line
                replies += [(n_tokens + end, targets, size) for end, targets, size in document.replies]
                n_tokens += len(document.ids)
            # not ndarray.tofile: on a full disk it loses the end of its buffer without a word
            out["tokens.bin"].write(np.array([i for d in encoded for i in d.ids], token_type).tobytes())
            if kind == "chat":
                out["kinds.bin"].write(bytes(k for d in encoded for k in d.kinds))
            out["documents.bin"].write(documents.tobytes())
            out["replies.bin"].write(np.array(replies, REPLIES).tobytes())
            n_documents, n_replies = n_documents + len(block), n_replies + len(replies)
            progress.show(f"{n_documents:,} documents, {n_tokens:,} tokens")
        end = np.zeros(1, DOCUMENT)
        end["start"], end["reply"] = n_tokens, n_replies
        out["documents.bin"].write(end.tobytes())
        for stream in out.values():
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        for stream in out.values():
            stream.close()
    progress.show(f"{n_documents:,} documents, {n_tokens:,} tokens", last=True)
    meta["crc32"] = {name: _crc32(folder / name) for name in names}
    meta["crc32"]["meta.json"] = _crc32_of_meta(meta)
    with open(folder / "meta.json", "w", encoding="utf-8") as stream:
        json.dump(meta, stream, indent=1)  # in ASCII: a file's name need not be UTF-8
        stream.flush()
        os.fsync(stream.fileno())


def _record_blocks(files: list[Path], kind: str, meta: dict, block_bytes: int = 1 << 22):
    """Blocks of (file index, line number, record), about `block_bytes` of JSON each; the rest is counted in `meta`."""
    block, size = [], 0
    for index, file in enumerate(files):
        for number, line in read_lines(file):
            meta["lines"] += 1
            try:
                record = parse_record(line, kind)
            except MalformedRecord as error:
                meta["malformed"] += 1
                if len(meta["examples"]) < 5:
                    meta["examples"].append(f"{file}:{number}: {error}")
                continue
            if not record["text" if kind == "text" else "conversations"]:
                meta["empty"] += 1
                continue
            block.append((index, number, record))
            size += len(line)
            if size >= block_bytes:
                yield block
                block, size = [], 0
    if block:
        yield block


class Progress:
    """A line about a long task every few seconds, and one at its end with the time it took."""

    def __init__(self, what: str, every: float = 5.0):
        self.what, self.every = what, every
        self.begin = self.shown = time.monotonic()

    def show(self, state: str, last: bool = False) -> None:
        """Print `state`, if enough time has passed or it is the last."""
        now = time.monotonic()
        if last or now - self.shown >= self.every:
            self.shown = now
            print(f"{self.what}: {state}, {now - self.begin:.1f} s", flush=True)


# ---------------------------------------------------------------------------------------------
# 4. selection


@dataclass
class Documents:
    """Chosen documents of a cache, as parallel arrays with one entry each.

    index: number in the cache · length: tokens kept, from its start · targets, bytes: of what is kept ·
    weight: the record's own · hash: of its text. `counts` says what became of the others.
    """

    cache: TokenCache
    index: np.ndarray
    length: np.ndarray
    targets: np.ndarray
    bytes: np.ndarray
    weight: np.ndarray
    hash: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def take(self, chosen: np.ndarray) -> "Documents":
        """Those where `chosen` (a mask or indices) says so."""
        taken = replace(self, counts=dict(self.counts))
        taken.keep(chosen)
        return taken

    def keep(self, chosen: np.ndarray) -> None:
        """The same in place, one array after the other."""
        for name in ("index", "length", "targets", "bytes", "weight", "hash"):
            setattr(self, name, getattr(self, name)[chosen])

    def start(self, document: int) -> int:
        """Where a document begins in the cache's tokens."""
        return int(self.cache.documents[self.index[document]]["start"])

    def _span(self, document: int) -> slice:
        """Where what is kept of a document lies in the cache."""
        begin = self.start(document)
        return slice(begin, begin + int(self.length[document]))

    def tokens(self, document: int) -> np.ndarray:
        """The ids kept of a document, int64 (T,)."""
        return self.cache.tokens[self._span(document)].astype(np.int64)

    def kinds(self, document: int) -> np.ndarray:
        """CONTEXT, REPLY, TAG or THINK for each id kept of a conversation, (T,)."""
        assert self.cache.kinds is not None, "text has no kinds: all of it is a target"
        return self.cache.kinds[self._span(document)]

    def name(self, document: int) -> str:
        """file:line of a document, for messages."""
        row = self.cache.documents[self.index[document]]
        return f"{self.cache.meta['files'][row['file']]}:{row['line']}"

    def tagged_share(self, among: int = 1000) -> float:
        """Share of the first `among` conversations with a <think>, </think>, <answer> or </answer> in a reply."""
        return float(np.mean([(self.kinds(d) == TAG).any() for d in range(min(among, len(self)))]))

    def fingerprint(self) -> str:
        """Identifies what is trained on, by content, wherever the files lie now."""
        digest = hashlib.sha256()
        for array, dtype in ((self.hash, np.uint64), (self.length, np.int64), (self.weight, np.float32)):
            digest.update(array.astype(dtype).tobytes())
        return digest.hexdigest()


def load_documents(path: str, tokenizer, kind: str, cache_dir: str, max_seq_len: int, min_tokens: int = 0,
                   max_tokens: int | None = None, max_bad_ratio: float = 0.01, say=print) -> Documents:
    """The documents behind `path` that fit the settings; `kind` is "text" or "chat".

    Conversations are chosen by their whole length (min_tokens..max_tokens). One longer than max_seq_len
    loses whole last turns; one whose first reply does not fit, or that has no reply, is skipped. Text is
    never skipped for its length. Everything left out is counted (Documents.counts); `say` prints a line.
    Raises UserError when too many lines are malformed or nothing is left.
    """
    cache = open_cache(path, tokenizer, kind, cache_dir)
    meta = cache.meta
    counts = {"lines": meta["lines"], "malformed": meta["malformed"], "empty": meta["empty"]}
    for example in meta["examples"]:
        say(f"malformed: {example}")
    if meta["malformed"] > max_bad_ratio * meta["lines"]:
        raise UserError(f"{path}: {meta['malformed']:,} of {meta['lines']:,} lines are malformed, more than "
                        f"--max_bad_ratio {max_bad_ratio} (the first: {meta['examples'][0]})")
    blocks = []
    n_documents = len(cache.documents) - 1
    for first in range(0, n_documents, 1 << 13):  # a block at a time: then only what is chosen takes memory
        block, counted = _choose(cache, first, min(first + (1 << 13), n_documents), max_seq_len, min_tokens, max_tokens)
        blocks.append(block)
        for reason, number in counted.items():
            counts[reason] = counts.get(reason, 0) + number
    if not sum(len(index) for index, *_ in blocks):
        limits = "" if kind == "text" else (f" with --min_tokens {min_tokens} --max_tokens {max_tokens} "
                                            f"--max_seq_len {max_seq_len}")
        raise UserError(f"{path}: no document is left{limits} ({_in_words(counts)})")
    fields = list(zip(*blocks, strict=True))
    del blocks
    for i, parts in enumerate(fields):  # one after the other: no more than one is in memory twice
        fields[i] = np.concatenate(parts)
    return Documents(cache, *fields, counts)


def _choose(cache: TokenCache, begin: int, end: int, max_seq_len: int, min_tokens: int,
            max_tokens: int | None) -> tuple[tuple, dict[str, int]]:
    """The fields of Documents for those of the cache's documents `begin` to `end` that fit; why the others do not."""
    table = cache.documents[begin:end + 1]
    start, first = np.array(table["start"]), np.array(table["reply"])
    replies = cache.replies[first[0]:first[-1]]
    first -= first[0]
    length, n_replies = np.diff(start), np.diff(first)
    weight = np.array(table["weight"][:-1])
    if cache.is_chat:
        limit = np.repeat(start[:-1] + max_seq_len, n_replies)
        fits = np.concatenate(([0], np.cumsum(replies["end"] <= limit)))
        kept_replies = fits[first[1:]] - fits[first[:-1]]
        left_out = {"fewer than min_tokens": length < min_tokens,
                    "more than max_tokens": length > (max_tokens or np.inf),
                    "no assistant turn": n_replies == 0, "first reply does not fit": kept_replies == 0,
                    "weight 0": weight == 0}
    else:
        kept_replies, left_out = n_replies, {"weight 0": weight == 0}
    kept, counts = np.ones(len(length), bool), {}
    for reason, applies in left_out.items():  # the first that applies counts
        counts[reason] = int((kept & applies).sum())
        kept &= ~applies
    if cache.is_chat:
        last_end = np.array(replies["end"])[np.maximum(first[1:], 1) - 1] if len(replies) else start[1:]
        counts["lost last turns"] = int((kept & (kept_replies < n_replies)).sum())
        counts["lost a last turn without reply"] = int((kept & (n_replies > 0) & (last_end < start[1:])).sum())
    index = np.flatnonzero(kept)
    first_kept, end_kept = first[index], first[index] + kept_replies[index]
    targets = np.concatenate(([0], np.cumsum(replies["targets"])))
    sizes = np.concatenate(([0], np.cumsum(replies["bytes"])))
    return ((begin + index).astype(np.uint32), (replies["end"][end_kept - 1] - start[index]).astype(np.int32),
            (targets[end_kept] - targets[first_kept]).astype(np.int32),
            (sizes[end_kept] - sizes[first_kept]).astype(np.int32), weight[index],
            np.array(table["hash"][:-1])[index]), counts


def load_splits(path: str, val_path: str | None, tokenizer, kind: str, cache_dir: str, max_seq_len: int,
                min_tokens: int = 0, max_tokens: int | None = None,
                max_bad_ratio: float = 0.01, say=print) -> tuple[Documents, Documents]:
    """(training documents, validation documents), with no text on both sides, and a printed account of all lines.

    Without `val_path` the documents whose text's hash falls in 0.5 % validate, at least one.
    """
    options = (tokenizer, kind, cache_dir, max_seq_len, min_tokens, max_tokens, max_bad_ratio, say)
    documents = load_documents(path, *options)
    if val_path is None:
        held_out = is_held_out(documents.hash)
        if not held_out.any():
            held_out = documents.hash == documents.hash.min()
        train, val = documents, documents.take(held_out)
        train.keep(~held_out)
    else:
        train, val = documents, load_documents(val_path, *options)
        say(f"validation data: {val_path}: {_in_words(val.counts)}")
        held_out = np.isin(train.hash, val.hash)
        train.counts["also in the validation data"] = int(held_out.sum())
        train.keep(~held_out)
    _, once = np.unique(val.hash, return_index=True)
    train.counts["doubles in validation"] = len(val) - len(once)
    val = val.take(once)  # in the order of the hashes: the first --eval_tokens are then a fair sample
    if not len(train):
        raise UserError(f"{path}: nothing is left to train on beside {len(val)} validation document(s): "
                        "more data, or another --val_path, is needed")
    say(f"data: {path}: {_in_words(train.counts)}; {len(train):,} train ({int(train.length.sum()):,} tokens), "
        f"{len(val):,} validate ({int(val.length.sum()):,} tokens)")
    return train, val


def _in_words(counts: dict[str, int]) -> str:
    lines, *rest = counts.items()
    return f"{lines[1]:,} lines" + "".join(f", {number:,} {what}" for what, number in rest if number or what in (
        "malformed", "empty"))


# ---------------------------------------------------------------------------------------------
# 5. steps


@dataclass
class MicroBatch:
    """One packed buffer for `model(**micro_batch.to(device))`: tokens (1, T) of the documents (or pieces of
    documents) of `lengths`, and what its N predicting positions should predict, with which loss weight."""

    tokens: np.ndarray
    lengths: list[int]
    target_index: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def to(self, device) -> dict:
        """The model's keyword arguments, as tensors on `device`."""
        import torch  # here, so that training a tokenizer does not cost the memory of torch

        arrays = dict(tokens=self.tokens[None], target_index=self.target_index, targets=self.targets,
                      weights=self.weights, boundaries=np.cumsum([0, *self.lengths], dtype=np.int32))
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        on_cuda = torch.device(device).type == "cuda"
        if on_cuda:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        # from memory that is not pinned a copy must be waited for: it would read on after the memory is freed
        return {"lengths": self.lengths} | {n: t.to(device, non_blocking=on_cuda) for n, t in tensors.items()}


@dataclass
class Step:
    """One optimizer step: this rank's micro-batches, and the loss weight and tokens of all ranks together."""

    micro_batches: list[MicroBatch]
    total_weight: float
    pieces: list["Piece"]

    @property
    def tokens(self) -> int:
        """Positions computed, all of them real tokens."""
        return sum(length for _, _, length in self.pieces)


Piece = tuple[int, int, int]  # document, first token, number of tokens


def make_micro_batch(documents: Documents, pieces: list[Piece], kind_weights: np.ndarray | None) -> MicroBatch:
    """Lay pieces of documents end to end. A token predicts the next of its document, also where that stands in
    another row; the last token of a document predicts nothing.

    `kind_weights` (4,) is the loss weight of each kind, to be multiplied by the record's own weight;
    None leaves every target at weight 1, for evaluation.
    """
    cache = documents.cache
    tokens, index, targets, weights = [], [], [], []
    position = 0
    for document, offset, length in pieces:
        begin = documents.start(document) + offset
        predicting = min(length, int(documents.length[document]) - offset - 1)
        read = cache.tokens[begin:begin + predicting + 1]  # all of the piece, and what its last token predicts
        tokens.append(read[:length])
        following = read[1:]
        if cache.is_chat:
            kinds = cache.kinds[begin + 1:begin + 1 + predicting]
        else:
            kinds = np.full(predicting, REPLY, np.uint8)
        if kind_weights is None:
            weight = (kinds != CONTEXT).astype(np.float32)
        else:
            weight = kind_weights[kinds] * documents.weight[document]
        counted = np.flatnonzero(weight)
        index.append(position + counted)
        targets.append(following[counted])
        weights.append(weight[counted])
        position += length
    return MicroBatch(np.concatenate(tokens).astype(np.int64), [length for _, _, length in pieces],
                      np.concatenate(index), np.concatenate(targets).astype(np.int64),
                      np.concatenate(weights).astype(np.float32))


class StepLoader:
    """Optimizer steps by (epoch, number), so that resuming is asking for the next one.

    A step is chosen as a whole, batch_size × accumulation_steps × ranks × max_seq_len tokens, and only then
    cut into micro-batches: the same documents and so the same gradient, however it is cut.

    Text: the documents of an epoch, in its order, are one stream cut into rows of max_seq_len tokens; a
    document that does not end in its row goes on in the next. Chat: whole documents, taken in order as long
    as they fit; one that does not is kept back for the next step, and a micro-batch may be larger than
    batch_size × max_seq_len by less than one conversation. Nothing is ever padded.
    """

    LOOK_AHEAD = 256  # conversations that may be kept back at a time; they fill the gaps of later steps

    def __init__(self, documents: Documents, max_seq_len: int, batch_size: int, accumulation_steps: int, seed: int,
                 order: str = "shuffled", rank: int = 0, world_size: int = 1, tag_weight: float = 1.0,
                 think_weight: float = 1.0):
        self.documents, self.max_seq_len, self.seed, self.order = documents, max_seq_len, seed, order
        self.micro_batches_per_rank, self.rank = accumulation_steps, rank
        self.n_micro_batches = accumulation_steps * world_size
        self.micro_batch_tokens = batch_size * max_seq_len
        self.step_tokens = self.micro_batch_tokens * self.n_micro_batches
        self.kind_weights = np.array([0.0, 1.0, tag_weight, think_weight], np.float32)  # by kind
        self.tokens_per_epoch = int(documents.length.sum())
        self._epoch = None

    def steps_in_epoch(self, epoch: int) -> int:
        """Number of optimizer steps in an epoch; for conversations it depends a little on their order."""
        if not self.documents.cache.is_chat:
            return math.ceil(self.tokens_per_epoch / self.step_tokens)
        self._prepare(epoch)
        return len(self._plan)

    def epoch_ends(self, epochs: int, max_steps: int = 0) -> list[int]:
        """Steps done at the end of each epoch, as far as the one in which `max_steps` (0: no limit) falls."""
        ends = [0]
        for epoch in range(epochs):
            ends.append(ends[-1] + self.steps_in_epoch(epoch))
            if 0 < max_steps <= ends[-1]:
                break
        return ends[1:]

    def step(self, epoch: int, number: int) -> Step:
        """Step `number`, from 0, of an epoch. One epoch's order is kept: ask for the steps of an epoch in a row."""
        self._prepare(epoch)
        per_micro_batch = self._cut_rows(number) if self._plan is None else self._share_out(self._plan[number])
        all_pieces = [piece for pieces in per_micro_batch for piece in pieces]
        total_weight = sum(map(self._weight, all_pieces))
        mine = per_micro_batch[self.rank * self.micro_batches_per_rank:][:self.micro_batches_per_rank]
        mine = [pieces for pieces in mine if pieces]
        weights = self.kind_weights
        if not mine:  # an epoch's last step may be too small for all ranks, but each must take part in the exchange
            mine, weights = [all_pieces[:1]], np.zeros_like(weights)
        micro_batches = [make_micro_batch(self.documents, pieces, weights) for pieces in mine]
        return Step(micro_batches, total_weight or 1.0, all_pieces)  # without any target the loss is 0, not 0/0

    def _prepare(self, epoch: int) -> None:
        """The order of an epoch, and from it the stream (text) or the plan of steps (chat)."""
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._order = np.arange(len(self.documents))
        if self.order == "shuffled":
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            self._order = order.astype(np.uint32)
        if self.documents.cache.is_chat:
            self._plan = self._plan_epoch()
        else:
            self._plan, self._ends = None, np.cumsum(self.documents.length[self._order])

    def _plan_epoch(self) -> list[list[int]]:
        """Documents of each step: first those kept back before, then the next in order, while they fit."""
        lengths, shortest = self.documents.length.tolist(), int(self.documents.length.min())
        coming, kept_back, plan = iter(self._order.tolist()), [], []
        document = next(coming, None)
        while document is not None or kept_back:
            room, chosen, still_kept = self.step_tokens, [], []
            for kept in kept_back:
                fits = lengths[kept] <= room
                (chosen if fits else still_kept).append(kept)
                room -= lengths[kept] if fits else 0
            kept_back = still_kept
            while document is not None and room >= shortest and len(kept_back) < self.LOOK_AHEAD:
                fits = lengths[document] <= room
                (chosen if fits else kept_back).append(document)
                room -= lengths[document] if fits else 0
                document = next(coming, None)
            plan.append(chosen)
        return plan

    def _share_out(self, chosen: list[int]) -> list[list[Piece]]:
        """Whole documents over the step's micro-batches, the longest first, each to the emptiest so far: all
        come out within a document's length of each other (Graham 1969, longest processing time first)."""
        shares = [[] for _ in range(self.n_micro_batches)]
        fill = [0] * self.n_micro_batches
        for document in sorted(chosen, key=lambda d: -self.documents.length[d]):
            emptiest = fill.index(min(fill))
            length = int(self.documents.length[document])
            shares[emptiest].append((document, 0, length))
            fill[emptiest] += length
        return shares

    def _cut_rows(self, number: int) -> list[list[Piece]]:
        """The stretch of the epoch's stream that is this step, cut at rows, documents and micro-batches."""
        begin = number * self.step_tokens
        end = min(begin + self.step_tokens, self.tokens_per_epoch)
        first, last = np.searchsorted(self._ends, [begin, end], side="right")
        rows = np.arange(begin, end, self.max_seq_len)
        inside = self._ends[first:last]
        cuts = np.union1d(np.append(rows, end), inside[inside < end])
        order = np.searchsorted(self._ends, cuts[:-1], side="right")
        documents = self._order[order]
        offsets = cuts[:-1] - (self._ends[order] - self.documents.length[documents])
        micro_batch = (cuts[:-1] - begin) // self.micro_batch_tokens
        shares = [[] for _ in range(self.n_micro_batches)]
        for share, document, offset, length in zip(
                micro_batch.tolist(), documents.tolist(), offsets.tolist(), np.diff(cuts).tolist(), strict=True):
            shares[share].append((document, offset, length))
        return shares

    def _weight(self, piece: Piece) -> float:
        """Sum of the loss weights of a piece's targets."""
        document, offset, length = piece
        cache = self.documents.cache
        predicting = min(length, int(self.documents.length[document]) - offset - 1)
        if not cache.is_chat:
            return predicting * float(self.documents.weight[document])
        begin = self.documents.start(document) + offset + 1
        per_kind = np.bincount(cache.kinds[begin:begin + predicting], minlength=4)
        return float(per_kind @ self.kind_weights.astype(np.float64)) * float(self.documents.weight[document])


def evaluation_batches(documents: Documents, max_seq_len: int, batch_tokens: int,
                       max_tokens: int = 0) -> Iterator[MicroBatch]:
    """Every document alone from its `<s>`, in disjoint windows of max_seq_len tokens, all targets at weight 1.

    Buffers hold up to `batch_tokens` tokens. `max_tokens` > 0 ends after the document that reaches it;
    `evaluated(documents, max_tokens)` says which those are.
    """
    pieces, filled = [], 0
    for document in range(evaluated(documents, max_tokens)):
        length = int(documents.length[document])
        for offset in range(0, length, max_seq_len):
            window = min(max_seq_len, length - offset)
            if pieces and filled + window > batch_tokens:
                yield make_micro_batch(documents, pieces, None)
                pieces, filled = [], 0
            pieces.append((document, offset, window))
            filled += window
    if pieces:
        yield make_micro_batch(documents, pieces, None)


def evaluated(documents: Documents, max_tokens: int) -> int:
    """How many of the first documents hold `max_tokens` tokens (0: all)."""
    if not max_tokens:
        return len(documents)
    return min(len(documents), int(np.searchsorted(np.cumsum(documents.length), max_tokens)) + 1)
