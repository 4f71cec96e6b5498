"""The phases that write: what stays, by stage; then the files that the stages read.

write_text    a task a shard    documents → pretrain; what was dropped as a duplicate or a leak
write_chats   a task a shard    chats → sft_512, sft_1024, r1_1024, by the tokens of the project's tokenizer
mini          a task a shard    the sample of sft_512
publish       the pieces of all tasks, one after another, under their final names
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.files import cannot_save, sync_folder, write_whole
from prepare.duplicates import Corpus, have_other_numbers, load_removed
from prepare.pipeline import R1, TEXT, content_of, read_jsonl
from prepare.similarity import text_key
from prepare.work import LineWriter, Tally, WorkStep, Writers, load_json, numbered, save_array, save_json
from text.chat import ChatEncoder
from text.records import unpack
from text.sources import PUBLISHING
from text.tokenizer import load_tokenizer

LIMITS = (512, 1024)  # tokens of a chat in sft_512 and sft_1024; of an R1 chat, in r1_1024, the second
CHARACTER_EDGES = (0, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, float("inf"))
TOKEN_EDGES = (0, 33, 65, 129, 257, 513, 769, 1025)
MINI_EDGES = (65, 129, 257)  # tokens: the sample keeps the shares of short and long chats
CHATS_AT_ONCE = 256
OUTPUTS = ("pretrain", "sft_512", "sft_mini_512", "sft_1024", "r1_1024")
CHATS = "-chats"  # in the names of what the phase write_chats writes
SAMPLED = np.dtype([("stratum", "<u8"), ("draw", "<u8"), ("index", "<u4"), ("tokens", "<u4")])


class Written:
    """What one task, or all, wrote of each output: records, bytes and characters of text, tokens, records by source and
    by length."""

    def __init__(self):
        self.outputs: dict[str, dict] = {}

    def of(self, name: str) -> dict:
        """The counts of an output."""
        return self.outputs.setdefault(name, {"records": 0, "bytes": 0, "characters": 0, "tokens": 0,
                                              "by_source": Counter(), "lengths": Counter()})

    def add(self, name: str, record: dict, tokens: int = 0) -> None:
        """Count a record."""
        text, counts = content_of(record), self.of(name)
        edges, length = (TOKEN_EDGES, tokens) if tokens else (CHARACTER_EDGES, len(text))
        for key, n in (("records", 1), ("bytes", len(text.encode("utf-8"))), ("characters", len(text)),
                       ("tokens", tokens)):
            counts[key] += n
        counts["by_source"][record["source"]] += 1
        counts["lengths"][str(int(np.searchsorted(edges, length, "right")) - 1)] += 1

    def merge(self, outputs: dict[str, dict]) -> None:
        """Add the counts that another saved."""
        for name, other in outputs.items():
            counts = self.of(name)
            for key, value in other.items():
                if isinstance(counts[key], Counter):
                    counts[key].update(value)
                else:
                    counts[key] += value


class WriteStage(WorkStep):
    """Writes what stays of a shard's texts, or of its chats."""

    def __init__(self, folder: Path, corpus: Corpus, validation: Corpus, kinds: tuple[int, ...],
                 tokenizer_path: str | None, seed: int):
        super().__init__(folder, "write text" if TEXT in kinds else "write chats")
        self.corpus, self.validation, self.kinds = corpus, validation, kinds
        self.tokenizer_path, self.seed = tokenizer_path, seed
        self.phase = "write_text" if TEXT in kinds else "write_chats"

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes out/NAME/RANK…, dropped/STEP/RANK…, sample/RANK.npy, counts/PHASE/RANK and written/PHASE/RANK."""
        meta = self.corpus.meta(rank)
        self.writers = Writers(self.folder, rank, "" if TEXT in self.kinds else CHATS)
        self.tally, self.written, self.rank, self.sample = Tally(), Written(), rank, []
        if np.isin(meta["kind"], self.kinds).any():
            kept = self._kept(meta)
            if TEXT in self.kinds:
                for record, _ in kept:
                    self._write("pretrain", record)
            else:
                self._write_chats(kept)
        self.writers.close()
        if self.sample:
            save_array(numbered(self.folder / "sample", rank, ".npy"), np.array(self.sample, SAMPLED))
        save_json(numbered(self.folder / "counts" / self.phase, rank, ".json"), self.tally.steps)
        save_json(numbered(self.folder / "written" / self.phase, rank, ".json"), self.written.outputs)

    def _kept(self, meta: np.ndarray) -> Iterator[tuple[dict, int]]:
        """(record, kind) of what is no duplicate and no leak; writes the others."""
        begin, end = map(int, self.corpus.starts[self.rank:self.rank + 2])
        removed = {}
        for step in ("exact", "leak", "near"):
            for row in load_removed(self.folder, step, begin, end):
                removed[int(row["number"])] = step, int(row["by"]), float(row["overlap"])
        for number in range(begin, end):
            self.tick(self.rank, (number - begin) / (end - begin))
            kind = int(meta[number - begin]["kind"])
            if kind not in self.kinds:
                continue
            record, what = self.corpus.record(number), "text" if kind == TEXT else "chat"
            step, by, overlap = removed.get(number, (None, 0, 0.0))
            for name in ("exact", "leak", "near"):
                self.tally.of(name)["in"][what] += 1
                if name == step:
                    break
            if step is None:
                yield record, kind
                continue
            other = (self.validation if step == "leak" else self.corpus).record(by)
            reason = {"exact": "the same text", "leak": "in a validation file", "near": "nearly the same text"}[step]
            if step == "leak" and have_other_numbers(content_of(record), content_of(other)):
                reason = "in a validation file, with other numbers"
            self._drop(step, record, reason, {"duplicate_of": other["id"], "overlap": round(overlap, 4)})

    def _write_chats(self, kept: Iterator[tuple[dict, int]]) -> None:
        encoder = ChatEncoder.of(load_tokenizer(self.tokenizer_path))
        batch = []
        for item in kept:
            batch.append(item)
            if len(batch) == CHATS_AT_ONCE:
                self._write_batch(encoder, batch)
                batch = []
        self._write_batch(encoder, batch)

    def _write_batch(self, encoder: ChatEncoder, batch: list[tuple[dict, int]]) -> None:
        lengths = [0] * len(batch)
        for thinking in (False, True):
            places = [place for place, (_, kind) in enumerate(batch) if (kind == R1) == thinking]
            encoded = encoder.encode([batch[place][0]["conversations"] for place in places], thinking) if places else []
            for place, one in zip(places, encoded, strict=True):
                lengths[place] = len(one.ids)
        for (record, kind), tokens in zip(batch, lengths, strict=True):
            self.tally.of("too_long")["in"]["chat"] += 1
            name = "r1_1024" if kind == R1 else "sft_512" if tokens <= LIMITS[0] else "sft_1024"
            if tokens > LIMITS[1]:
                self._drop("too_long", record, f"more than {LIMITS[1]:,} tokens", {"tokens": tokens})
                continue
            self._write(name, record, tokens)
            if name == "sft_512":
                stratum = f"{record['source']}\0{np.searchsorted(MINI_EDGES, tokens)}"
                draw = text_key(f"draw {self.seed}", content_of(record))[0]
                self.sample.append((text_key("stratum", stratum)[0], draw, len(self.sample), tokens))

    def _write(self, name: str, record: dict, tokens: int = 0) -> None:
        self.writers.of("out", name).write(record)
        self.written.add(name, record, tokens)

    def _drop(self, step: str, record: dict, reason: str, more: dict) -> None:
        tally, kind = self.tally.of(step), "text" if "text" in record else "chat"
        tally["dropped"][kind] += 1
        tally["reasons"][reason] += 1
        tally["by_source"][record["source"]] += 1
        line = {"id": record["id"], "source": record["source"], "reason": reason} | more | record
        self.writers.of("dropped", step).write(line)


def choose_sample(folder: Path, share: float) -> None:
    """Choose the sample of sft_512: of each stratum (source and length) this share, at least one record, those with the
    smallest draws. Writes sample/chosen/TASK.npy, those of each task's piece (SAMPLED)."""
    tasks = sorted(int(file.stem) for file in (folder / "sample").glob("*.npy"))
    parts = [np.load(numbered(folder / "sample", task, ".npy")) for task in tasks]
    task_of = np.repeat(tasks, [len(part) for part in parts])
    rows = np.concatenate([np.empty(0, SAMPLED), *parts])
    order = np.lexsort((rows["index"], task_of, rows["draw"], rows["stratum"]))
    strata, begins, counts = np.unique(rows["stratum"][order], return_index=True, return_counts=True)
    take = np.maximum(1, np.round(counts * share)).astype(int) if share else np.zeros_like(counts)
    parts = [order[begin:begin + n] for begin, n in zip(begins, take, strict=True)]
    chosen = np.concatenate([np.empty(0, np.int64), *parts])
    for task in tasks:
        mine = chosen[task_of[chosen] == task]
        save_array(numbered(folder / "sample" / "chosen", task, ".npy"), np.sort(rows[mine], order="index"))


