"""The phases that find duplicates and leaks.

exact    a task a range of keys    records whose normalized text is the same: the longest stays, then the first
leaks    one task                  an index of the shingles of all validation files
sign     a task a shard            signatures of what is left; records that contain validation text
bands    a task a band             pairs that may be near-duplicates, by their signatures
verify   a task some pairs         their true overlap
decide   one task                  which of them go

A record is known by its number: its place among all cleaned training records, in the order of the input.
"""

import json
import mmap
from collections import Counter, OrderedDict, defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from prepare.numbers import number_sequence, operators
from prepare.pipeline import TEXT, content_of
from prepare.similarity import (
    BANDS,
    HASHES,
    band_hashes,
    band_keys,
    jaccard,
    normalize,
    shingles,
    signature,
    text_key,
)
from prepare.step import Options
from prepare.work import WorkStep, numbered, save_array

# `by`: the record that stays, or the validation record
REMOVED = np.dtype([("number", "<u8"), ("by", "<u8"), ("overlap", "<f4")])
REMOVING = ("exact", "leak", "near", "quality")  # the steps that say which records go, in their order
SIGNED = np.dtype([("number", "<u8"), ("size", "<u4"), ("chars", "<u4"), ("group", "<u8")])  # size: of the shingle set
# a part of validation: the record, the place of a message in its chat or WHOLE, the size of the shingle set
UNIT = np.dtype([("number", "<u4"), ("place", "<i4"), ("size", "<u4")])
PAIR = np.dtype([("a", "<u8"), ("b", "<u8"), ("overlap", "<f4")])
RECORDS_IN_RANGE = 8_000_000  # whose keys the exact and the band phase sort at once, in about 500 MB
MOST_NEIGHBORS = 200  # of a record in one band: of more, those of about its size
MOST_LINKS = 32  # of them that are likely duplicates: enough to link a group of thousands of copies
DOUBT = 0.15  # an overlap estimated by 100 hashes is off by more than this in one of a thousand
LEAST_SHINGLES = 5  # a shorter validation text is only compared as a whole: its few words stand in many texts
LEAST_QUESTION, LEAST_REPLY = 12, 40  # characters: shorter messages of a validation chat are only compared in it
VERBATIM = 0.9  # of the shingles of a message: templates of questions share less
WHOLE = -1
PAIRS_IN_TASK = 20_000
PAIRS_AT_ONCE = 50_000  # whose signatures are compared at once: 40 MB
SETS_BYTES = 64_000_000  # of shingle sets that a task keeps
MAPS_OPEN = 256  # files mapped at once


class Corpus:
    """The cleaned records of some shards, by number: `starts` (n_shards + 1,) where the numbers of each begin."""

    def __init__(self, folder: Path, tasks: list[int], counts: list[int]):
        self.folder, self.tasks = folder, tasks
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._open: dict[int, tuple] = {}

    def __getstate__(self):
        return {"folder": self.folder, "tasks": self.tasks, "starts": self.starts, "_open": {}}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def meta(self, shard: int) -> np.ndarray:
        """META of a shard's records."""
        return np.load(numbered(self.folder / "clean", self.tasks[shard], ".npy"))

    def record(self, number: int) -> dict:
        """A record."""
        shard = int(np.searchsorted(self.starts, number, "right")) - 1
        if shard not in self._open:
            if len(self._open) >= MAPS_OPEN:
                del self._open[next(iter(self._open))]
            with open(numbered(self.folder / "clean", self.tasks[shard], ".jsonl"), "rb") as file:
                lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            meta = numbered(self.folder / "clean", self.tasks[shard], ".npy")
            self._open[shard] = lines, np.load(meta, mmap_mode="r")
        lines, meta = self._open[shard]
        offset, size = (int(meta[number - self.starts[shard]][name]) for name in ("offset", "size"))
        return json.loads(lines[offset:offset + size])


