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
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from common.files import cannot_save, sync_folder, write_lines, write_whole
from prepare.arrange import KINDS, NO_CATEGORY, balanced_shares, rows_of, weight_of
from prepare.duplicates import REMOVING, Corpus, have_other_numbers, load_removed
from prepare.pipeline import R1, TEXT, content_of, read_jsonl
from prepare.quality import SCORED, load_scores
from prepare.report import SAMPLES
from prepare.similarity import text_key
from prepare.step import Options
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
REST = "rest-"  # in the names of files that hold several small categories
CHATS = "-chats"  # in the names of what the phase write_chats writes
SAMPLED = np.dtype([("stratum", "<u8"), ("draw", "<u8"), ("index", "<u4"), ("tokens", "<u4")])


class Written:
    """What one task, or all, wrote of each output: records, bytes and characters of text, tokens, records by source, by
    length and by category, and the bytes of each category."""

    def __init__(self):
        self.outputs: dict[str, dict] = {}

    def of(self, name: str) -> dict:
        """The counts of an output."""
        return self.outputs.setdefault(name, {"records": 0, "bytes": 0, "characters": 0, "tokens": 0,
                                              "by_source": Counter(), "lengths": Counter(),
                                              "by_category": Counter(), "category_bytes": Counter()})

    def add(self, name: str, record: dict, tokens: int = 0) -> None:
        """Count a record."""
        text, counts = content_of(record), self.of(name)
        edges, length = (TOKEN_EDGES, tokens) if tokens else (CHARACTER_EDGES, len(text))
        size = len(text.encode("utf-8"))
        for key, n in (("records", 1), ("bytes", size), ("characters", len(text)), ("tokens", tokens)):
            counts[key] += n
        if "category" in record:
            counts["by_category"][str(record["category"])] += 1
            counts["category_bytes"][str(record["category"])] += size
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
    """Writes what stays of the texts (the phase write_text) or of the chats (write_chats): those of a shard, or as many
    of those that were arranged; and what of the shard goes."""

    def __init__(self, folder: Path, phase: str, corpus: Corpus, validation: Corpus, options: Options,
                 tokenizer_path: str | None):
        super().__init__(folder, phase)
        self.phase, self.corpus, self.validation, self.options = phase, corpus, validation, options
        self.tokenizer_path = tokenizer_path

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes out/NAME/RANK…, dropped/STEP/RANK…, sample/RANK.npy, counts/PHASE/RANK and written/PHASE/RANK."""
        self.writers = Writers(self.folder, rank, "" if self.phase == "write_text" else CHATS)
        self.tally, self.written, self.rank, self.sample = Tally(), Written(), rank, []
        self._write_removed()
        kept = self._kept(world_size)
        if self.phase == "write_text":
            for record, _ in kept:
                self._write("pretrain", record)
        else:
            self._write_chats(kept)
        self.writers.close()
        if self.sample:
            save_array(numbered(self.folder / "sample", rank, ".npy"), np.array(self.sample, SAMPLED))
        save_json(numbered(self.folder / "counts" / self.phase, rank, ".json"), self.tally.steps)
        save_json(numbered(self.folder / "written" / self.phase, rank, ".json"), self.written.outputs)

    def _write_removed(self) -> None:
        """Count what of the shard the steps of REMOVING met, and write what they dropped."""
        begin, end = map(int, self.corpus.starts[self.rank:self.rank + 2])
        removed = {}
        for step in REMOVING:
            for row in load_removed(self.folder, step, begin, end):
                removed[int(row["number"])] = step, int(row["by"]), round(float(row["overlap"]), 4)
        scored = load_scores(self.folder, self.rank)
        for number, kind in enumerate(self.corpus.meta(self.rank)["kind"].tolist(), start=begin):
            if kind not in KINDS[self.phase]:
                continue
            step, by, overlap = removed.get(number, (None, 0, 0.0))
            for name in REMOVING[:-1] + (REMOVING[-1:] if kind == TEXT and self.options.keep < 1 else ()):
                self.tally.of(name)["in"]["text" if kind == TEXT else "chat"] += 1
                if name == step:
                    break
            if step is None:
                continue
            record = self.corpus.record(number)
            if step == "quality":
                scores = scored[np.searchsorted(scored["number"], number)]
                self._drop(step, record, "lower scores than those kept", {"place": overlap} | _scores(scores))
                continue
            other = (self.validation if step == "leak" else self.corpus).record(by)
            reason = {"exact": "the same text", "leak": "in a validation file", "near": "nearly the same text"}[step]
            if step == "leak" and have_other_numbers(content_of(record), content_of(other)):
                reason = "in a validation file, with other numbers"
            self._drop(step, record, reason, {"duplicate_of": other["id"], "overlap": overlap})

    def _kept(self, n_tasks: int) -> Iterator[tuple[dict, int]]:
        """(record, kind) of what this task writes, in the order of the output."""
        arranged = self.folder / "arranged" / f"{self.phase}.npy"
        if arranged.exists():
            rows = np.load(arranged, mmap_mode="r")
            rows = np.array(rows[len(rows) * self.rank // n_tasks:len(rows) * (self.rank + 1) // n_tasks])
        else:
            rows = rows_of(self.folder, self.corpus, self.rank, self.phase, self.options.seed)
        all_bpb = np.load(self.folder / "score" / "bpb.npy", mmap_mode="r") if self.options.weight_by else None
        for done, row in enumerate(rows):
            self.tick(self.rank, done / len(rows))
            record = self.corpus.record(int(row["number"]))
            more = {key: record.pop(key) for key in ("id", "source")} | _scores(row)
            if row["category"] != NO_CATEGORY:
                more["category"] = int(row["category"])
            if all_bpb is not None and row["kind"] == TEXT:
                more["weight"] = round(record.pop("weight", 1) * weight_of(row["bpb"], all_bpb), 4)
            yield more | record, int(row["kind"])

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
                draw = text_key(f"draw {self.options.seed}", content_of(record))[0]
                self.sample.append((text_key("stratum", stratum)[0], draw, len(self.sample), tokens))

    def _write(self, name: str, record: dict, tokens: int = 0) -> None:
        part = part_of(record["category"]) if self.options.balance else ""
        self.writers.of("out", name, part).write(record)
        self.written.add(name, record, tokens)

    def _drop(self, step: str, record: dict, reason: str, more: dict) -> None:
        tally, kind = self.tally.of(step), "text" if "text" in record else "chat"
        tally["dropped"][kind] += 1
        tally["reasons"][reason] += 1
        tally["by_source"][record["source"]] += 1
        line = {"id": record["id"], "source": record["source"], "reason": reason} | more | record
        self.writers.of("dropped", step).write(line)


def _scores(row: np.void) -> dict[str, float]:
    return {name: float(row[name]) for name in SCORED.names[1:] if not np.isnan(row[name])}


def part_of(category: int) -> str:
    """What stands before the number in the names of files that hold one category."""
    return f"c{category:03d}-"


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
            name = numbered(Path(), rank, f"{CHATS}.jsonl.zst").name
            pieces = sorted((self.folder / "out" / "sft_512").glob(f"*{name}"))  # with --balance one a category
            with LineWriter(self.folder / "out" / "sft_mini_512" / name) as writer:
                for index, record in enumerate(record for piece in pieces for record in read_jsonl(piece)):
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


def join_pieces(folder: Path, target: Path, name: str, limit: int = 1 << 60, parts: Iterable[str] = ("",),
                label: str = "") -> list[Path]:
    """Join the pieces of all tasks in folder/name whose names begin with one of `parts`, in their order, to files in
    `target`: NAME-LABEL00000.jsonl.zst and so on, each of at most `limit` bytes where its pieces are smaller; without a
    limit NAME.jsonl.zst. (zstd frames one after another are one file.) Returns the files. Raises UserError when the
    disk is full."""
    groups, size = [], limit
    for piece in (piece for part in parts for piece in sorted((folder / name).glob(f"{part}*.jsonl.zst"))):
        size += piece.stat().st_size
        if size > limit or not groups:
            groups.append([])
            size = piece.stat().st_size
        groups[-1].append(piece)
    paths = [target / (f"{name}-{label}{number:05d}.jsonl.zst" if limit < 1 << 60 else f"{name}.jsonl.zst")
             for number in range(len(groups))]
    for group, path in zip(groups, paths, strict=True):
        _join(group, path)
    return paths


def join_output(folder: Path, target: Path, name: str, counts: dict, options: Options) -> list[Path]:
    """The files of an output, joined in `target`; with --balance those of each category, and shares/NAME.txt, a line
    NAME-PART=SHARE for each."""
    limit = options.shard_mb * 1_000_000
    if not options.balance or name in SAMPLES:
        return join_pieces(folder / "out", target, name, limit)
    sizes = {int(category): (counts["by_category"][category], size)
             for category, size in counts["category_bytes"].items()}
    shares, paths = balanced_shares(sizes), []
    for categories in shares:
        label = part_of(categories[0]) if len(categories) == 1 else REST
        parts = [part_of(category) for category in categories]
        paths += join_pieces(folder / "out", target, name, limit, parts, label)
    labels = [path.name.removesuffix(".jsonl.zst").rpartition("-")[0] for path in paths]
    write_lines(target / "shares" / f"{name}.txt", [
        f"{label}={share:.6f}" for label, share in zip(dict.fromkeys(labels), shares.values(), strict=True)])
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
            "by_category": dict(sorted(counts["by_category"].items(), key=lambda item: int(item[0]))),
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