class WriteSample(WorkStep):
    """Copies the chosen records of sft_512 to sft_mini_512."""

    def __init__(self, folder: Path):
        super().__init__(folder, "write the sample")

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes out/sft_mini_512/RANK… and written/mini/RANK."""
        written, file = Written(), numbered(self.folder / "sample" / "chosen", rank, ".npy")
        rows = np.load(file) if file.exists() else ()
        if len(rows):
            tokens = dict(zip(rows["index"].tolist(), rows["tokens"].tolist(), strict=True))
            whole, sample = (numbered(self.folder / "out" / name, rank, f"{CHATS}.jsonl.zst")
                             for name in ("sft_512", "sft_mini_512"))
            with LineWriter(sample) as writer:
                for index, record in enumerate(read_jsonl(whole)):
                    if index in tokens:
                        writer.write(record)
                        written.add("sft_mini_512", record, tokens[index])
        save_json(numbered(self.folder / "written" / "mini", rank, ".json"), written.outputs)


# ---------------------------------------------------------------------------------------------
# publish


def sum_counts(folder: Path) -> tuple[Tally, Written]:
    """The counts of all tasks of all phases, from the tasks' own files: datatrove's are wrong after a resume."""
    tally, written = Tally(), Written()
    for file in sorted((folder / "counts").glob("*/*.json")):
        tally.add(load_json(file))
    for file in sorted((folder / "written").glob("*/*.json")):
        written.merge(load_json(file))
    return tally, written


def join_pieces(folder: Path, target: Path, name: str, limit: int = 1 << 60) -> list[Path]:
    """Join the pieces of all tasks in folder/name, in their order, to files in `target`: NAME-00000.jsonl.zst and so
    on, each of at most `limit` bytes where its pieces are smaller; without a limit NAME.jsonl.zst. (zstd frames one
    after another are one file.) Returns the files. Raises UserError when the disk is full."""
    groups, size = [], limit
    for piece in sorted((folder / name).glob("*.jsonl.zst")):
        size += piece.stat().st_size
        if size > limit or not groups:
            groups.append([])
            size = piece.stat().st_size
        groups[-1].append(piece)
    paths = [target / (f"{name}-{number:05d}.jsonl.zst" if limit < 1 << 60 else f"{name}.jsonl.zst")
             for number in range(len(groups))]
    for group, path in zip(groups, paths, strict=True):
        _join(group, path)
    return paths


def _join(pieces: list[Path], path: Path) -> None:
    def write(stream) -> None:
        for piece in pieces:
            with open(piece, "rb") as part:
                shutil.copyfileobj(part, stream, 1 << 20)

    write_whole(path, write)


def describe_file(path: Path) -> dict:
    """The bytes, hash and records of a file of JSON lines, for the manifest."""
    records = 0
    with open(path, "rb") as packed:
        sha256 = hashlib.file_digest(packed, "sha256").hexdigest()
        packed.seek(0)
        lines = unpack(packed, path.suffix)
        while block := lines.read(1 << 20):
            records += block.count(b"\n")
    return {"bytes": path.stat().st_size, "sha256": sha256, "records": records}


def describe_output(name: str, counts: dict, files: list[Path]) -> dict:
    """An output for the manifest."""
    edges, unit = (TOKEN_EDGES, "tokens") if counts["tokens"] else (CHARACTER_EDGES, "characters")
    return {"name": name, "records": counts["records"], "bytes": counts["bytes"], "characters": counts["characters"],
            "tokens": counts["tokens"] or None, "files": [{"name": path.name} | describe_file(path) for path in files],
            "by_source": dict(sorted(counts["by_source"].items())),
            "lengths": {"unit": unit, "edges": [None if edge == float("inf") else edge for edge in edges],
                        "counts": [counts["lengths"][str(i)] for i in range(len(edges) - 1)]}}


def publish(staged: Path, out_dir: Path) -> None:
    """Give all files below `staged` their names in out_dir. Until all have them, the file PUBLISHING in out_dir tells
    the stages that what is there is not whole."""
    marker = out_dir / PUBLISHING
    try:
        marker.touch()
        sync_folder(out_dir)
        files = (path for path in staged.rglob("*") if path.is_file())
        for file in sorted(files, key=lambda path: (path.name == "manifest.json", path)):  # it says that all is there
            target = out_dir / file.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        for folder in {out_dir, *(path for path in out_dir.iterdir() if path.is_dir())}:
            sync_folder(folder)
        marker.unlink()
        sync_folder(out_dir)
    except OSError as error:
        raise cannot_save(out_dir, error) from None