def corpora(folder: Path, shards) -> tuple[Corpus, Corpus]:
    """(training, validation) records after the clean phase."""
    made = []
    for is_val in (False, True):
        tasks = [task for task, shard in enumerate(shards) if shard.is_val == is_val]
        counts = [len(np.load(numbered(folder / "clean", task, ".npy"), mmap_mode="r")) for task in tasks]
        made.append(Corpus(folder, tasks, counts))
    return made[0], made[1]


def n_ranges(n_records: int) -> int:
    """In how many parts of the key space records are sorted, so that each fits into memory."""
    return max(1, -(-n_records // RECORDS_IN_RANGE))


# ---------------------------------------------------------------------------------------------
# exact


class FindExact(WorkStep):
    """Finds records with the same key, in one range of keys a task."""

    def __init__(self, folder: Path, corpus: Corpus):
        super().__init__(folder, "exact duplicates")
        self.corpus = corpus

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes exact/RANK.npy (REMOVED)."""
        keys, chars, numbers = [np.empty((0, 2), "<u8")], [np.empty(0, "<u4")], [np.empty(0, "<u8")]
        for shard, start in enumerate(self.corpus.starts[:-1]):
            self.tick(rank, shard / len(self.corpus.tasks))
            meta = self.corpus.meta(shard)
            mine = np.flatnonzero(meta["key"][:, 0] % np.uint64(world_size) == rank)
            keys.append(meta["key"][mine])
            chars.append(meta["chars"][mine])
            numbers.append(mine.astype("<u8") + np.uint64(start))
        keys, chars, numbers = np.concatenate(keys), np.concatenate(chars), np.concatenate(numbers)
        order = np.lexsort((numbers, -chars.astype(np.int64), keys[:, 1], keys[:, 0]))
        keys, numbers = keys[order], numbers[order]
        is_new = np.ones(len(keys), bool)
        is_new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        stays = numbers[is_new][np.cumsum(is_new) - 1]
        removed = np.empty(np.count_nonzero(~is_new), REMOVED)
        removed["number"], removed["by"], removed["overlap"] = numbers[~is_new], stays[~is_new], 1
        save_array(numbered(self.folder / "exact", rank, ".npy"), np.sort(removed, order="number"))


@lru_cache(maxsize=1)
def _all_leaks(folder: Path, changed: int) -> np.ndarray:
    """REMOVED of all leaks, which are few and in a file for each shard. `changed`: when the folder last was."""
    return np.concatenate([np.empty(0, REMOVED), *(np.load(file) for file in sorted(folder.glob("*.npy")))])


def load_removed(folder: Path, name: str, begin: int, end: int) -> np.ndarray:
    """REMOVED of the records with numbers begin ≤ n < end, of one of the phases, sorted."""
    if name == "leak" and (folder / name).exists():
        leaks = _all_leaks(folder / name, (folder / name).stat().st_mtime_ns)
        a, b = np.searchsorted(leaks["number"], [begin, end])
        return leaks[a:b]
    parts = [np.empty(0, REMOVED)]
    for file in sorted((folder / name).glob("*.npy")):
        removed = np.load(file, mmap_mode="r")
        a, b = np.searchsorted(removed["number"], [begin, end])
        parts.append(np.array(removed[a:b]))
    return np.sort(np.concatenate(parts), order="number")


def staying(folder: Path, begin: int, end: int) -> np.ndarray:
    """(end - begin,) bool: which of the records with numbers begin ≤ n < end no phase so far removes."""
    stays = np.ones(end - begin, bool)
    for step in REMOVING:
        stays[load_removed(folder, step, begin, end)["number"].astype(np.int64) - begin] = False
    return stays


# ---------------------------------------------------------------------------------------------
# leaks


class IndexValidation(WorkStep):
    """Indexes the validation records by their shingles, in units: each record as a whole, and of a chat its longer
    messages alone. One task: validation files are small."""

    def __init__(self, folder: Path, corpus: Corpus):
        super().__init__(folder, "index of validation")
        self.corpus = corpus

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes leaks/shingles.npy (sorted, one entry a shingle), leaks/starts.npy and leaks/owners.npy (the units of
        each), leaks/units.npy (UNIT), and leaks/keys.npy with leaks/key_owners.npy (records by their whole text)."""
        hashes, owners, units, keys = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)], [], {}
        for number in range(len(self.corpus)):
            self.tick(rank, number / len(self.corpus))
            record = self.corpus.record(number)
            chat = record.get("conversations", ())
            keys.setdefault(text_key("content", normalize(content_of(record)))[0], number)
            if len(chat) == 1:  # a question of a test set
                keys.setdefault(question_key(chat[0]["content"]), number)
            parts = [(WHOLE, normalize(content_of(record)))]
            for place, message in enumerate(chat if len(chat) > 1 else ()):
                normalized = normalize(message["content"])
                if len(normalized) >= (LEAST_REPLY if message["role"] == "assistant" else LEAST_QUESTION):
                    parts.append((place, normalized))
            for place, normalized in parts:
                found = shingles(normalized)
                if len(found) >= LEAST_SHINGLES:
                    hashes.append(found)
                    owners.append(np.full(len(found), len(units), np.uint32))
                    units.append((number, place, len(found)))
        hashes, owners = np.concatenate(hashes), np.concatenate(owners)
        order = np.argsort(hashes, kind="stable")
        unique, starts = np.unique(hashes[order], return_index=True)
        sorted_keys = sorted(keys)
        for name, array in (("shingles", unique), ("starts", np.append(starts, len(hashes))), ("owners", owners[order]),
                            ("units", np.array(units, UNIT)), ("keys", np.array(sorted_keys, np.uint64)),
                            ("key_owners", np.array([keys[key] for key in sorted_keys], np.uint32))):
            save_array(self.folder / "leaks" / f"{name}.npy", array)


