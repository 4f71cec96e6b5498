"""The phases that read and clean: raw files → shards of records → cleaned shards.

read   a task a raw file      records in our forms, in shards of about --task_mb
clean  a task a shard         every rule that looks at one record alone (text_steps.py, chat_steps.py)
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datatrove.data import Document

from prepare import chat_steps
from prepare.inputs import RawFile, RawReader
from prepare.numbers import number_sequence, operators
from prepare.similarity import normalize, text_key
from prepare.step import Drop, Options, Step
from prepare.steps import STEP_OF, STEPS
from prepare.work import LineWriter, Tally, WorkStep, Writers, load_json, numbered, save_array, save_json
from text.records import read_lines

TEXT, CHAT, R1 = range(3)  # kinds of records
# of each cleaned record: where its line begins in the shard, and its bytes; its characters but white space; the key of
# its normalized text; for chats a hash of the numbers and operators in it, in their order
META = np.dtype([("offset", "<u8"), ("size", "<u4"), ("kind", "u1"), ("chars", "<u4"), ("key", "<u8", 2),
                 ("numbers", "<u8")])


def to_record(document: Document) -> dict:
    """A document as a record of ours, with "id" (file:line) and "source"."""
    metadata = document.metadata
    content = {key: metadata[key] for key in ("conversations", "weight") if key in metadata}
    if "conversations" not in content:
        content = {"text": document.text} | content
    return {"id": document.id, "source": metadata["source"]} | content


def to_document(record: dict) -> Document:
    """The opposite of `to_record`."""
    metadata = {key: value for key, value in record.items() if key not in ("id", "text")}
    return Document(record.get("text", ""), record["id"], metadata=metadata)


def content_of(record: dict) -> str:
    """A record's text: of a chat, its messages joined by line feeds."""
    if "text" in record:
        return record["text"]
    return "\n".join(message["content"] for message in record["conversations"])


def n_visible(text: str) -> int:
    """The length of a text in characters, without white space: by it the longest of a group of duplicates is chosen."""
    return sum(map(len, text.split()))


# ---------------------------------------------------------------------------------------------
# read


class ReadRaw(WorkStep):
    """Yields the records of a raw file as documents. `limit`: that many of a file at most."""

    def __init__(self, folder: Path, files: list[RawFile], rename_field, limit: int | None):
        super().__init__(folder, "read raw files")
        self.files, self.rename_field, self.limit, self.reader = files, rename_field, limit, None

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents of file `rank`."""
        file = self.files[rank]
        self.reader = RawReader(file, self.rename_field)
        for number, record in self.reader.read(self.limit):
            self.tick(rank, self.reader.n_read / max(1, file.size))
            yield to_document({"id": f"{file.path}:{number}"} | record)


class WriteShards(WorkStep):
    """Writes documents in shards of about `shard_bytes`, and what the reader counted."""

    def __init__(self, folder: Path, reading: ReadRaw, shard_bytes: int):
        super().__init__(folder, "write shards")
        self.reading, self.shard_bytes = reading, shard_bytes

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes read/RANK-SHARD.jsonl.zst and read/RANK.json."""
        shards, writer, sources = [], None, Counter()
        for document in data:
            sources[document.metadata["source"]] += 1
            if writer is None:
                writer = LineWriter(self.folder / "read" / f"{rank:06d}-{len(shards):06d}.jsonl.zst")
            writer.write(to_record(document))
            if writer.raw_bytes >= self.shard_bytes:
                writer, shards = self._close(writer, shards)
        if writer is not None:
            self._close(writer, shards)
        save_json(numbered(self.folder / "read", rank, ".json"),
                  {"input": self.reading.reader.summary() | {"by_source": sources}, "shards": shards})

    @staticmethod
    def _close(writer: LineWriter, shards: list[dict]) -> tuple[None, list[dict]]:
        writer.close()
        shards.append({"file": writer.path.name, "records": writer.records, "bytes": writer.raw_bytes})
        return None, shards


class Shard(NamedTuple):
    """One shard that the read phase wrote."""

    path: Path
    records: int
    is_val: bool


def read_results(folder: Path, n_files: int) -> tuple[list[dict], list[Shard]]:
    """Of the read phase: the summary of each file, and the shards in the order of the input."""
    summaries, shards = [], []
    for task in range(n_files):
        result = load_json(numbered(folder / "read", task, ".json"))
        summaries.append(result["input"])
        is_val = result["input"]["role"] == "val"
        shards += [Shard(folder / "read" / shard["file"], shard["records"], is_val) for shard in result["shards"]]
    return summaries, shards


def read_jsonl(path: Path) -> Iterator[dict]:
    """The records of a file that LineWriter wrote. Raises UserError where it is damaged."""
    return (json.loads(line) for _, line in read_lines(path))


# ---------------------------------------------------------------------------------------------
# clean


