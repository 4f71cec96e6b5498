"""The phase that puts what stays in order, for --sort_by and --balance; and the weights of --weight_by.

arrange    one task    the numbers of the records that stay, as they are written

Without it each task writes the records of its shard, in the order of the input.
"""

from pathlib import Path

import numpy as np

from prepare.duplicates import Corpus, staying
from prepare.pipeline import CHAT, R1, TEXT
from prepare.quality import SCORED, load_scores, places
from prepare.work import WorkStep, numbered, save_array

KINDS = {"write_text": (TEXT,), "write_chats": (CHAT, R1)}  # by the phase that writes them
BANDS = 20  # of as many records each: simple → complex from band to band, in random order inside
LEAST_WEIGHT = 0.5  # of the easiest document; the hardest has 1.5
LEAST_RECORDS, LEAST_BYTES = 20, 0.001  # of a category with a share of its own: the stages hold some out, repeat others
BALANCE_POWER = 0.5  # shares grow with the square root of a category's bytes
NO_CATEGORY = 65535
# a record that stays, and what is known of it
ROW = np.dtype([("number", "<u8"), ("kind", "u1"), ("chars", "<u4"), ("draw", "<u8"), ("bpb", "<f8"), ("good", "<f8"),
                ("category", "<u2")])


def rows_of(folder: Path, corpus: Corpus, shard: int, phase: str, seed: int) -> np.ndarray:
    """ROW of the records of a shard that stay and that the phase writes, by number."""
    begin, end = map(int, corpus.starts[shard:shard + 2])
    meta = corpus.meta(shard)
    mine = np.flatnonzero(staying(folder, begin, end) & np.isin(meta["kind"], KINDS[phase]))
    rows = np.zeros(len(mine), ROW)
    rows["number"] = begin + mine
    for name in ("kind", "chars"):
        rows[name] = meta[name][mine]
    rows["draw"] = _mix(meta["key"][mine, 0] ^ np.uint64(seed))
    scored = load_scores(folder, shard)
    rows["bpb"] = rows["good"] = np.nan
    found = np.isin(rows["number"], scored["number"])
    at = np.searchsorted(scored["number"], rows["number"][found])
    for name in SCORED.names[1:]:
        rows[name][found] = scored[name][at]
    categories = numbered(folder / "categories", shard, ".npy")
    rows["category"] = np.load(categories)[mine] if categories.exists() else NO_CATEGORY
    return rows


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Random-looking numbers, each from one (splitmix64's last steps, Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


class Arrange(WorkStep):
    """Sorts what stays: by category with --balance, by length or score in bands with --sort_by. One task, which takes
    181 bytes a record in memory."""

    def __init__(self, folder: Path, corpus: Corpus, sort_by: str | None, balance: str | None, seed: int):
        super().__init__(folder, "arrange")
        self.corpus, self.sort_by, self.balance, self.seed = corpus, sort_by, balance, seed

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes arranged/PHASE.npy (ROW), all records that the phase writes."""
        n_shards = len(self.corpus.tasks)
        for phase in KINDS:
            parts = [np.empty(0, ROW)]
            for shard in range(n_shards):
                self.tick(0, shard / n_shards)
                parts.append(rows_of(self.folder, self.corpus, shard, phase, self.seed))
            rows = np.concatenate(parts)
            keys = [rows["number"]]
            values = {"length": rows["chars"], "score": rows["bpb"]}.get(self.sort_by)
            if values is not None and not np.isnan(values).any():  # chats have no score
                groups = rows["kind"] + 4 * rows["category"].astype(int) * bool(self.balance)
                keys += [rows["draw"], bands_of(values, groups)]
            if self.balance:
                keys.append(rows["category"])
            save_array(self.folder / "arranged" / f"{phase}.npy", rows[np.lexsort(keys)])


def bands_of(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The band of each record, from 0 to BANDS - 1, by the place of its value among those of its group: records of
    other kinds or categories stand in other files."""
    bands = np.zeros(len(values), int)
    for group in np.unique(groups):
        mine = groups == group
        bands[mine] = np.minimum(BANDS - 1, places(values[mine]) * BANDS)
    return bands


def weight_of(bpb: float, all_bpb: np.ndarray) -> float:
    """The weight of a document whose bits per byte are `bpb`: LEAST_WEIGHT and its place among the sorted scores of
    all, from 0 (easiest) to 1. The mean weight is 1."""
    if len(all_bpb) == 1:
        return 1.0
    first, last = np.searchsorted(all_bpb, bpb, "left"), np.searchsorted(all_bpb, bpb, "right")
    return round(LEAST_WEIGHT + float(first + last - 1) / 2 / (len(all_bpb) - 1), 4)


def balanced_shares(sizes: dict[int, tuple[int, int]]) -> dict[tuple[int, ...], float]:
    """The shares of categories with so many (records, bytes). Small ones are one group, the last: those with fewer than
    LEAST_RECORDS or a smaller part of the bytes than LEAST_BYTES, and the next larger until the group is large enough.
    """
    def is_small(group: list[int]) -> bool:
        records, size = (sum(sizes[category][i] for category in group) for i in (0, 1))
        return records < LEAST_RECORDS or size < LEAST_BYTES * total

    total, rest = sum(size for _, size in sizes.values()), []
    for category in sorted(sizes, key=lambda category: (not is_small([category]), sizes[category][1], category)):
        if is_small([category]) or rest and is_small(rest):
            rest.append(category)
    groups = [(category,) for category in sorted(sizes) if category not in rest] + [tuple(sorted(rest))] * bool(rest)
    powers = {group: sum(sizes[category][1] for category in group)**BALANCE_POWER for group in groups}
    return {group: power / sum(powers.values()) for group, power in powers.items()}