def question_key(question: str) -> int:
    """64 bits that identify a question, by its normalized text and its numbers."""
    return text_key("question", "\0".join([normalize(question), *number_sequence(question), *operators(question)]))[0]


def have_other_numbers(a: str, b: str) -> bool:
    """True where each of two texts has numbers that the other lacks: two word problems of one wording, say."""
    a, b = (Counter(number_sequence(text)) for text in (a, b))
    return bool(a - b and b - a)


class LeakFinder:
    """Finds the validation record that a training record holds, or is held in: of a record as a whole by containment,
    of a message of a chat where it stands in the training record word for word, but for a tenth, with all its numbers.
    """

    def __init__(self, folder: Path, validation: Corpus, contained: float, keep_other_numbers: bool):
        self.validation, self.contained, self.keep_other_numbers = validation, contained, keep_other_numbers
        self.shingles, self.starts, self.owners, self.units, self.keys, self.key_owners = (
            np.asarray(np.load(folder / "leaks" / f"{name}.npy", mmap_mode="r"))  # a plain array is faster to index
            for name in ("shingles", "starts", "owners", "units", "keys", "key_owners"))
        self.key_set = set(self.keys.tolist())
        self.smallest = int(self.units["size"].min(initial=1 << 31))

    def find(self, record: dict, normalized: str, hashed: np.ndarray) -> tuple[int, float] | None:
        """(number of the validation record, containment), or None."""
        keys = [text_key("content", normalized)[0]]
        keys += [question_key(message["content"]) for message in record.get("conversations", ())
                 if message["role"] == "user"]
        for key in keys:
            if key in self.key_set:
                return int(self.key_owners[np.searchsorted(self.keys, np.uint64(key))]), 1.0
        if not len(self.shingles) or len(hashed) < LEAST_SHINGLES:
            return None
        found = np.searchsorted(self.shingles, hashed)
        found[found == len(self.shingles)] = 0
        hits = found[self.shingles[found] == hashed]
        if len(hits) < self.contained * min(len(hashed), self.smallest):
            return None
        n_owners = self.starts[hits + 1] - self.starts[hits]
        first = np.repeat(self.starts[hits] - np.cumsum(n_owners) + n_owners, n_owners)
        candidates, common = np.unique(self.owners[first + np.arange(len(first))], return_counts=True)
        units = self.units[candidates]
        is_whole = units["place"] == WHOLE
        containment = common / np.where(is_whole, np.minimum(units["size"], len(hashed)), units["size"])
        likely = np.flatnonzero(containment >= np.where(is_whole, self.contained, VERBATIM))
        for i in likely[np.argsort(-containment[likely], kind="stable")]:
            if self._is_leak(content_of(record), "conversations" in record, units[i]):
                return int(units[i]["number"]), float(containment[i])
        return None

    def _is_leak(self, text: str, is_chat: bool, unit: np.void) -> bool:
        """Whether the numbers say so too."""
        other = self.validation.record(int(unit["number"]))
        if unit["place"] == WHOLE:
            return not (self.keep_other_numbers and is_chat and have_other_numbers(text, content_of(other)))
        message = other["conversations"][unit["place"]]["content"]
        return not Counter(number_sequence(message)) - Counter(number_sequence(text))