class ReadShard(WorkStep):
    """Yields the documents of a shard."""

    def __init__(self, folder: Path, shards: list[Shard]):
        super().__init__(folder, "read shard")
        self.shards = shards

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents of shard `rank`."""
        shard = self.shards[rank]
        for index, record in enumerate(read_jsonl(shard.path)):
            self.tick(rank, index / max(1, shard.records))
            document = to_document(record)
            document.metadata["is_val"] = shard.is_val
            yield document


class Apply(WorkStep):
    """Applies one rule. A document that it drops goes on with "dropped": (step, reason), for the last step to write;
    one of a validation file is cleaned like the others, since it is compared with them, and never dropped."""

    def __init__(self, folder: Path, step: str, options: Options, tally: Tally):
        super().__init__(folder, step)
        self.options, self.tally = options, tally

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields every document, changed or not."""
        step, tally = STEP_OF[self.name], self.tally.of(self.name)
        for document in data:
            chat = document.metadata.get("conversations")
            kind = "text" if chat is None else "chat"
            if "dropped" in document.metadata or (step.on, kind) in (("text", "chat"), ("chat", "text")):
                yield document
                continue
            is_val = document.metadata["is_val"]
            before = document.text if chat is None else chat
            after = self._apply(step, before, Counter() if is_val else tally["counts"])
            if not is_val:
                tally["in"][kind] += 1
            if isinstance(after, Drop):
                if not is_val:
                    tally["dropped"][kind] += 1
                    tally["reasons"][after.reason] += 1
                    tally["by_source"][document.metadata["source"]] += 1
                    document.metadata["dropped"] = step.name, after.reason
            elif after != before:
                tally["changed"][kind] += not is_val
                if chat is None:
                    document.text = after
                else:
                    document.metadata["conversations"] = after
            yield document

    def _apply(self, step: Step, value, counts: Counter):
        options = self.options
        if isinstance(value, str) or step.on == "chat":
            return step.apply(value, options, counts)
        if step.on == "whole":
            result = step.apply("\n".join(message["content"] for message in value), options, counts)
            return result if isinstance(result, Drop) else value
        messages = []
        for message in value:
            message = dict(message)
            for key in ("content", "reasoning_content"):
                if key in message:
                    message[key] = step.apply(message[key], options, counts)
                    if isinstance(message[key], Drop):
                        return message[key]
            messages.append(message)
        return messages


class ListMentions(WorkStep):
    """Notes which lists a chat belongs to, such as refusals, as it is before the steps on chats."""

    def __init__(self, folder: Path):
        super().__init__(folder, "list")

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields every document."""
        for document in data:
            chat = document.metadata.get("conversations")
            if chat is not None and not document.metadata["is_val"] and "dropped" not in document.metadata and (
                    names := chat_steps.listed(chat)):
                document.metadata["listed"] = [(name, chat) for name in names]
            yield document


class WriteClean(WorkStep):
    """Writes what stays of a shard, what was dropped and what is listed, each in a file of its own, and the counts."""

    def __init__(self, folder: Path, tally: Tally):
        super().__init__(folder, "write")
        self.tally = tally

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes clean/RANK.jsonl with RANK.npy (META), dropped/STEP/RANK…, listed/NAME/RANK… and counts/clean/RANK."""
        kept, others = LineWriter(numbered(self.folder / "clean", rank, ".jsonl")), Writers(self.folder, rank)
        meta, offset = [], 0
        for document in data:
            dropped, listed = (document.metadata.pop(key, None) for key in ("dropped", "listed"))
            document.metadata.pop("is_val")
            record = to_record(document)
            for name, chat in listed or ():
                others.of("listed", name).write(record | {"conversations": chat})
            if dropped is not None:
                step, reason = dropped
                others.of("dropped", step).write(
                    {"id": record["id"], "source": record["source"], "reason": reason} | record)
                continue
            size = kept.write(record)
            meta.append((offset, size, *self._meta(record)))
            offset += size
        kept.close()
        others.close()
        save_array(numbered(self.folder / "clean", rank, ".npy"), np.array(meta, META))
        save_json(numbered(self.folder / "counts" / "clean", rank, ".json"), self.tally.steps)

    @staticmethod
    def _meta(record: dict) -> tuple:
        text = content_of(record)
        if "text" in record:
            return TEXT, n_visible(text), text_key("text", normalize(text)), 0
        numbers = "\0".join((*number_sequence(text), *operators(text)))
        turns = "\0".join(f"{message['role']}\0{normalize(message['content'])}" for message in record["conversations"])
        kind = R1 if chat_steps.is_r1(record["conversations"]) else CHAT
        return kind, n_visible(text), text_key("chat", f"{turns}\0\0{numbers}"), text_key("numbers", numbers)[0]


def clean_text(text: str, options: Options) -> str | None:
    """A document as the clean phase would leave it; None where a step drops it."""
    for step in STEPS:
        if step.on != "chat" and step.name not in options.skip and step.when(options):
            after = step.apply(text, options, Counter())
            if isinstance(after, Drop):
                return None
            text = after
    return text


def clean_pipeline(folder: Path, shards: list[Shard], options: Options) -> list[WorkStep]:
    """The steps of the clean phase that the options ask for."""
    tally = Tally()
    steps = [step for step in STEPS if step.name not in options.skip and step.when(options)]
    applied = [Apply(folder, step.name, options, tally) for step in steps]
    first = next((i for i, step in enumerate(steps) if step.on == "chat"), len(steps))
    return [ReadShard(folder, shards), *applied[:first], ListMentions(folder), *applied[first:],
            WriteClean(folder, tally)]