# ---------------------------------------------------------------------------------------------
# near duplicates


class Sign(WorkStep):
    """Computes the signatures of a shard's records that are no exact duplicates, and finds those that are leaks."""

    def __init__(self, folder: Path, corpus: Corpus, validation: Corpus, options: Options):
        super().__init__(folder, "signatures, leaks")
        self.corpus, self.validation, self.options, self.skip = corpus, validation, options, options.skip

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes sign/RANK.npy (SIGNED), signatures/RANK.npy (HASHES, n) and leak/RANK.npy (REMOVED)."""
        begin, end = map(int, self.corpus.starts[rank:rank + 2])
        removed = set(load_removed(self.folder, "exact", begin, end)["number"].tolist())
        finder = None if "leak" in self.skip else LeakFinder(
            self.folder, self.validation, self.options.contained, self.options.keep_other_numbers)
        meta, signed, signatures, leaks = self.corpus.meta(rank), [], [], []
        for number in range(begin, end):
            self.tick(rank, (number - begin) / (end - begin))
            if number in removed:
                continue
            record = self.corpus.record(number)
            normalized = normalize(content_of(record))
            hashed = shingles(normalized)
            leak = finder.find(record, normalized, hashed) if finder else None
            if leak is not None:
                leaks.append((number, *leak))
            elif len(hashed) and "near" not in self.skip:
                row = meta[number - begin]
                # chats are compared with chats in which the same numbers stand in the same order
                group = 0 if row["kind"] == TEXT else int(row["numbers"]) | 1
                signed.append((number, len(hashed), row["chars"], group))
                signatures.append(signature(hashed))
        save_array(numbered(self.folder / "sign", rank, ".npy"), np.array(signed, SIGNED))
        rows = np.array(signatures, np.uint32).reshape(-1, HASHES).T
        save_array(numbered(self.folder / "signatures", rank, ".npy"), np.ascontiguousarray(rows))
        save_array(numbered(self.folder / "leak", rank, ".npy"), np.array(leaks, REMOVED))


class Signed:
    """All signed records, by their position among them."""

    def __init__(self, folder: Path, n_shards: int):
        self.folder = folder
        parts = [np.load(numbered(folder / "sign", shard, ".npy")) for shard in range(n_shards)]
        self.rows = np.concatenate([np.empty(0, SIGNED), *parts])
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        self._maps: dict[int, np.ndarray] = {}

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            if len(self._maps) >= MAPS_OPEN:
                self._maps.clear()
            self._maps[shard] = np.load(numbered(self.folder / "signatures", shard, ".npy"), mmap_mode="r")
        return self._maps[shard]

    def keys(self, band: int, range_: int, ranges: int) -> tuple[np.ndarray, np.ndarray]:
        """(keys in one band, positions) of the records whose keys fall into one of the `ranges`."""
        keys, positions = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for shard, (a, b) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            found = band_keys(self._shard(shard)[band_hashes(band)], self.rows["group"][a:b])
            mine = np.flatnonzero(found % np.uint64(ranges) == range_)
            keys.append(found[mine])
            positions.append(mine + a)
        return np.concatenate(keys), np.concatenate(positions)

    def signatures(self, positions: np.ndarray) -> np.ndarray:
        """The signatures (n, HASHES) of the records at sorted positions."""
        made = np.empty((len(positions), HASHES), np.uint32)
        bounds = np.searchsorted(positions, self.starts)
        for shard in np.flatnonzero(bounds[1:] > bounds[:-1]).tolist():
            a, b = bounds[shard:shard + 2]
            made[a:b] = self._shard(shard)[:, positions[a:b] - self.starts[shard]].T
        return made

    def estimates(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The estimated overlap of pairs of positions."""
        positions, where = np.unique(np.concatenate([a, b]), return_inverse=True)
        signatures = self.signatures(positions)
        return (signatures[where[:len(a)]] == signatures[where[len(a):]]).mean(axis=1)


class FindPairs(WorkStep):
    """Finds pairs that have one band in common and may overlap enough."""

    def __init__(self, folder: Path, n_shards: int, near: float):
        super().__init__(folder, "candidates")
        self.n_shards, self.near = n_shards, near

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Task RANK is one band, and one range of its keys: writes pairs/RANK.npy, positions (n, 2)."""
        signed = Signed(self.folder, self.n_shards)
        band, range_, ranges = rank % BANDS, rank // BANDS, world_size // BANDS
        keys, positions = signed.keys(band, range_, ranges)
        order = np.lexsort((signed.rows["size"][positions], keys))
        keys, order = keys[order], positions[order]
        size = signed.rows["size"][order].astype(np.float64)
        found, links = [np.empty((0, 2), np.int64)], np.zeros(len(order), np.int64)
        for distance in range(1, MOST_NEIGHBORS + 1):
            first = np.flatnonzero(keys[distance:] == keys[:-distance])
            if not len(first):
                break
            first = first[size[first] >= self.near * size[first + distance]]  # else they cannot overlap enough
            first = first[links[first + distance] < MOST_LINKS]
            for begin in range(0, len(first), PAIRS_AT_ONCE):
                self.tick(rank, distance / MOST_NEIGHBORS)
                some = first[begin:begin + PAIRS_AT_ONCE]
                a, b = order[some], order[some + distance]
                likely = signed.estimates(a, b) >= self.near - DOUBT
                links[some[likely] + distance] += 1
                found.append(np.stack([np.minimum(a, b)[likely], np.maximum(a, b)[likely]], axis=1))
        save_array(numbered(self.folder / "pairs", rank, ".npy"), np.unique(np.concatenate(found), axis=0))


def merge_pairs(folder: Path, tasks: int) -> int:
    """Put the pairs of all bands together, each once, in pairs/all.npy. Returns their number."""
    parts = [np.load(numbered(folder / "pairs", task, ".npy")) for task in range(tasks)]
    pairs = np.unique(np.concatenate([np.empty((0, 2), np.int64), *parts]), axis=0)
    save_array(folder / "pairs" / "all.npy", pairs)
    return len(pairs)


class _Sets:
    """The shingles of records, the last ones kept."""

    def __init__(self, corpus: Corpus):
        self.corpus, self.kept, self.bytes = corpus, OrderedDict(), 0

    def of(self, number: int) -> np.ndarray:
        if number in self.kept:
            self.kept.move_to_end(number)
            return self.kept[number]
        found = shingles(normalize(content_of(self.corpus.record(number))))
        self.kept[number] = found
        self.bytes += found.nbytes
        while self.bytes > SETS_BYTES and len(self.kept) > 2:
            self.bytes -= self.kept.popitem(last=False)[1].nbytes
        return found


class Verify(WorkStep):
    """Computes the overlap of some of the pairs."""

    def __init__(self, folder: Path, corpus: Corpus, near: float):
        super().__init__(folder, "verify")
        self.corpus, self.near = corpus, near

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes verified/RANK.npy (PAIR, of positions), the pairs that overlap enough."""
        begin, end = rank * PAIRS_IN_TASK, (rank + 1) * PAIRS_IN_TASK
        pairs = np.load(self.folder / "pairs" / "all.npy", mmap_mode="r")[begin:end]
        numbers = Signed(self.folder, len(self.corpus.tasks)).rows["number"]
        sets, found = _Sets(self.corpus), []
        for done, (a, b) in enumerate(pairs.tolist()):
            self.tick(rank, done / len(pairs))
            overlap = jaccard(sets.of(int(numbers[a])), sets.of(int(numbers[b])))
            if overlap >= self.near:
                found.append((a, b, overlap))
        save_array(numbered(self.folder / "verified", rank, ".npy"), np.array(found, PAIR))


class Decide(WorkStep):
    """Decides which near-duplicates go: of records that are linked by overlaps, from the longest to the shortest, each
    that overlaps enough with one that stays. So every record that goes has one that stays in its place."""

    def __init__(self, folder: Path, corpus: Corpus, near: float, tasks: int):
        super().__init__(folder, "decide")
        self.corpus, self.near, self.tasks = corpus, near, tasks

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes near/000000.npy (REMOVED)."""
        parts = [np.load(numbered(self.folder / "verified", task, ".npy")) for task in range(self.tasks)]
        pairs = np.concatenate([np.empty(0, PAIR), *parts])
        signed, sets, removed = Signed(self.folder, len(self.corpus.tasks)), _Sets(self.corpus), []
        for done, members in enumerate(_components(pairs)):
            self.tick(rank, min(0.99, done / 1000))
            members = np.array(members)
            rows = signed.rows[members]
            order = np.lexsort((rows["number"], -rows["chars"].astype(np.int64)))
            members, rows = members[order], rows[order]
            by_position = np.argsort(members)
            signatures = np.empty((len(members), HASHES), np.uint32)
            signatures[by_position] = signed.signatures(members[by_position])
            stays: list[int] = []
            for i, row in enumerate(rows):
                likely = (signatures[stays] == signatures[i]).mean(axis=1) >= self.near - DOUBT if stays else ()
                overlaps = [(jaccard(sets.of(int(row["number"])), sets.of(int(rows[j]["number"]))), -j)
                            for j in np.array(stays)[likely]] if len(likely) else []
                overlap, j = max(overlaps, default=(0.0, 0))
                if overlap >= self.near:
                    removed.append((row["number"], rows[-j]["number"], overlap))
                else:
                    stays.append(i)
        save_array(numbered(self.folder / "near", 0, ".npy"), np.sort(np.array(removed, REMOVED), order="number"))


def describe_near(folder: Path, n_pairs: int) -> dict:
    """The near-duplicates for the manifest: pairs whose overlap was computed, records that stay for others, and the
    most that one stays for, itself counted."""
    stays, counts = np.unique(load_removed(folder, "near", 0, 1 << 62)["by"], return_counts=True)
    return {"pairs_compared": n_pairs, "groups": len(stays), "largest": int(counts.max(initial=0)) + bool(len(stays))}


def _components(pairs: np.ndarray) -> list[list[int]]:
    """The positions that are linked by pairs, directly or through others, in groups."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        while parent.setdefault(x, x) != x:
            parent[x] = x = parent[parent[x]]
        return x

    for a, b in zip(pairs["a"].tolist(), pairs["b"].tolist(), strict=True):
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    groups = defaultdict(list)
    for x in sorted(parent):
        groups[root(x)].append(x)
    return [groups[first] for first in sorted(groups)]


